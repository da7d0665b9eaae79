// One state, and what is drawn again when it changes.

function start(report) {
  const state = { layer: 0, expert: null };
  let tokens = null;
  const pickExpert = (expert) => {
    state.expert = expert;
    if (tokens) colourTokens(tokens);
  };
  const drawLayer = () => {
    byId("layer-select").value = String(state.layer);
    byId("layer-back").disabled = state.layer === 0;
    byId("layer-on").disabled = state.layer === report.labels.length - 1;
    byId("layer-words").textContent = layerWords(report, state.layer);
    [...byId("minis").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === state.layer)));
    drawBars(report, state, pickExpert);
    drawDomains(report, state, pickExpert);
    drawTogether(report, state);
    if (tokens) colourTokens(tokens);
  };
  const chooseLayer = (layer) => {
    Object.assign(state, { layer, expert: null });
    drawLayer();
  };
  const drawAll = () => {
    drawLoad(report, chooseLayer);
    drawMinis(report, state, chooseLayer);
    drawLayer();
  };
  listen(report, state, { chooseLayer, drawAll, drawBars: () => drawBars(report, state, pickExpert), drawLoad: () => drawLoad(report, chooseLayer) });
  if (report.sample && byId("tokens")) tokens = tokenView(report, state, pickExpert);
  drawAll();
}

function layerWords(report, layer) {
  const view = layerOf(report, layer);
  const dead = view.counts.filter((each) => each === 0).length;
  const words = [plural(view.experts, "expert"), `top ${view.topK}`, plural(view.tokens, "token")];
  if (dead && view.total) words.push(`${count(dead)} dead`);
  return words.join(" · ");
}

function listen(report, state, { chooseLayer, drawAll, drawBars, drawLoad }) {
  fillSelect(byId("layer-select"), report.labels.map(titled));
  byId("layer-select").onchange = (event) => chooseLayer(Number(event.target.value));
  byId("layer-back").onclick = () => chooseLayer(state.layer - 1);
  byId("layer-on").onclick = () => chooseLayer(state.layer + 1);
  if (byId("load-domain")) {
    fillSelect(byId("load-domain"), report.domains, "all domains");
    byId("load-domain").onchange = drawLoad;
  }
  document.querySelectorAll("input[name=order]").forEach((input) => (input.onchange = drawBars));
  document.querySelectorAll("a[data-layer]").forEach((link) =>
    link.addEventListener("click", () => chooseLayer(Number(link.dataset.layer))),
  );
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let width = document.documentElement.clientWidth;
  window.addEventListener("resize", () => {
    // a phone's address bar changes the height while scrolling: nothing to draw
    if (document.documentElement.clientWidth === width) return;
    width = document.documentElement.clientWidth;
    drawAll();
  });
  // a touch elsewhere puts the tip away
  window.addEventListener("pointerdown", (event) => event.target.closest(".inner, .tokens") || hideTip(), { capture: true });
  window.addEventListener("scroll", hideTip, { passive: true });
  window.addEventListener("scroll", markContents, { passive: true });
  markContents();
  window.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
}

// The link to the part of the page that is at the top of the window.
function markContents() {
  const links = [...document.querySelectorAll(".contents a")];
  const passed = links.filter((link) => document.querySelector(link.hash).getBoundingClientRect().top < 140);
  const isEnd = window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 4;
  const current = isEnd && window.scrollY ? links[links.length - 1] : passed[passed.length - 1] || links[0];
  if (!current || current.hasAttribute("aria-current")) return;
  links.forEach((link) => (link === current ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current")));
  const strip = current.parentElement;
  strip.scrollTo({ left: current.offsetLeft - strip.clientWidth / 2, behavior: "instant" });
}

function fail(error) {
  const words = "The charts could not be drawn: this browser is older than 2023, or the file is damaged. The verdict and the table above are complete.";
  byId("failure").textContent = `${words} (${error.message})`;
  byId("failure").hidden = false;
  document.documentElement.dataset.state = "failed";
}

if (byId("load")) {
  readReport().then(start).then(() => (document.documentElement.dataset.state = "drawn")).catch(fail);
} else {
  document.documentElement.dataset.state = "drawn";
}
