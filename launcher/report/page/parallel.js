// Parallel coordinates: a column per swept axis and measure, a line per finished run.
const PARALLEL_HEIGHT = 320;
const COLUMN_WIDTH = 130;  // pixels at least; on a phone the plot scrolls sideways
const MEASURES = [
  { key: "trainable_parameters", title: "trainable", text: compact },
  { key: "eval_exact_match", title: "exact match", text: percent },
  { key: "eval_loss", title: "eval loss", text: fixed(3), reversed: true },
];
let parallelFrame = null;

function columns() {
  const hyperparameters = doc.axes.filter((axis) => axis.key !== SEED);
  const swept = (hyperparameters.length ? hyperparameters : doc.axes).map((axis) => ({
    title: shortKey(axis.key),
    place: (run) => axis.positions[axis.labels.indexOf(valueLabel(run, axis.key))],
    ticks: axis.labels.map((text, index) => [axis.positions[index], text]),
  }));
  const measured = MEASURES.filter(({ key }) => differs(key) && doc.rows.every((row) => has(row[key])));
  return [...swept, ...measured.map(measureColumn)];
}

function measureColumn({ key, title, text, reversed }) {
  const domain = extent(doc.rows.map((row) => row[key]), 0);
  const ends = reversed ? [1, 0] : [0, 1];
  const place = scale(domain, ends);
  const ticks = domain.map((value) => [place(value), text(value)]);
  return { title, place: (run) => place(run[key]), ticks };
}

function drawParallel() {
  const all = columns();
  byId("parallel").hidden = doc.rows.length < 2 || all.length < 2;
  if (byId("parallel").hidden) return;
  const box = byId("parallel-plot");
  const width = Math.max(box.clientWidth, all.length * COLUMN_WIDTH);
  const x = (index) => 110 + (index * (width - 180)) / (all.length - 1);
  const y = scale([0, 1], [PARALLEL_HEIGHT - 24, 46]);
  const plot = svg("svg", { viewBox: `0 0 ${width} ${PARALLEL_HEIGHT}`, height: PARALLEL_HEIGHT, role: "img",
    "aria-label": `Parallel coordinates of ${doc.rows.length} runs over ${all.map((column) => column.title).join(", ")}; the table of runs has the same numbers.` });
  const passing = doc.rows.filter((row) => state.passing.has(row.id)).reverse();  // the best one is drawn last, on top
  const lines = passing.map((row) => {
    const points = all.map((column, index) => [x(index), y(column.place(row))]);
    const path = svg("path", { class: "run curve", d: smooth(points), stroke: color(row), "data-run": row.id });
    pointable(path, row, `${runLabel(row)}\neval loss ${fixed(4)(row.eval_loss)}, rank ${row.rank}`);
    return path;
  });
  parallelFrame = layered(box, plot, width, PARALLEL_HEIGHT);
  plot.parentElement.style.minWidth = `${width}px`;
  // texts come last, so that they stay readable on the lines
  parallelFrame.marks.append(...lines, ...all.flatMap((column, index) => drawColumn(column, x(index), y, index === all.length - 1)));
  markParallel();
}

function drawColumn(column, x, y, isLast) {
  const side = isLast ? 10 : -10;
  const texts = apart(column.ticks.map(([position, text]) => [y(position), ".."]).sort(([a], [b]) => a - b)).map(([place]) => place);
  const labels = column.ticks.filter(([position]) => texts.includes(y(position)));
  return [
    svg("line", { class: "axis", x1: x, x2: x, y1: y(0), y2: y(1) }),
    svg("text", { class: "name", x, y: 22, "text-anchor": "middle" }, column.title),
    ...labels.flatMap(([position, text]) => plate(clipped(text), x + side, y(position), isLast)),
  ];
}

/** A label that ends, or with `starts` begins, at x, on a plate that keeps the lines behind it from striking it through. */
function plate(text, x, y, starts) {
  const width = text.length * LETTER;
  return [svg("rect", { class: "plate", x: (starts ? x : x - width) - 4, y: y - 9, width: width + 8, height: 18, rx: 5 }),
    svg("text", { x, y: y + 4, "text-anchor": starts ? "start" : "end" }, text)];
}

const clipped = (text) => (text.length > 14 ? `${text.slice(0, 13)}…` : text);

/** A curve through `points` that leaves every column at a right angle, so that crossings can be followed. */
function smooth(points) {
  return points.reduce((path, [x, y], index) => {
    if (!index) return `M${x},${y}`;
    const [fromX, fromY] = points[index - 1];
    const middle = (fromX + x) / 2;
    return `${path}C${middle},${fromY.toFixed(1)} ${middle},${y.toFixed(1)} ${x},${y.toFixed(1)}`;
  }, "");
}

const markParallel = () => { if (parallelFrame) lift(parallelFrame); };
