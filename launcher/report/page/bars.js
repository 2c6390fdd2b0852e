// What a run cost: one measure at a time, a bar per finished run, the best runs first.
const FIRST_BARS = 16;
const COSTS = [
  { key: "tokens_per_second", title: "Tokens/s", text: fixed(0) },
  { key: "seconds", title: "Time", text: duration, shared: true },
  { key: "peak_memory_gib", title: "Peak memory", text: (value) => `${fixed(2)(value)} GiB`, shared: true },
  { key: "gpu_hours", title: "GPU-hours", text: fixed(3) },
  { key: "cost_usd", title: "Cost", text: dollars },
  { key: "trainable_parameters", title: "Trainable", text: compact },
  { key: "adapter_mb", title: "Adapter", text: (value) => `${fixed(1)(value)} MB` },
];
const costs = COSTS.filter(({ key }) => doc.rows.some((row) => row[key]));
const barView = { cost: costs.find(tellsApart) ?? costs[0], all: false };

/** Whether the runs differ in a measure by more than the eye overlooks. */
function tellsApart({ key }) {
  const values = doc.rows.map((row) => row[key] ?? 0);
  return values.some((value) => value > 1.05 * values[0] || value < 0.95 * values[0]);
}

function drawBars() {
  byId("cost").hidden = !costs.length;
  if (!costs.length) return;
  const { key, text, shared } = barView.cost;
  const most = doc.rows.reduce((largest, row) => Math.max(largest, row[key] ?? 0), 0);
  const passing = doc.rows.filter((row) => state.passing.has(row.id));
  const drawn = barView.all ? passing : passing.slice(0, FIRST_BARS);
  const rest = passing.length - drawn.length;
  byId("bars").replaceChildren(...drawn.map((row) => drawBar(row, row[key], most, text)),
    rest ? html("button", { type: "button", class: "quiet", onclick: () => { barView.all = true; drawBars(); } }, `Show ${rest} more`) : "");
  const packed = shared && doc.rows.some((row, index) => row.pack && doc.rows.findIndex((other) => other.pack === row.pack) !== index);
  byId("cost-caption").textContent = packed ? "Runs of a pack trained together: this is what the whole pack took, not a sum over its runs." : "";
}

function drawBar(row, value, most, text) {
  const bar = html("div", { class: "bar" });
  bar.style.background = color(row);
  bar.style.width = `${most ? (100 * (value ?? 0)) / most : 0}%`;
  return html("div", { class: "bar-row" }, html("span", { class: "name", title: runLabel(row) }, runLabel(row)),
    html("div", { class: "bar-track" }, bar), html("span", { class: "value" }, has(value) ? text(value) : MISSING));
}

function barControls() {
  if (!costs.length) return;
  byId("cost-controls").append(segments("Measure", costs.map((cost) => [cost.key, cost.title]), barView.cost.key, (key) => {
    barView.cost = costs.find((cost) => cost.key === key);
    drawBars();
  }));
}
