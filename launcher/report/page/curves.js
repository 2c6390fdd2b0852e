// Loss curves: training, evaluation or both; on and off per run; hover, and arrow keys for those without a mouse.
const CURVE_HEIGHT = 380;
const curveBox = byId("curve-plot");
// From a base model's loss down to a tuned one's, the logarithm keeps the end of the curves apart.
const WIDE_RANGE = 2.5;
const FEW_CURVES = 8;  // training curves of more runs are a carpet; their evaluations are not
const SMOOTH_FROM = 30;  // points of a training curve, whose batches make more noise than its runs differ
const CUT_ABOVE = 2;  // times the highest loss of a run with a result: what diverges would press all others into one line
const MOST_TICKS = 9;
const FEW_POINTS = 12;  // so many evaluations are marked, lest the line between two of them pass for measured
const curveView = { kind: firstKind(), smooth: true, logarithmic: isWide(doc.curves.runs.flatMap((curve) => curve.eval_losses)) };
let curveLines = [];  // what is drawn: {run, kind, steps, losses, note}
let curveFrame = null;
let cursor = null;  // {line, index} of the point that the arrow keys stand on

function firstKind() {
  const evaluatedOften = doc.curves.runs.some((curve) => curve.eval_losses.length > 2);
  return runs.length > FEW_CURVES && evaluatedOften ? "evaluation" : "both";
}

function isWide(losses) {
  const [low, high] = extent(losses, 0);
  return low > 0 && high / low > WIDE_RANGE;
}

function linesOf(curve) {
  const { grids } = doc.curves;
  const line = {
    training: () => ({ steps: grids[curve.grid], losses: smoothed(curve.losses), note: reachOf(curve.losses) ? " (smoothed)" : "" }),
    evaluation: () => ({ steps: grids[curve.eval_grid], losses: curve.eval_losses, note: "" }),
  };
  const kinds = curveView.kind === "both" ? ["training", "evaluation"] : [curveView.kind];
  return kinds.map((kind) => ({ kind, run: runById.get(curve.run), ...line[kind]() })).filter((drawn) => drawn.losses.length);
}

/** How many neighbours on either side a smoothed point is the mean of, at most. */
const reachOf = (losses) => (curveView.smooth && losses.length >= SMOOTH_FROM ? Math.round(losses.length / 20) : 0);

/** Means over as many neighbours on either side, so that a falling curve is not lifted; at the ends over fewer. */
function smoothed(losses) {
  const most = reachOf(losses);
  if (!most) return losses;
  return losses.map((_, index) => {
    const reach = Math.min(most, index, losses.length - 1 - index);
    const near = losses.slice(index - reach, index + reach + 1);
    return near.reduce((sum, loss) => sum + loss, 0) / near.length;
  });
}

function drawCurves() {
  curveLines = doc.curves.runs.filter(({ run }) => state.on.has(run) && state.passing.has(run)).flatMap(linesOf);
  cursor = null;
  const level = curveView.logarithmic ? Math.log10 : (value) => value;
  const losses = shownLosses().filter((loss) => loss > 0 || !curveView.logarithmic);
  const domain = extent(losses.map(level), 0.04);
  const steps = [0, curveLines.reduce((most, line) => Math.max(most, line.steps[line.steps.length - 1]), 1)];
  const { plot, marks, above, x, y } = frame(curveBox, {
    height: CURVE_HEIGHT, xDomain: steps, yDomain: domain, focusable: true, xLabel: "optimizer step", yLabel: "loss",
    label: `Loss over steps of ${new Set(curveLines.map((line) => line.run.id)).size} runs. Arrow keys left and right go along a curve, up and down to another run.`,
    yTicks: lossTicks(domain), xTicks: niceTicks(...steps, 8).map((step) => [step, tickText(step)]),
  });
  curveFrame = { plot, marks, above, x, y: (loss) => Math.max(PADDING.top, y(level(loss))) };
  marks.append(...curveLines.map(drawLine), ...curveLines.flatMap(drawEvaluations));
  markCurves();
}

/** The losses that the chart has room for: all of runs with a result, and of the others what is not far above them. */
function shownLosses() {
  const all = curveLines.flatMap((line) => line.losses);
  const ranked = curveLines.filter((line) => isRanked(line.run)).flatMap((line) => line.losses);
  const top = ranked.length ? CUT_ABOVE * extent(ranked, 0)[1] : Infinity;
  return all.filter((loss) => loss <= top);
}

/** Round losses; on the logarithmic scale the places are logarithms and the texts are losses. */
function lossTicks(domain) {
  if (!curveView.logarithmic) return niceTicks(...domain, 6).map((value) => [value, tickText(value)]);
  const [low, high] = domain.map((value) => 10 ** value);
  const first = Math.floor(domain[0]), count = Math.ceil(domain[1]) - first + 1;
  const decades = Array.from({ length: count }, (_, index) => first + index);
  const inside = (factors, every = 1) => decades.filter((decade) => decade % every === 0)
    .flatMap((decade) => factors.map((factor) => Number(`${factor}e${decade}`))).filter((loss) => loss >= low && loss <= high);
  const round = [inside([1, 1.5, 2, 3, 5, 7]), inside([1, 3]), inside([1]), inside([1], Math.ceil(count / MOST_TICKS))]
    .find((losses) => losses.length <= MOST_TICKS);
  return (round.length > 2 ? round : niceTicks(low, high, 5)).map((loss) => [Math.log10(loss), tickText(loss)]);
}

function drawLine(line) {
  const drawable = line.losses.map((loss, index) => [line.steps[index], loss]).filter(([, loss]) => loss > 0 || !curveView.logarithmic);
  const points = drawable.map(([step, loss]) => `${curveFrame.x(step).toFixed(1)},${curveFrame.y(loss).toFixed(1)}`);
  const names = ["run", "curve", line.kind, curveView.kind === "training" ? "alone" : "", isRanked(line.run) ? "" : "unfinished"];
  return svg("path", { class: names.filter(Boolean).join(" "), d: through(points), stroke: color(line.run), "data-run": line.run.id });
}

function drawEvaluations({ run, kind, steps, losses }) {
  if (kind !== "evaluation" || losses.length > FEW_POINTS || curveLines.length > MANY_CURVES) return [];
  return losses.flatMap((loss, index) => (loss > 0 || !curveView.logarithmic
    ? [svg("circle", { class: "point", cx: curveFrame.x(steps[index]), cy: curveFrame.y(loss), r: 3.5, fill: color(run), "data-run": run.id })] : []));
}

function markCurves() {
  lift(curveFrame);
  if (cursor) curveFrame.above.append(...drawCursor(cursor));
}

function drawCursor({ line, index }) {
  const [x, y] = [curveFrame.x(line.steps[index]), curveFrame.y(line.losses[index])];
  return [svg("line", { class: "cursor", x1: x, x2: x, y1: PADDING.top, y2: CURVE_HEIGHT - PADDING.bottom }),
    svg("circle", { cx: x, cy: y, r: 5, fill: color(line.run) })];
}

// ---- which point is meant
function nearestIndex(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle; else high = middle;
  }
  return step - steps[low] < steps[high] - step ? low : high;
}

function pointAt(x, y) {
  let best = null, bestDistance = 40;  // pixels
  const [from, to] = [curveFrame.x(0), curveFrame.x(1)];
  const step = (x - from) / (to - from);
  for (const line of curveLines) {
    const index = nearestIndex(line.steps, step);
    const distance = Math.hypot((curveFrame.x(line.steps[index]) - x) / 3, curveFrame.y(line.losses[index]) - y);
    if (distance < bestDistance) [best, bestDistance] = [{ line, index }, distance];
  }
  return best;
}

function standOn(point) {
  cursor = point;
  setFocus(point ? point.line.run.id : null);
  markCurves();
  if (!point) return hideTip();
  const { line, index } = point;
  const [x, y] = [curveFrame.x(line.steps[index]), curveFrame.y(line.losses[index])];
  const bounds = curveFrame.plot.getBoundingClientRect();
  const step = Number(line.steps[index].toFixed(1));
  showTip(`${runLabel(line.run)}\nstep ${step}: ${line.kind} loss ${fixed(4)(line.losses[index])}${line.note}`, bounds.left + x, bounds.top + y);
  return undefined;
}

function walk(event) {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (event.key === "Escape") return standOn(null);
  if (!(event.key in moves) || !curveLines.length) return undefined;
  event.preventDefault();
  const [sideways, along] = moves[event.key];
  if (!cursor) return standOn({ line: curveLines[0], index: 0 });
  const place = (curveLines.indexOf(cursor.line) + sideways + curveLines.length) % curveLines.length;
  const line = curveLines[place];
  const index = sideways ? nearestIndex(line.steps, cursor.line.steps[cursor.index]) : cursor.index + along;
  return standOn({ line, index: Math.max(0, Math.min(line.steps.length - 1, index)) });
}

curveBox.addEventListener("pointermove", (event) => {
  const bounds = curveFrame.plot.getBoundingClientRect();
  standOn(pointAt(event.clientX - bounds.left, event.clientY - bounds.top));
});
curveBox.addEventListener("pointerleave", () => standOn(null));
curveBox.addEventListener("keydown", walk);
curveBox.addEventListener("focusout", () => standOn(null));

// ---- legend and controls; of many runs it lists those that were on since the last choice of all, best or none
const inLegend = new Set();
function drawLegend() {
  const passing = runs.filter((run) => state.passing.has(run.id));
  for (const id of state.on) inLegend.add(id);
  const listed = runs.length > MANY_CURVES ? passing.filter((run) => inLegend.has(run.id)) : passing;
  byId("legend").replaceChildren(...listed.map((run) => {
    const button = html("button", { type: "button", "aria-pressed": String(state.on.has(run.id)), "data-run": run.id,
      onclick: () => { toggleRun(run); byId("legend").querySelector(`[data-run="${run.id}"]`)?.focus(); } }, swatch(color(run)), runLabel(run));
    button.addEventListener("pointerenter", () => setFocus(run.id));
    button.addEventListener("pointerleave", () => setFocus(null));
    return button;
  }));
  byId("curve-caption").textContent = [
    curveView.kind === "evaluation" ? "Loss on held-out rows." : trainingCaption(),
    curveView.kind === "both" ? "Thin: training; thick: evaluation on held-out rows." : "",
    doc.unfinished.length ? "Dashed: without a result." : "",
    shownLosses().length < curveLines.flatMap((line) => line.losses).length ? "Losses above the chart run along its top." : "",
    runs.length > MANY_CURVES ? `${state.on.size} of ${runs.length} runs are on; the boxes in the table switch more on.` : "",
  ].filter(Boolean).join(" ");
}

/** What a point of a training curve stands for. */
function trainingCaption() {
  const thinned = Math.max(1, ...doc.curves.runs.map((curve) => curve.steps_per_point));
  const reach = Math.max(0, ...doc.curves.runs.map((curve) => reachOf(curve.losses)));
  const steps = thinned * (2 * reach + 1);
  return steps > 1 ? `Each point of a training curve is the mean of ${reach ? "up to " : ""}${steps} steps.` : "Each point of a training curve is one optimizer step.";
}

function toggleRun(run) {
  if (!state.on.delete(run.id)) state.on.add(run.id);
  redraw();
}

function switchOn(chosen) {
  state.on = new Set(chosen.map((run) => run.id));
  inLegend.clear();
  redraw();
}

function curveControls() {
  const some = runs.length > MANY_CURVES;
  const smooths = doc.curves.runs.some((curve) => curve.losses.length >= SMOOTH_FROM);
  const smoothing = segments("Training curves", [[true, "Smooth"], [false, "Every step"]], curveView.smooth, (chosen) => { curveView.smooth = chosen; drawCurves(); drawLegend(); });
  const offer = () => { smoothing.hidden = !smooths || curveView.kind === "evaluation"; };
  offer();
  byId("curve-controls").append(
    segments("Which loss", [["both", "Both"], ["training", "Training"], ["evaluation", "Evaluation"]], curveView.kind, (kind) => { curveView.kind = kind; offer(); drawCurves(); drawLegend(); }),
    smoothing,
    segments("Loss axis", [[false, "Linear"], [true, "Log"]], curveView.logarithmic, (chosen) => { curveView.logarithmic = chosen; drawCurves(); }),
    html("div", { class: "segments", role: "group", "aria-label": "Curves" },
      html("button", { type: "button", onclick: () => switchOn(runs) }, "All"),
      some && firstAxis ? html("button", { type: "button", onclick: () => switchOn(bestOfEach()) }, `Best per ${shortKey(firstAxis.key)}`) : null,
      some ? html("button", { type: "button", onclick: () => switchOn(runs.slice(0, FIRST_CURVES)) }, `Best ${FIRST_CURVES}`) : null,
      html("button", { type: "button", onclick: () => switchOn([]) }, "None")));
}
