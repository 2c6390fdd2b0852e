// A plot's frame: scales, ticks, grid lines, and the tip beside the pointer.
const PADDING = { right: 16, top: 12, bottom: 40 };
const LETTER = 7;  // pixels at most, of a digit in a plot

/** About `count` round numbers from `low` to `high`. */
function niceTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) ticks.push(Number(tick.toPrecision(12)));
  return ticks;
}

/** The extent of `values` with some air, so that no mark lies on the frame. */
function extent(values, air = 0.06) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) return [0, 1];
  const margin = high > low ? (high - low) * air : Math.abs(high) * 0.1 || 1;
  return [low - margin, high + margin];
}

const scale = ([low, high], [from, to]) => (value) => from + ((value - low) / (high - low)) * (to - from);

/** Fill `box` with three layers: `plot` for the frame, `marks` for all runs, and `above` for the run that is pointed at.
 *  Pointing dims the marks as a whole and copies a few of them: no other mark is drawn again, which counts at 500 runs. */
function layered(box, plot, width, height) {
  const layer = (name) => svg("svg", { class: name, viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  const [marks, above] = [layer("marks"), layer("above")];
  box.replaceChildren(html("div", { class: "layers" }, plot, marks, above));
  return { plot, marks, above };
}

/** Lift the marks of the run that is pointed at above those of all others. */
function lift({ marks, above }) {
  const chosen = state.focus === null ? [] : [...marks.querySelectorAll(`[data-run="${CSS.escape(state.focus)}"]`)];
  marks.classList.toggle("dim", chosen.length > 0);
  above.replaceChildren(...chosen.map((mark) => mark.cloneNode()));
}

/** A plot with horizontal grid lines. Ticks are [value, label]; `air` keeps the marks off the ends of the x axis, in pixels. */
function frame(box, { height, label, xDomain, yDomain, xTicks, yTicks, xLabel, yLabel, air = 0, focusable = false }) {
  const width = Math.max(280, box.clientWidth);
  const left = 32 + LETTER * yTicks.reduce((most, [, text]) => Math.max(most, text.length), 2);
  const x = scale(xDomain, [left + air, width - PADDING.right - air]);
  const y = scale(yDomain, [height - PADDING.bottom, PADDING.top]);
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label, tabindex: focusable ? 0 : null });
  for (const [value, text] of yTicks) {
    plot.append(svg("line", { class: "gridline", x1: left, x2: width - PADDING.right, y1: y(value), y2: y(value) }),
      svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, text));
  }
  const floor = height - PADDING.bottom;
  plot.append(svg("line", { class: "axis", x1: left, x2: width - PADDING.right, y1: floor, y2: floor }));
  for (const [place, text] of apart(xTicks.map(([value, text]) => [x(value), text]))) {
    plot.append(svg("text", { x: place, y: floor + 18, "text-anchor": "middle" }, text));
  }
  plot.append(svg("text", { x: (left + width - PADDING.right) / 2, y: height - 4, "text-anchor": "middle" }, xLabel),
    svg("text", { x: 13, y: (PADDING.top + floor) / 2, "text-anchor": "middle", transform: `rotate(-90 13 ${(PADDING.top + floor) / 2})` }, yLabel));
  return { ...layered(box, plot, width, height), x, y };
}

/** The ticks, [pixel, label], whose labels do not touch. */
function apart(ticks) {
  const kept = [];
  let free = -Infinity;
  for (const [place, text] of ticks) {
    const half = (text.length * LETTER) / 2;
    if (place - half < free) continue;
    kept.push([place, text]);
    free = place + half + 8;
  }
  return kept;
}

/** The `d` of a path through points written as "x,y"; none through no points. */
const through = (points) => (points.length ? `M${points.join("L")}` : null);

const tickText = (value) => (Math.abs(value) >= 1e4 ? compact(value) : String(Number(value.toPrecision(4))));

// ---- the tip
const tip = byId("tip");
function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 18 + height > innerHeight ? y - height - 12 : y + 18}px`;
}
const hideTip = () => { tip.hidden = true; };

/** Point at `run` while the pointer is on `element`. */
function pointable(element, run, text) {
  element.addEventListener("pointerenter", (event) => { setFocus(run.id); showTip(text, event.clientX, event.clientY); });
  element.addEventListener("pointerleave", () => { setFocus(null); hideTip(); });
}
