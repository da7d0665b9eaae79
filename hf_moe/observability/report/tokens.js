// The text, each token coloured by an expert that it chose.

const TOKENS_A_PAGE = 1000;
const COLOURS = 8;

function tokenView(report, state, choose) {
  const { sample } = report;
  const view = { sample, report, state, choose, page: 0, at: -1, shown: [], spans: [] };
  const domains = byId("tokens-domain");
  if (domains) {
    fillSelect(domains, report.domains, "all domains");
    domains.onchange = () => turnTo(view, 0);
  }
  byId("tokens-expert").onchange = (event) => choose(event.target.value === "" ? null : Number(event.target.value));
  byId("tokens-numbers").onchange = (event) => byId("tokens").classList.toggle("numbered", event.target.checked);
  byId("tokens-back").onclick = () => turnTo(view, view.page - 1);
  byId("tokens-on").onclick = () => turnTo(view, view.page + 1);
  listenToTokens(view);
  turnTo(view, 0);
  byId("tokens-cut").textContent = cutWords(sample);
  return view;
}

function cutWords(sample) {
  const here = sample.texts.length;
  const words = [];
  if (here < sample.total) words.push(`The page shows ${count(here)} of the ${count(sample.total)} tokens traced.`);
  const [kept, all] = [sample.slots.length, sample.slotsInTrace];
  if (kept < all) words.push(`Of the ${all} experts of a token, the page keeps the ${kept === 1 ? "strongest" : `${kept} strongest`}.`);
  if (sample.shows !== "text") words.push(`The trace stores no text: tokens are shown as their ${sample.shows}.`);
  return words.join(" ");
}

function turnTo(view, page) {
  const { sample } = view;
  const domain = chosenDomain("tokens-domain");
  const matching = [];
  for (let i = 0; i < sample.texts.length; i++) {
    if (domain === null || sample.domains[i] === domain + 1) matching.push(i);
  }
  const last = Math.max(Math.ceil(matching.length / TOKENS_A_PAGE) - 1, 0);
  view.page = Math.min(Math.max(page, 0), last);
  const start = view.page * TOKENS_A_PAGE;
  view.shown = matching.slice(start, start + TOKENS_A_PAGE);
  view.at = -1;
  byId("tokens-back").disabled = view.page === 0;
  byId("tokens-on").disabled = view.page === last;
  const range = `${count(start + 1)}–${count(start + view.shown.length)} of ${count(matching.length)} tokens`;
  byId("tokens-range").textContent = matching.length ? range : "no tokens";
  writeTokens(view);
  colourTokens(view);
}

function writeTokens(view) {
  const { sample, report } = view;
  const paragraphs = [];
  view.spans = [];
  let text = null;
  for (const token of view.shown) {
    if (sample.texts[token] !== text) {
      text = sample.texts[token];
      const domain = report.domains[sample.domains[token] - 1];
      const from = `Passage ${text + 1}${domain && report.domains.length > 1 ? ` · ${domain}` : ""}`;
      paragraphs.push(element("p", {}, [element("span", { className: "from", textContent: from })]));
    }
    const span = element("span", { textContent: sample.pieces[sample.piece[token]] });
    span.dataset.i = view.spans.length;
    view.spans.push(span);
    paragraphs[paragraphs.length - 1].append(span);
    if (sample.shows !== "text") paragraphs[paragraphs.length - 1].append(" ");
  }
  byId("tokens").replaceChildren(...paragraphs);
  byId("tokens").scrollTop = 0;
}

// The choices of one token in the chosen layer: [{ expert, weight }], strongest first, empty slots left out.
function choicesOf({ sample, report, state }, token) {
  const at = state.layer * sample.texts.length + token;
  const experts = report.experts[state.layer];
  const found = sample.slots.map((slot) => ({
    expert: slot.experts[at],
    weight: (slot.weights[at] / 255) * sample.scales[state.layer],
  }));
  return found.filter(({ expert }) => expert < experts);
}

function colourTokens(view) {
  const { report, state, sample } = view;
  const strongest = strongestCounts(view);
  const busiest = byLoad(strongest).slice(0, COLOURS).filter((expert) => strongest[expert]);
  const colourOf = new Map(busiest.map((expert, i) => [expert, i]));
  const scale = sample.scales[state.layer] || 1;
  view.shown.forEach((token, i) => {
    const choices = choicesOf(view, token);
    const shown = state.expert === null ? choices[0] : choices.find(({ expert }) => expert === state.expert);
    const span = view.spans[i];
    const colour = shown ? (colourOf.get(shown.expert) ?? COLOURS) : null;
    span.className = shown ? `t c${colour}${colour === COLOURS ? " rest" : ""}` : "t off";
    span.style.setProperty("--w", shown ? Math.min(0.3 + shown.weight / scale, 1) : 0);
    span.dataset.e = choices.length ? choices[0].expert : "–";
  });
  drawTokenLegend(view, busiest, strongest);
}

// For how many tokens of the page each expert of the chosen layer is the strongest.
function strongestCounts({ sample, report, state }) {
  const counts = new Uint32Array(report.experts[state.layer] + 1);
  const start = state.layer * sample.texts.length;
  for (let i = 0; i < sample.texts.length; i++) counts[Math.min(sample.slots[0].experts[start + i], counts.length - 1)]++;
  return counts.subarray(0, -1);
}

function drawTokenLegend({ report, state, choose, sample }, busiest, strongest) {
  const layer = layerOf(report, state.layer);
  const label = titled(layer.label);
  byId("tokens-lead").textContent = state.expert === null
    ? `${label}: each token in the colour of its strongest expert, deeper for more weight; below, for how many tokens that is. Point at a token, or move with the arrow keys, for all that it chose.`
    : `${label}: the tokens that chose expert ${state.expert}, deeper for more weight.`;
  const chips = busiest.map((expert, i) => {
    const words = `expert ${expert} · ${percent(strongest[expert] / sample.texts.length)}`;
    const chip = element("button", { type: "button", className: `c${i}`, textContent: words });
    chip.setAttribute("aria-pressed", String(state.expert === expert));
    chip.onclick = () => choose(state.expert === expert ? null : expert);
    return chip;
  });
  const rest = layer.experts - busiest.length;
  if (rest > 0) chips.push(element("span", { className: "rest", textContent: `dotted: the ${plural(rest, "other expert")}` }));
  byId("tokens-legend").replaceChildren(...chips);
  const select = byId("tokens-expert");
  fillSelect(select, Array.from({ length: layer.experts }, (_, i) => `expert ${i}`), "strongest expert");
  select.value = state.expert === null ? "" : String(state.expert);
}

function tokenWords(view, i) {
  const { sample, report } = view;
  const token = view.shown[i];
  const choices = choicesOf(view, token);
  const piece = sample.pieces[sample.piece[token]].replaceAll("\n", "");
  const lines = choices.map(({ expert, weight }) => `expert ${expert}: weight ${weight.toFixed(2)}`);
  return [sample.shows === "text" ? `“${piece}”` : piece, ...(lines.length ? lines : ["no expert"])];
}

function listenToTokens(view) {
  const host = byId("tokens");
  const point = (i) => {
    view.spans[view.at]?.classList.remove("here");
    view.at = i;
    if (i < 0) return hideTip();
    view.spans[i].classList.add("here");
    showTip(tokenWords(view, i), view.spans[i].getBoundingClientRect());
  };
  const tokenAt = (event) => Number(event.target.closest?.("[data-i]")?.dataset.i ?? -1);
  host.addEventListener("pointerover", (event) => point(tokenAt(event)));
  host.addEventListener("pointerdown", (event) => point(tokenAt(event)));
  host.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(-1));
  host.addEventListener("blur", () => point(-1));
  host.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowLeft: -1 };
    if (event.key === "Escape") return point(-1);
    if (!(event.key in moves)) return;
    event.preventDefault();
    const next = Math.min(Math.max(view.at + moves[event.key], 0), view.spans.length - 1);
    view.spans[next]?.scrollIntoView({ block: "nearest" });
    if (next >= 0 && view.spans.length) point(next);
  });
}
