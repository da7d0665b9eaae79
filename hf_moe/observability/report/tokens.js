// The text, each token in the colour of an expert that it chose, or of the domain that this expert prefers.

const TOKENS_A_PAGE = 1000;
const COLOURS = 8;
// from here on the strongest expert is often none of the eight with a colour
const MANY_EXPERTS = 17;

function tokenView(report, state, choose) {
  const { sample } = report;
  const isCrowded = Math.max(...report.experts) >= MANY_EXPERTS && report.domains.length > 1;
  const view = { sample, report, state, choose, start: 0, at: -1, shown: [], spans: [], byDomain: isCrowded, only: null };
  const domains = byId("tokens-domain");
  if (domains) {
    fillSelect(domains, report.domains, "all domains");
    domains.onchange = () => turnTo(view, 0);
  }
  byId("tokens-expert").onchange = (event) => {
    const chosen = event.target.value;
    Object.assign(view, { byDomain: chosen === "domain", only: null });
    choose(["", "domain"].includes(chosen) ? null : Number(chosen));
  };
  byId("tokens-numbers").onchange = (event) => byId("tokens").classList.toggle("numbered", event.target.checked);
  byId("tokens-back").onclick = () => turnTo(view, view.start - TOKENS_A_PAGE);
  byId("tokens-on").onclick = () => turnTo(view, view.start + TOKENS_A_PAGE);
  listenToTokens(view);
  turnTo(view, openingToken(sample));
  byId("tokens-cut").textContent = cutWords(sample);
  return view;
}

// The first token of the first passage that is nearly as much prose, letters in long lines, as any.
function openingToken(sample) {
  if (sample.shows !== "text") return 0;
  const letters = sample.pieces.map((piece) => (piece.match(/[\p{L} ]/gu) || []).length);
  const length = sample.pieces.map((piece) => piece.length + 3 * (piece.split("↵").length - 1));
  const passages = new Map();
  sample.texts.forEach((text, i) => {
    const passage = passages.get(text) || { first: i, tokens: 0, letters: 0, length: 0 };
    passage.tokens += 1;
    passage.letters += letters[sample.piece[i]];
    passage.length += length[sample.piece[i]];
    passages.set(text, passage);
  });
  const share = (passage) => (passage.tokens < 40 ? 0 : passage.letters / passage.length);
  const best = Math.max(...Array.from(passages.values(), share));
  return [...passages.values()].find((passage) => share(passage) >= best - 0.01).first;
}

// The shown tokens' text. A line's end that is followed by another one does not end the line: blank lines take no room,
// their signs stay.
function piecesOf({ sample, shown }) {
  const pieces = [];
  let isBlankNext = false; // whether the rest of the text begins with an empty line
  for (let i = shown.length - 1; i >= 0; i--) {
    if (sample.texts[shown[i + 1]] !== sample.texts[shown[i]]) isBlankNext = false;
    const piece = sample.pieces[sample.piece[shown[i]]].replace(/↵\n(?=[ \t⇥]*↵)/g, "↵");
    pieces[i] = isBlankNext ? piece.replace(/↵\n$/, "↵") : piece;
    isBlankNext = /^[ \t⇥]*↵/.test(piece) || (isBlankNext && /^[ \t⇥]*$/.test(piece));
  }
  return pieces;
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

function turnTo(view, start) {
  const { sample } = view;
  const domain = chosenDomain("tokens-domain");
  const matching = [];
  for (let i = 0; i < sample.texts.length; i++) {
    if (domain === null || sample.domains[i] === domain + 1) matching.push(i);
  }
  view.start = Math.max(start, 0);
  view.shown = matching.slice(view.start, view.start + TOKENS_A_PAGE);
  view.at = -1;
  const end = view.start + view.shown.length;
  byId("tokens-back").disabled = view.start === 0;
  byId("tokens-on").disabled = end === matching.length;
  const range = `${count(view.start + 1)}–${count(end)} of ${count(matching.length)} tokens`;
  byId("tokens-range").textContent = matching.length ? range : "no tokens";
  writeTokens(view);
  colourTokens(view);
}

function writeTokens(view) {
  const { sample, report } = view;
  const [paragraphs, pieces] = [[], piecesOf(view)];
  view.spans = [];
  let text = null;
  view.shown.forEach((token, i) => {
    if (sample.texts[token] !== text) {
      text = sample.texts[token];
      const domain = report.domains[sample.domains[token] - 1];
      const from = `Passage ${text + 1}${domain && report.domains.length > 1 ? ` · ${domain}` : ""}`;
      paragraphs.push(element("p", {}, [element("span", { className: "from", textContent: from })]));
    }
    const span = element("span", { textContent: pieces[i] });
    span.dataset.i = view.spans.length;
    view.spans.push(span);
    paragraphs[paragraphs.length - 1].append(span);
    if (sample.shows !== "text") paragraphs[paragraphs.length - 1].append(" ");
  });
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
  const { state, sample, report } = view;
  const scheme = view.byDomain ? domainScheme(report, state.layer) : expertScheme();
  const choices = view.shown.map((token) => choicesOf(view, token));
  const groups = frequent(choices.map((each) => (each.length ? scheme.groupOf(each[0].expert) : -1)));
  const colourOf = new Map(groups.map((group, i) => [group, i]));
  const scale = sample.scales[state.layer] || 1;
  const counts = new Map();
  choices.forEach((each, i) => {
    const shown = shownChoice(view, each, colourOf);
    const group = shown ? scheme.groupOf(shown.expert) : null;
    counts.set(group, (counts.get(group) || 0) + 1);
    const colour = colourOf.get(group) ?? COLOURS;
    const span = view.spans[i];
    const isOff = !shown || (view.only !== null && group !== view.only);
    span.className = isOff ? "t off" : `t c${colour}${colour === COLOURS ? " rest" : ""}`;
    span.style.setProperty("--w", isOff ? 0 : Math.min(0.3 + shown.weight / scale, 1));
    span.dataset.e = each.length ? each[0].expert : "–";
  });
  drawTokenLegend(view, scheme, groups, counts);
}

function expertScheme() {
  return { groupOf: (expert) => expert, nameOf: (expert) => `expert ${expert}` };
}

// An expert belongs to the domain that uses it most above the mean; -1 is none in particular.
function domainScheme(report, layer) {
  const { experts, ratio, prefers } = domainRatios(report, layer);
  const preferred = Array.from({ length: experts }, (_, expert) => {
    const domains = [...report.domains.keys()].filter((domain) => prefers(domain, expert));
    return domains.sort((a, b) => ratio(b, expert) - ratio(a, expert))[0] ?? -1;
  });
  return { groupOf: (expert) => preferred[expert], nameOf: (domain) => report.domains[domain] };
}

// The groups that most tokens of this page are in, the largest first.
function frequent(groups) {
  const counts = new Map();
  groups.forEach((group) => group >= 0 && counts.set(group, (counts.get(group) || 0) + 1));
  return [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || a - b).slice(0, COLOURS);
}

// The strongest choice; of many experts the strongest that has a colour.
function shownChoice({ state, report, byDomain }, choices, colourOf) {
  if (state.expert !== null) return choices.find(({ expert }) => expert === state.expert);
  const hasMany = !byDomain && report.experts[state.layer] >= MANY_EXPERTS;
  return (hasMany && choices.find(({ expert }) => colourOf.has(expert))) || choices[0];
}

function tokensLead({ state, byDomain, report }) {
  const label = titled(report.labels[state.layer]);
  if (state.expert !== null) return `${label}: the tokens that chose expert ${state.expert}. A darker colour means more weight.`;
  const many = report.experts[state.layer] >= MANY_EXPERTS;
  const what = byDomain
    ? "each token in the colour of the domain that its strongest expert prefers"
    : many
      ? "each token in the colour of the strongest of its experts that are among the eight most frequent here"
      : "each token in the colour of its strongest expert";
  return `${label}: ${what}. A darker colour means more weight. The bars below count the tokens of each colour. Point at a token, or move with the arrow keys, for all that it chose.`;
}

function drawTokenLegend(view, scheme, groups, counts) {
  const { report, state, choose } = view;
  byId("tokens-lead").textContent = tokensLead(view);
  const chosen = view.byDomain ? view.only : state.expert;
  const pick = (group) => {
    view.only = view.byDomain && group !== chosen ? group : null;
    choose(view.byDomain || group === chosen ? null : group);
  };
  const chips = groups.map((group, i) => {
    const words = `${scheme.nameOf(group)} · ${percent((counts.get(group) || 0) / view.shown.length)}`;
    const chip = element("button", { type: "button", className: `c${i}`, textContent: words, onclick: () => pick(group) });
    chip.setAttribute("aria-pressed", String(chosen === group));
    return chip;
  });
  const experts = report.experts[state.layer];
  const rest = view.byDomain ? "no domain in particular" : `the ${plural(experts - groups.length, "other expert")}`;
  if (view.byDomain || experts > groups.length) chips.push(element("span", { className: "rest", textContent: `dotted: ${rest}` }));
  byId("tokens-legend").replaceChildren(...chips);
  fillTokenSelect(view, experts);
}

function fillTokenSelect({ report, state, byDomain }, experts) {
  const select = byId("tokens-expert");
  fillSelect(select, Array.from({ length: experts }, (_, i) => `expert ${i}`), "strongest expert");
  if (report.domains.length > 1) select.add(new Option("domain that the expert prefers", "domain"), 1);
  select.value = state.expert !== null ? String(state.expert) : byDomain ? "domain" : "";
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
