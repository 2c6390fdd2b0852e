// What every part shares: the data, the state with its listeners, elements, colors and numbers as text.
const doc = JSON.parse(document.getElementById("data").textContent);
const SVG = document.getElementById("logo").namespaceURI;
const SEED = "train.seed";
const MANY_CURVES = 24;  // of more runs only a few are drawn at first
const FIRST_CURVES = 12;

const byId = (id) => document.getElementById(id);
const runs = [...doc.rows, ...doc.unfinished];
const runById = new Map(runs.map((run) => [run.id, run]));
const axisByKey = new Map(doc.axes.map((axis) => [axis.key, axis]));
const shortKey = (key) => key.slice(key.lastIndexOf(".") + 1);
const valueLabel = (run, key) => doc.labels[run.id].axes[key];
const runLabel = (run) => (doc.axes.length ? doc.labels[run.id].run : run.name);
const differs = (key) => new Set(doc.rows.map((row) => row[key])).size > 1;
const isRanked = (run) => run.rank !== undefined;

// ---- state: which curves are on, what the filter leaves, which run is pointed at
const firstAxis = doc.axes.find((axis) => axis.key !== SEED) ?? doc.axes[0];
/** The best run at each value of the first axis: few curves that differ. Where nothing is swept, the best runs. */
function bestOfEach() {
  const best = new Map();
  for (const run of runs) {
    const value = firstAxis ? valueLabel(run, firstAxis.key) : run.id;
    if (!best.has(value)) best.set(value, run);
  }
  return [...best.values()].slice(0, FIRST_CURVES);
}
const state = {
  on: new Set((runs.length > MANY_CURVES ? bestOfEach() : runs).map((run) => run.id)),
  passing: new Set(runs.map((run) => run.id)),
  focus: null,
  colorBy: firstAxis?.key ?? "",
};
const listeners = { draw: [], focus: [] };
const redraw = () => listeners.draw.forEach((draw) => draw());
function setFocus(id) {
  if (state.focus === id) return;
  state.focus = id;
  listeners.focus.forEach((mark) => mark());
}

// ---- elements; text goes in as text, never as HTML
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
function swatch(color) {
  const box = html("span", { class: "swatch", "aria-hidden": "true" });
  box.style.background = color;
  return box;
}
/** Buttons of which one is pressed. `options` are [value, text]. */
function segments(label, options, chosen, choose) {
  const buttons = options.map(([value, text]) =>
    html("button", { type: "button", "aria-pressed": String(value === chosen), onclick: () => press(value) }, text));
  function press(value) {
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(options[index][0] === value)));
    choose(value);
  }
  return html("div", { class: "segments", role: "group", "aria-label": label }, ...buttons);
}

// ---- colors that color-blind eyes tell apart: Okabe and Ito's for words, viridis for numbers
const WORDS = {
  light: ["#0072b2", "#d55e00", "#009e73", "#b5578f", "#b87b00", "#2f93c9"],
  dark: ["#5aa9e6", "#ff8a4c", "#2fc79a", "#e39ac6", "#f0b429", "#8fd3ff"],
};
const VIRIDIS = [[68, 1, 84], [70, 50, 126], [54, 92, 141], [39, 127, 142], [31, 161, 135], [74, 193, 109], [160, 218, 57], [253, 231, 37]];
const isDark = () => document.documentElement.dataset.theme === "dark";
/** Viridis at 0 to 1, without the end that vanishes in the page's background. */
function ramp(position) {
  const place = (isDark() ? 0.32 + 0.62 * position : 0.84 * position) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const mixed = VIRIDIS[low].map((part, index) => Math.round(part + (VIRIDIS[low + 1][index] - part) * (place - low)));
  return `rgb(${mixed.join(",")})`;
}
const palette = () => WORDS[isDark() ? "dark" : "light"];
const shade = (axis, index) => (axis.scale === "category" ? palette()[index % palette().length] : ramp(axis.positions[index]));
function color(run) {
  const axis = axisByKey.get(state.colorBy);
  return axis ? shade(axis, axis.labels.indexOf(valueLabel(run, axis.key))) : palette()[runs.indexOf(run) % palette().length];
}

// ---- numbers as text
const MISSING = "–";
const has = (value) => value !== null && value !== undefined;
const fixed = (digits) => (value) =>
  has(value) ? value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }) : MISSING;
const percent = (share) => (has(share) ? `${fixed(1)(100 * share)} %` : MISSING);
const duration = (value) => {
  if (!has(value)) return MISSING;
  const whole = Math.round(value);
  if (whole < 60) return `${whole} s`;
  const two = (number) => String(number).padStart(2, "0");
  return whole < 3600 ? `${Math.floor(whole / 60)} min ${two(whole % 60)} s` : `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
};
const dollars = (value) => (has(value) ? `$${fixed(value < 1 ? 3 : 2)(value)}` : MISSING);
const compact = (value) => (has(value) ? value.toLocaleString("en", { notation: "compact", maximumFractionDigits: 2 }) : MISSING);
