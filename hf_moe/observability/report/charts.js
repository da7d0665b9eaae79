// Charts on a canvas that a pointer, a finger and the arrow keys can read.

function element(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function cssColours(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim().split(/\s+/);
}

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

// position 0..1 -> [r, g, b], between the named colours
function colourRamp(name) {
  const stops = cssColours(name).map(rgb);
  return (position) => {
    const at = Math.min(Math.max(position, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    return stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (at - low)));
  };
}

// A ratio on the blue-orange ramp: 1 is the middle, 2^octaves and more the end.
function ratioRamp(octaves) {
  const ramp = colourRamp("--ramp");
  return (ratio) => ramp(0.5 + Math.log2(Math.max(ratio, 1e-9)) / (2 * octaves));
}

function showRamp(host, name, labels, extra = []) {
  const canvas = element("canvas", { width: 260, height: 1 });
  const [context, ramp] = [canvas.getContext("2d"), colourRamp(name)];
  for (let x = 0; x < 260; x++) {
    context.fillStyle = `rgb(${ramp(x / 259)})`;
    context.fillRect(x, 0, 1, 1);
  }
  const ticks = element("span", {}, labels.map((label) => element("i", { textContent: label })));
  host.replaceChildren(...extra, element("div", { className: "scale" }, [canvas, ticks]));
}

function key(kind, words) {
  return element("span", { className: "key" }, [element("i", { className: kind }), words]);
}

// ---- the one tooltip

const tip = document.getElementById("tip");

function showTip(lines, box) {
  tip.replaceChildren(
    element("b", { textContent: lines[0] }),
    ...lines.slice(1).map((line) => element("span", { textContent: line })),
  );
  tip.hidden = false;
  const size = tip.getBoundingClientRect();
  const [width, height] = [document.documentElement.clientWidth, window.innerHeight];
  const left = Math.min(Math.max(box.left + box.width / 2 - size.width / 2, 8), width - size.width - 8);
  const above = box.top - size.height - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : Math.min(box.bottom + 8, height - size.height - 8)}px`;
}

function hideTip() {
  tip.hidden = true;
}

// ---- a plane of cells: drawing is the caller's; labels, hover, touch and arrow keys are here

// options: label, rows, columns, width, height (of a cell), rowLabels, columnName, draw(context, size), describe(row,
// column) -> lines or null, pick(row, column), first (the cell where the keys begin), boxOf(row, column) for cells that are not a lattice.
function plane(host, options) {
  const { rows, columns, width, height } = options;
  const size = { width: width * columns, height: height * rows };
  const canvas = element("canvas");
  const scale = Math.min(window.devicePixelRatio || 1, 3);
  canvas.width = Math.round(size.width * scale);
  canvas.height = Math.round(size.height * scale);
  canvas.style.width = `${size.width}px`;
  canvas.style.height = `${size.height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(canvas.width / size.width, 0, 0, canvas.height / size.height, 0, 0);
  options.draw(context, size);
  const cursor = element("div", { className: "cursor", hidden: true });
  const inner = element("div", { className: "inner", tabIndex: 0 }, [canvas, cursor]);
  inner.setAttribute("role", "application");
  inner.setAttribute("aria-label", `${options.label}. Arrow keys move${options.pick ? ", Enter chooses. The values are also in a table." : "."}`);
  inner.style.width = `${size.width}px`;
  inner.append(columnTicks(columns, width, options.columnNumbers));
  const plane = element("div", { className: "plane" }, [inner]);
  const axis = element("p", { className: "axis", textContent: options.columnName });
  host.className = "chart";
  host.replaceChildren(rowTicks(options, size), plane, axis);
  if (plane.scrollWidth > plane.clientWidth + 1) axis.textContent += ` (${columns} of them: scroll sideways)`;
  const fade = () => plane.classList.toggle("more", plane.scrollWidth - plane.clientWidth - plane.scrollLeft > 2);
  plane.onscroll = fade;
  fade();
  explore(inner, canvas, cursor, options, size);
}

function columnTicks(columns, width, numbers) {
  const step = tickStep(columns, width, 30);
  const ticks = [];
  for (let i = 0; i < columns; i += step) {
    const tick = element("span", { textContent: numbers ? numbers[i] : i });
    tick.style.left = `${Math.max((i + 0.5) * width, 4 * tick.textContent.length)}px`;
    ticks.push(tick);
  }
  const strip = element("div", { className: "columns" }, ticks);
  strip.setAttribute("aria-hidden", "true");
  return strip;
}

function rowTicks({ rows, height, rowLabels }, size) {
  const step = tickStep(rows, height, 13);
  const shown = rowLabels.filter((_, i) => i % step === 0);
  // the widest label gives the column its width: the others are placed by hand
  const widest = shown.reduce((a, b) => (b.length > a.length ? b : a), "");
  const spans = shown.map((label, i) => {
    const span = element("span", { textContent: label });
    span.style.top = `${(i * step + 0.5) * height}px`;
    return span;
  });
  const strip = element("div", { className: "rows" }, [element("b", { textContent: widest }), ...spans]);
  strip.style.height = `${size.height}px`;
  strip.setAttribute("aria-hidden", "true");
  return strip;
}

function tickStep(items, size, room) {
  return [1, 2, 4, 5, 8, 10, 16, 20, 32, 64, 128, 256].find((step) => step * size >= room) || items;
}

function explore(inner, canvas, cursor, options, size) {
  const { rows, columns, width, height, describe } = options;
  let at = null;
  const show = (row, column) => {
    const lines = describe(row, column);
    at = lines ? [row, column] : at;
    if (!lines) return leave();
    const box = options.boxOf ? options.boxOf(row, column) : { x: column * width, y: row * height, width, height };
    cursor.hidden = false;
    cursor.style.left = `${box.x - 1}px`;
    cursor.style.top = `${box.y - 1}px`;
    cursor.style.width = `${Math.max(box.width, 3) + 2}px`;
    cursor.style.height = `${Math.max(box.height, 3) + 2}px`;
    showTip(lines, cursor.getBoundingClientRect());
  };
  const leave = () => {
    cursor.hidden = true;
    hideTip();
  };
  const cellAt = (event) => {
    const box = canvas.getBoundingClientRect();
    const [column, row] = [(event.clientX - box.left) / width, (event.clientY - box.top) / height];
    return [row, column].map(Math.floor);
  };
  const inside = ([row, column]) => row >= 0 && row < rows && column >= 0 && column < columns;
  canvas.addEventListener("pointermove", (event) => inside(cellAt(event)) && show(...cellAt(event)));
  canvas.addEventListener("pointerdown", (event) => inside(cellAt(event)) && show(...cellAt(event)));
  canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && leave());
  canvas.addEventListener("click", (event) => options.pick && inside(cellAt(event)) && options.pick(...cellAt(event)));
  inner.addEventListener("blur", leave);
  inner.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Escape") return leave();
    if (event.key === "Enter" && at && options.pick) return options.pick(...at);
    if (!(event.key in moves)) return;
    event.preventDefault();
    const next = at && !cursor.hidden ? [at[0] + moves[event.key][0], at[1] + moves[event.key][1]] : at || options.first || [0, 0];
    if (inside(next) && describe(...next)) show(...next);
    cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
}

// ---- heat map

// options as in `plane`, with colour(row, column) -> [r, g, b] or null, crossed(row, column) for cells with a stroke
function heatMap(host, options) {
  const { rows, columns, width, height, colour, crossed } = options;
  const draw = (context, size) => {
    const image = new ImageData(columns, rows);
    for (let row = 0, at = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++, at += 4) {
        const value = colour(row, column);
        if (value) image.data.set([...value, 255], at);
      }
    }
    const small = element("canvas", { width: columns, height: rows });
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, size.width, size.height);
    drawGaps(context, size, options);
    if (crossed) drawCrosses(context, options);
  };
  plane(host, { ...options, draw });
}

function drawGaps(context, size, { rows, columns, width, height }) {
  context.fillStyle = cssColours("--page")[0];
  if (width >= 7) for (let i = 1; i < columns; i++) context.fillRect(i * width - 0.5, 0, 1, size.height);
  if (height >= 7) for (let i = 1; i < rows; i++) context.fillRect(0, i * height - 0.5, size.width, 1);
}

function drawCrosses(context, { rows, columns, width, height, crossed }) {
  context.strokeStyle = cssColours("--ink")[0];
  context.lineWidth = width >= 7 ? 1.5 : 1;
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      if (!crossed(row, column)) continue;
      const [x, y] = [column * width, row * height];
      const inset = Math.min(width, height) >= 7 ? 2.5 : 0.5;
      context.strokeRect(x + 0.75, y + 0.75, width - 1.5, height - 1.5);
      context.beginPath();
      context.moveTo(x + inset, y + height - inset);
      context.lineTo(x + width - inset, y + inset);
      context.stroke();
    }
  }
}

// The width of a column so that all fit, or the narrowest that a finger can still find.
function columnWidth(host, columns, labels, { least = 3.6, most = 150 } = {}) {
  const context = element("canvas").getContext("2d");
  context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  const widest = Math.max(30, ...labels.map((label) => context.measureText(label).width));
  const room = host.clientWidth - Math.ceil(widest) - 14;
  return Math.max(Math.min(room / columns, most), least);
}

// ---- bars

// options: values, expected (a line), ticks (marks on the bars), numbers, label, describe(column), pick(column)
function barChart(host, options) {
  const { values, even, marks, numbers } = options;
  const height = 190;
  const width = columnWidth(host, values.length, ["100%"], { least: 3 });
  const top = Math.max(...values, even * 1.6, ...(marks || [0]));
  const level = (value) => height - (value / top) * (height - 12);
  const draw = (context, size) => {
    context.fillStyle = cssColours("--bar")[0];
    const gap = width >= 5 ? Math.max(1, width * 0.16) : 0.5;
    values.forEach((value, i) => context.fillRect(i * width + gap / 2, level(value), width - gap, height - level(value)));
    context.fillStyle = cssColours("--ink")[0];
    if (marks && width >= 6) marks.forEach((mark, i) => context.fillRect(i * width + gap / 2, level(mark) - 1, width - gap, 2));
    context.strokeStyle = cssColours("--ink")[0];
    context.setLineDash([5, 4]);
    context.beginPath();
    context.moveTo(0, level(even));
    context.lineTo(size.width, level(even));
    context.stroke();
  };
  plane(host, {
    ...options, rows: 1, columns: values.length, width, height, draw, columnNumbers: numbers, rowLabels: [""],
    describe: (_, column) => options.describe(column),
    pick: (_, column) => options.pick(column),
    boxOf: (_, column) => ({ x: column * width, y: level(values[column]), width, height: height - level(values[column]) }),
  });
  labelLevels(host.querySelector(".rows"), level, top);
}

function labelLevels(strip, level, top) {
  const step = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5].find((each) => top / each <= 5) || 1;
  const spans = [];
  for (let i = 0; i * step <= top; i++) {
    const span = element("span", { textContent: percent(i * step) });
    span.style.top = `${level(i * step) - (i ? 0 : 4)}px`;
    spans.push(span);
  }
  strip.replaceChildren(element("b", { textContent: "100%" }), ...spans);
}
