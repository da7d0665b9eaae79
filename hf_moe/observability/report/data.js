// Reads back what data.py packed; numbers as text.

const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f8: Float64Array };

async function unpack({ type, data }) {
  const binary = atob(data);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  return type === "json" ? JSON.parse(new TextDecoder().decode(buffer)) : new ARRAYS[type](buffer);
}

async function readReport() {
  const packed = JSON.parse(document.getElementById("report").textContent);
  const report = { ...packed, offsets: offsets(packed.experts) };
  [report.counts, report.mass] = await Promise.all([unpack(packed.counts), unpack(packed.mass)]);
  report.domainCounts = await Promise.all(packed.domainCounts.map(unpack));
  report.coactivation = await Promise.all(packed.coactivation.map((each) => each && unpack(each)));
  report.sample = packed.sample && packed.sample.slots.length ? await readSample(packed.sample) : null;
  return report;
}

async function readSample(packed) {
  const names = ["texts", "domains", "pieces", "piece"];
  const values = await Promise.all(names.map((name) => unpack(packed[name])));
  const slots = packed.slots.map(async (slot) => ({
    experts: await unpack(slot.experts),
    weights: await unpack(slot.weights),
  }));
  return { ...packed, ...Object.fromEntries(names.map((name, i) => [name, values[i]])), slots: await Promise.all(slots) };
}

function offsets(sizes) {
  const found = [0];
  for (const size of sizes) found.push(found[found.length - 1] + size);
  return found;
}

// Everything about one layer; `domain` is a position in `report.domains` or null for all text.
function layerOf(report, layer, domain = null) {
  const [start, end] = [report.offsets[layer], report.offsets[layer + 1]];
  const counts = (domain === null ? report.counts : report.domainCounts[domain]).subarray(start, end);
  return {
    counts,
    mass: report.mass.subarray(start, end),
    total: sum(counts),
    experts: report.experts[layer],
    topK: report.topK[layer],
    tokens: domain === null ? report.tokens[layer] : report.domainTokens[domain][layer],
    label: report.labels[layer],
  };
}

function sum(values) {
  let total = 0;
  for (const value of values) total += value;
  return total;
}

// Load as a multiple of the even share; NaN where nothing was counted.
function timesEven(view, expert) {
  return view.total ? (view.counts[expert] / view.total) * view.experts : NaN;
}

function byLoad(counts) {
  return Array.from(counts.keys()).sort((a, b) => counts[b] - counts[a] || a - b);
}

const whole = new Intl.NumberFormat("en-US");

function count(value) {
  return whole.format(value);
}

function percent(share) {
  if (!Number.isFinite(share)) return "–";
  if (share > 0 && share < 0.001) return "<0.1%";
  return `${(100 * share).toFixed(share < 0.0995 && share > 0 ? 1 : 0)}%`;
}

function times(ratio) {
  if (!Number.isFinite(ratio)) return "–";
  return `${ratio.toFixed(ratio >= 10 ? 0 : ratio >= 1 ? 1 : 2)}×`;
}

function plural(value, word) {
  return `${count(value)} ${word}${value === 1 ? "" : "s"}`;
}

// "layer 3" -> "Layer 3"
function titled(label) {
  return label.charAt(0).toUpperCase() + label.slice(1);
}
