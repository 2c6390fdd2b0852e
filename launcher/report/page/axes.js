// Final evaluation loss against each swept axis: runs as points, the best configuration at each value as a line.
const AXIS_HEIGHT = 280;
let axisFrames = [];

function drawAxes() {
  const box = byId("axes");
  const charts = doc.charts.filter((chart) => chart.points.length);
  box.hidden = !charts.length;
  box.replaceChildren(...charts.map((chart) => {
    const withSeeds = chart.best.some((best) => has(best.half_width));
    return html("div", { class: "card" }, html("div", { class: "head" }, html("h2", {}, `Eval loss by ${chart.axis}`)),
      html("div", { class: "plot" }), html("p", { class: "caption" }, axisCaption(chart, withSeeds)));
  }));
  axisFrames = charts.map((chart, index) => drawAxis(box.children[index].querySelector(".plot"), chart));
  markAxes();
}

function axisCaption(chart, withSeeds) {
  if (!chart.best.length) return "Points are runs that differ in their seed alone: their spread is the noise.";
  const others = doc.axes.filter((axis) => axis.key !== SEED).length > 1;
  const line = others ? "the best configuration at each value" : "the value's loss";
  const single = chart.best.every((best) => has(best.half_width)) ? "" : " Without an interval: one seed, so its noise is not known.";
  return withSeeds
    ? `Points are runs. The line joins ${line}: mean over its seeds, with the mean's 95 % interval.${single}`
    : `Points are runs. The line joins ${line}; one seed each, so the noise is not known.`;
}

function drawAxis(box, chart) {
  const points = chart.points.filter(([run]) => state.passing.has(run));
  const ends = chart.best.flatMap((best) => [best.mean - (best.half_width ?? 0), best.mean + (best.half_width ?? 0)]);
  const domain = extent([...chart.points.map(([, , loss]) => loss), ...ends], 0.1);
  const drawn = frame(box, {
    height: AXIS_HEIGHT, xDomain: [0, 1], yDomain: domain, air: 28, xLabel: chart.axis, yLabel: "final eval loss",
    label: `Final eval loss by ${chart.axis}. ${chart.best.map((best) => `${best.value}: ${fixed(4)(best.mean)}`).join(", ")}.`,
    yTicks: niceTicks(...domain, 5).map((value) => [value, tickText(value)]),
    xTicks: chart.ticks,
  });
  const { plot, marks, x, y } = drawn;
  const isWords = axisByKey.get(chart.axis).scale === "category";
  const line = chart.best.map((best) => `${x(best.position).toFixed(1)},${y(best.mean).toFixed(1)}`);
  plot.append(svg("path", { class: isWords ? "best-line words" : "best-line", d: through(line) }));
  for (const best of chart.best) plot.append(svg("circle", { class: "best-dot", cx: x(best.position), cy: y(best.mean), r: 6.5 }));
  marks.append(...points.map(([id, position, loss]) => drawPoint(runById.get(id), x(position), y(loss), loss)));
  marks.append(...chart.best.flatMap((best) => drawInterval(best, x(best.position), y)));
  return drawn;
}

function drawInterval(best, x, y) {
  if (!has(best.half_width)) return [];
  const [top, bottom] = [y(best.mean + best.half_width), y(best.mean - best.half_width)];
  const strokes = [[x, x, top, bottom], [x - 7, x + 7, top, top], [x - 7, x + 7, bottom, bottom]];
  return strokes.map(([x1, x2, y1, y2]) => svg("line", { class: "interval", x1, x2, y1, y2 }));
}

function drawPoint(run, cx, cy, loss) {
  const point = svg("circle", { class: "point", cx, cy, r: 4.5, fill: color(run), "data-run": run.id });
  pointable(point, run, `${runLabel(run)}\neval loss ${fixed(4)(loss)}, rank ${run.rank}`);
  return point;
}

const markAxes = () => axisFrames.forEach(lift);
