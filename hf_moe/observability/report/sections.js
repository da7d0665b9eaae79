// The sections of the page, each drawn from the report and the state { layer, expert, ... }.

const OCTAVES = 3;
// a domain prefers an expert that it uses this many times the mean over domains, and for that many of its tokens
const [PREFERRED, LEAST_TOKENS] = [1.1, 10];
const RATIO_TICKS = ["⅛", "¼", "½", "even", "2×", "4×", "8×"];

function byId(id) {
  return document.getElementById(id);
}

// A table that is built when it is first opened. rows() gives arrays of texts, the first the row's name.
function lazyTable(id, head, rows) {
  const details = byId(id);
  const build = () => {
    if (!details.open) return;
    details.querySelector(".scroll")?.remove();
    details.append(element("div", { className: "scroll", tabIndex: 0 }, [table(head(), rows())]));
  };
  details.ontoggle = build;
  build();
}

function table(head, rows, wordy = []) {
  const header = head.map((title, i) => element("th", { scope: "col", textContent: title, className: wordy.includes(i) ? "words" : "" }));
  const lines = rows.map((row) =>
    element("tr", {}, row.map((value, i) => {
      if (i === 0) return element("th", { scope: "row", textContent: value });
      return element("td", { textContent: value, className: wordy.includes(i) ? "words" : "" });
    })),
  );
  return element("table", {}, [
    element("thead", {}, [element("tr", {}, header)]),
    element("tbody", {}, lines),
  ]);
}

function fillSelect(select, labels, first = null) {
  const options = labels.map((label, i) => new Option(label, i));
  select.replaceChildren(...(first === null ? [] : [new Option(first, "")]), ...options);
}

function chosenDomain(id) {
  const select = byId(id);
  return !select || select.value === "" ? null : Number(select.value);
}

// ---- all layers

function drawLoad(report, pick) {
  const domain = chosenDomain("load-domain");
  const views = report.labels.map((_, layer) => layerOf(report, layer, domain));
  const columns = Math.max(...report.experts);
  const rows = views.length;
  const ramp = ratioRamp(OCTAVES);
  const host = byId("load-map");
  const has = (row, column) => column < views[row].experts && views[row].total > 0;
  heatMap(host, {
    label: "Load of every expert in every layer",
    rows, columns,
    width: columnWidth(host, columns, report.labels),
    height: rows <= 8 ? 30 : rows <= 20 ? 20 : rows <= 40 ? 15 : 11,
    rowLabels: report.labels, columnName: "expert",
    colour: (row, column) => (has(row, column) ? ramp(timesEven(views[row], column)) : null),
    crossed: (row, column) => has(row, column) && views[row].counts[column] === 0,
    describe: (row, column) => (has(row, column) ? loadWords(views[row], column) : null),
    pick,
  });
  showRamp(byId("load-legend"), "--ramp", RATIO_TICKS, [key("", "no token at all")]);
  const head = () => ["Layer", ...Array.from({ length: columns }, (_, i) => `${i}`)];
  lazyTable("load-table", head, () =>
    views.map((view) => [view.label, ...Array.from({ length: columns }, (_, i) => (i < view.experts ? count(view.counts[i]) : ""))]),
  );
}

function loadWords(view, expert) {
  const chosen = view.counts[expert];
  const lines = [`${titled(view.label)} · expert ${expert}`];
  if (chosen === 0) return [...lines, "No token chose it.", `Even share: ${percent(1 / view.experts)}`];
  return [
    ...lines,
    `${times(timesEven(view, expert))} its even share`,
    `${count(chosen)} of ${count(view.total)} assignments (${percent(chosen / view.total)})`,
  ];
}

function drawMinis(report, state, choose) {
  const buttons = report.labels.map((label, layer) => {
    const view = layerOf(report, layer);
    const canvas = element("canvas", { width: 200, height: 60 });
    drawMini(canvas, view);
    const busiest = view.total ? times(Math.max(...view.counts) / view.total * view.experts) : "no token";
    const words = element("span", {}, [element("b", { textContent: titled(label) }), busiest]);
    const button = element("button", { type: "button", onclick: () => choose(layer), title: report.names[layer] }, [canvas, words]);
    button.setAttribute("aria-label", `${titled(label)}, busiest expert ${busiest} its even share`);
    return button;
  });
  byId("minis").replaceChildren(...buttons);
}

function drawMini(canvas, view) {
  const context = canvas.getContext("2d");
  const loads = byLoad(view.counts).map((expert) => timesEven(view, expert));
  const top = Math.max(loads[0] || 0, 2);
  const width = canvas.width / loads.length;
  context.fillStyle = cssColours("--bar")[0];
  loads.forEach((load, i) => {
    const height = (load / top) * canvas.height;
    context.fillRect(i * width, canvas.height - height, Math.max(width - (width > 6 ? 2 : 0), 1), height);
  });
  context.fillStyle = cssColours("--ink")[0];
  context.fillRect(0, canvas.height * (1 - 1 / top) - 1, canvas.width, 2);
}

// ---- one layer

function drawBars(report, state, pick) {
  const view = layerOf(report, state.layer);
  const byNumber = document.querySelector("input[name=order]:checked").value === "number";
  const order = byNumber ? Array.from(view.counts.keys()) : byLoad(view.counts);
  const mass = sum(view.mass);
  const share = (expert) => (view.total ? view.counts[expert] / view.total : 0);
  const weight = (expert) => (mass ? view.mass[expert] / mass : 0);
  barChart(byId("bars"), {
    label: `Load of the experts of ${view.label}`,
    values: order.map(share), marks: Number.isFinite(mass) ? order.map(weight) : null, even: 1 / view.experts,
    numbers: order, columnName: byNumber ? "expert" : "expert, busiest first",
    describe: (column) => [...loadWords(view, order[column]), `${percent(weight(order[column]))} of the weight`],
    pick: (column) => pick(order[column]),
  });
  const legend = [key("line", `even share ${percent(1 / view.experts)}`)];
  byId("bars-legend").replaceChildren(...legend, key("dash", "share of the weight"));
  lazyTable("layer-table", () => ["Expert", "Assignments", "Share", "Times even", "Share of weight", ...report.domains],
    () => order.map((expert) => [
      `${expert}`, count(view.counts[expert]), percent(share(expert)), times(timesEven(view, expert)), percent(weight(expert)),
      ...report.domains.map((_, domain) => percent(domainShare(report, state.layer, domain, expert))),
    ]),
  );
}

function domainShare(report, layer, domain, expert) {
  const view = layerOf(report, layer, domain);
  return view.total ? view.counts[expert] / view.total : NaN;
}

function drawDomains(report, state, pick) {
  const host = byId("domain-map");
  if (!host) return;
  const { views, experts, mean, ratio } = domainRatios(report, state.layer);
  byId("domains-lead").textContent = `${titled(report.labels[state.layer])}: the colour compares the share that an expert has of one domain with its mean over all domains.`;
  const ramp = ratioRamp(2);
  heatMap(host, {
    label: `Use of the experts of ${report.labels[state.layer]} by domain`,
    rows: views.length, columns: experts,
    width: columnWidth(host, experts, report.domains), height: 28,
    rowLabels: report.domains, columnName: "expert",
    colour: (row, column) => (Number.isFinite(ratio(row, column)) ? ramp(ratio(row, column)) : null),
    describe: (row, column) => domainWords(report, views, row, column, mean[column], ratio(row, column)),
    pick: (_, expert) => pick(expert),
  });
  showRamp(byId("domain-legend"), "--ramp", ["¼", "½", "mean", "2×", "4×"]);
  byId("domain-table").replaceChildren(domainTable(report, state));
}

// Of one layer: how often each domain uses an expert, over the mean of all domains.
function domainRatios(report, layer) {
  const views = report.domains.map((_, domain) => layerOf(report, layer, domain));
  const experts = report.experts[layer];
  const seen = views.filter((view) => view.total);
  const share = (view, expert) => (view.total ? view.counts[expert] / view.total : NaN);
  const mean = Array.from({ length: experts }, (_, i) => sum(seen.map((view) => share(view, i))) / Math.max(seen.length, 1));
  const ratio = (row, expert) => (mean[expert] ? share(views[row], expert) / mean[expert] : NaN);
  const prefers = (row, expert) => views[row].counts[expert] >= LEAST_TOKENS && ratio(row, expert) >= PREFERRED;
  return { views, experts, mean, ratio, prefers };
}

function domainWords(report, views, row, expert, mean, ratio) {
  const view = views[row];
  if (!view.total) return [`${report.domains[row]}`, "No token of this domain was traced."];
  return [
    `${report.domains[row]} · expert ${expert}`,
    mean ? `${times(ratio)} the mean over domains` : "No domain uses it.",
    `${percent(view.counts[expert] / view.total)} of the domain's assignments, mean ${percent(mean)}`,
  ];
}

function domainTable(report, state) {
  const { views, ratio, prefers } = domainRatios(report, state.layer);
  const rows = views.map((view, row) => {
    const most = Array.from(view.counts.keys()).filter((expert) => prefers(row, expert));
    const best = most.sort((a, b) => ratio(row, b) - ratio(row, a)).slice(0, 3);
    const words = best.map((expert) => `expert\u00a0${expert}\u00a0(${times(ratio(row, expert))})`).join(", ");
    return [report.domains[row], count(view.tokens), report.distances[row][state.layer].toFixed(3), words || "none in particular"];
  });
  return table(["Domain", "Tokens", "Distance", "Prefers"], rows, [3]);
}

// ---- pairs of experts

function drawTogether(report, state) {
  const host = byId("together");
  const view = layerOf(report, state.layer);
  const pairs = report.coactivation[state.layer];
  const reason = togetherMissing(report, view, pairs);
  if (reason) return host.replaceChildren(element("p", { className: "nothing", textContent: reason }));
  const found = pairRatios(view, pairs);
  const order = clusterOrder(found);
  if (!order.length) return host.replaceChildren(element("p", { className: "nothing", textContent: "Too few tokens to say which experts work together." }));
  const chart = element("div");
  const list = element("div", {}, [element("h4", { textContent: "Most above what their loads explain" }), pairList(found)]);
  const legend = element("div", { className: "legend" });
  host.replaceChildren(
    element("p", { className: "lead", textContent: "How often two experts serve the same token, over what their loads alone would give. Experts that work together stand side by side; a pair at less than twice its expected number has no colour." }),
    element("div", { className: "pairs" }, [element("div", {}, [chart, legend]), list]),
  );
  drawPairs(chart, view, found, order);
  showRamp(legend, "--above", ["2×", "4×", "8×", "16×"]);
  legend.append(key("below", "less than 2×"), key("few", "too few tokens to say"));
  const left = view.experts - order.length;
  if (left) list.append(element("p", { className: "quiet", textContent: `Left out: ${plural(left, "expert")} with too few tokens to say anything.` }));
}

function togetherMissing(report, view, pairs) {
  if (view.topK < 2) return "Each token takes one expert in this layer, so no two work together.";
  if (!view.total) return "No token reached this layer.";
  if (pairs) return "";
  const kept = report.coactivation.filter(Boolean).length;
  if (!kept) return "Pairs of experts were not counted in this trace.";
  return `Pairs are left out here to keep the page small: it holds them for ${kept} of ${report.labels.length} layers. The trace has them all.`;
}

// For i < j: tokens that chose both, and over the number that independent choices of the same loads would give.
function pairRatios(view, pairs) {
  const { counts, experts } = view;
  let products = 0;
  for (let i = 0; i < experts; i++) for (let j = i + 1; j < experts; j++) products += counts[i] * counts[j];
  const scale = products ? sum(pairs) / products : 0;
  const start = (i) => i * experts - (i * (i + 1)) / 2 - i - 1;
  const together = (i, j) => pairs[start(Math.min(i, j)) + Math.max(i, j)];
  const expected = (i, j) => counts[i] * counts[j] * scale;
  const ratio = (i, j) => (expected(i, j) >= 5 ? together(i, j) / expected(i, j) : NaN);
  return { experts, counts, together, expected, ratio };
}

// The lower triangle, experts in the order of their clusters.
function drawPairs(host, view, { counts, together, ratio }, order) {
  const ramp = colourRamp("--above");
  const plain = rgb(cssColours("--faint")[0]);
  const colour = (value) => (value >= 2 ? ramp(Math.log2(value / 2) / 3) : Number.isFinite(value) ? plain : null);
  heatMap(host, {
    label: `Pairs of experts of ${view.label}`,
    rows: order.length, columns: order.length, ...squares(host, order.length),
    rowLabels: order.map(String), columnNumbers: order, columnName: "expert, in clusters", first: [1, 0],
    colour: (row, column) => (column < row ? colour(ratio(order[row], order[column])) : null),
    describe: (row, column) => (column < row ? pairWords(order[row], order[column]) : null),
  });
  function pairWords(i, j) {
    const expected = Number.isFinite(ratio(i, j)) ? `, ${times(ratio(i, j))} what their loads give` : "";
    return [
      `Experts ${i} and ${j}`,
      `${plural(together(i, j), "token")} chose both${expected}`,
      `${percent(together(i, j) / counts[i])} of expert ${i}'s, ${percent(together(i, j) / counts[j])} of expert ${j}'s`,
    ];
  }
}

function squares(host, experts) {
  const size = Math.max(Math.min((Math.min(host.clientWidth, 600) - 40) / experts, 40), 1.5);
  return { width: size, height: size };
}

// The experts that can be judged, by average linkage: the two groups whose experts meet most, on the log scale, are
// joined until one is left.
function clusterOrder({ experts, ratio }) {
  const meets = (i, j) => Math.min(Math.max(Math.log2(ratio(i, j)) || 0, -3), 3);
  const all = Array.from({ length: experts }, (_, i) => i);
  const known = all.filter((i) => all.some((j) => i !== j && Number.isFinite(ratio(i, j))));
  const groups = known.map((expert) => [expert]);
  const links = known.map((i) => Float64Array.from(known, (j) => (i === j ? NaN : meets(i, j))));
  for (let left = known.length; left > 1; left--) {
    const [one, two] = closest(groups, links);
    const [a, b] = [groups[one].length, groups[two].length];
    for (let k = 0; k < known.length; k++) links[one][k] = links[k][one] = (a * links[one][k] + b * links[two][k]) / (a + b);
    groups[one] = joined(groups[one], groups[two], meets);
    groups[two] = null;
  }
  return groups.find(Boolean) || [];
}

function closest(groups, links) {
  let [pair, most] = [null, -Infinity];
  for (let i = 0; i < groups.length; i++) {
    if (!groups[i]) continue;
    for (let j = 0; j < i; j++) if (groups[j] && links[i][j] > most) [pair, most] = [[j, i], links[i][j]];
  }
  return pair;
}

// Two groups end to end, turned so that the experts that touch meet most.
function joined(one, two, meets) {
  const turned = (group) => [group, [...group].reverse()];
  const ways = turned(one).flatMap((first) => turned(two).map((second) => [first, second]));
  const [first, second] = ways.reduce((best, way) => (touch(way) > touch(best) ? way : best));
  return [...first, ...second];
  function touch([a, b]) {
    return meets(a[a.length - 1], b[0]);
  }
}

function pairList({ experts, together, ratio }) {
  const best = [];
  for (let i = 0; i < experts; i++) {
    for (let j = i + 1; j < experts; j++) if (ratio(i, j) > 1) best.push([i, j, ratio(i, j)]);
  }
  best.sort((a, b) => b[2] - a[2]);
  const items = best.slice(0, 8).map(([i, j, value]) =>
    element("li", {}, [
      element("span", { textContent: `Experts ${i} and ${j}` }),
      element("span", { className: "quiet", textContent: `${times(value)}, ${plural(together(i, j), "token")}` }),
    ]),
  );
  return items.length ? element("ol", {}, items) : element("p", { className: "quiet", textContent: "No pair stands out." });
}
