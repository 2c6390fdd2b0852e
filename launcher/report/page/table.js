// The table of runs: sorts by any column, filters by words, switches curves on and off.
const FREE_AT_ZERO = new Set(["gpu_hours", "cost_usd"]);  // on a CPU; any other zero was measured
const COLUMNS = [
  { key: "rank", title: "#", text: String, ascending: true },
  { key: "name", title: "run", ascending: true },
  ...doc.axes.map((axis) => ({ key: axis.key, title: axis.key, axis, ascending: true })),
  { key: "eval_loss", title: "eval loss", text: fixed(4), ascending: true, top: Math.min },
  { key: "base_eval_loss", title: "base loss", text: fixed(4), ascending: true, onlyIfDiffers: true },
  { key: "best_eval_loss", title: "best eval loss", text: fixed(4), ascending: true, top: Math.min, unlike: "eval_loss" },
  { key: "eval_exact_match", title: "exact match", text: percent, top: Math.max },
  { key: "base_eval_exact_match", title: "base match", text: percent, onlyIfDiffers: true },
  { key: "train_loss", title: "train loss", text: fixed(4), ascending: true },
  { key: "tokens_per_second", title: "tokens/s", text: fixed(0), top: Math.max },
  { key: "seconds", title: "time", text: duration, ascending: true },
  { key: "gpu_hours", title: "GPU-hours", text: fixed(3), ascending: true },
  { key: "cost_usd", title: "cost", text: dollars, ascending: true },
  { key: "peak_memory_gib", title: "peak GiB", text: fixed(2), ascending: true },
  { key: "trainable_parameters", title: "trainable", text: fixed(0), ascending: true },
  { key: "adapter_mb", title: "adapter MB", text: fixed(1), ascending: true },
  { key: "attempts", title: "attempts", text: fixed(0), ascending: true, onlyIfDiffers: true },
].filter(tellsSomething);
const tableView = { column: COLUMNS[0], ascending: true };
let tableRows = [];

/** Whether a column has something to say: a value somewhere, or one that is not the same for all, or not another column's. */
function tellsSomething({ key, axis, onlyIfDiffers, unlike }) {
  if (axis || key === "name") return true;
  if (unlike) return doc.rows.some((row) => row[key] !== row[unlike]);
  return onlyIfDiffers ? differs(key) : doc.rows.some((row) => (FREE_AT_ZERO.has(key) ? row[key] : has(row[key])));
}

const sortValue = (row, { key, axis }) => (axis ? axis.labels.indexOf(valueLabel(row, key)) : row[key]);

/** Rows in the chosen order; what was not measured comes last either way, equal ones by rank. */
function sortedRows() {
  const { column, ascending } = tableView;
  const order = (a, b) => {
    const [left, right] = [sortValue(a, column), sortValue(b, column)];
    if (has(left) !== has(right)) return has(left) ? -1 : 1;
    const compared = !has(left) ? 0 : typeof left === "string" ? left.localeCompare(right, "en", { numeric: true }) : left - right;
    return (ascending ? compared : -compared) || a.rank - b.rank;
  };
  return doc.rows.filter((row) => state.passing.has(row.id)).sort(order);
}

function drawTable() {
  byId("runs").hidden = !runs.length;
  const tops = new Map(COLUMNS.filter((column) => column.top && differs(column.key)).map(({ key, top }) =>
    [key, doc.rows.map((row) => row[key]).filter(has).reduce((best, value) => top(best, value))]));
  tableRows = sortedRows().map((row) => {
    const line = html("tr", { class: row.rank === 1 ? "best" : null, "data-run": row.id }, ...COLUMNS.map((column) => cell(row, column, tops)));
    line.addEventListener("pointerenter", () => setFocus(row.id));
    line.addEventListener("pointerleave", () => setFocus(null));
    return line;
  });
  const head = html("thead", {}, html("tr", {}, ...COLUMNS.map(headCell)));
  byId("table").replaceChildren(doc.rows.length ? html("table", {}, head, html("tbody", {}, ...tableRows)) : html("p", { class: "muted" }, "No run has finished yet."));
  drawUnfinished();
  const count = state.passing.size;
  byId("matching").textContent = count === runs.length ? `${count} runs` : `${count} of ${runs.length} runs`;
}

function headCell(column) {
  const sorted = column === tableView.column;
  const direction = sorted ? (tableView.ascending ? "ascending" : "descending") : null;
  return html("th", { scope: "col", "aria-sort": direction, class: column.key === "name" ? "run-cell" : null },
    html("button", { type: "button", "data-column": column.key, onclick: () => sortBy(column) }, column.title));
}

function sortBy(column) {
  tableView.ascending = column === tableView.column ? !tableView.ascending : Boolean(column.ascending);
  tableView.column = column;
  drawTable();
  [...byId("table").querySelectorAll("th button")].find((button) => button.dataset.column === column.key).focus();
}

function cell(row, column, tops) {
  if (column.key === "name") return nameCell(row, row.rank === 1 ? html("b", {}, `★ ${row.name}`) : html("span", { class: "name" }, row.name));
  if (column.axis) return html("td", {}, valueLabel(row, column.key));
  const top = column.top && has(row[column.key]) && row[column.key] === tops.get(column.key);
  return html("td", { class: top ? "top" : null }, has(row[column.key]) ? column.text(row[column.key]) : MISSING);
}

function nameCell(run, name) {
  const box = html("input", { type: "checkbox", "aria-label": `Show the curve of ${run.name}`, onchange: () => switchCurve(run, box) });
  box.checked = state.on.has(run.id);
  name.title = `${run.name}-${run.id}`;
  return html("td", { class: "run-cell" }, html("label", {}, box, swatch(color(run)), name));
}

/** Only the curves change: the table stays, and the box keeps the focus. */
function switchCurve(run, box) {
  if (box.checked) state.on.add(run.id); else state.on.delete(run.id);
  drawCurves();
  drawLegend();
}

function drawUnfinished() {
  const listed = doc.unfinished.filter((run) => state.passing.has(run.id));
  const lines = listed.map((run) => html("tr", { "data-run": run.id }, nameCell(run, html("span", { class: "name" }, run.name)),
    html("td", {}, html("span", { class: "state" }, run.state)), html("td", { class: "step" }, String(run.step)), html("td", { class: "words" }, run.reason)));
  const titles = ["run", "state", "step", "reason"].map((title, index) => html("th", { scope: "col", class: ["run-cell", null, null, "words"][index] }, title));
  byId("unfinished").replaceChildren(...(listed.length ? [html("h3", {}, "Without a result, not ranked"),
    html("div", { class: "scroll" }, html("table", {}, html("thead", {}, html("tr", {}, ...titles)), html("tbody", {}, ...lines)))] : []));
}

// ---- filter: every word has to be in the run's name, state or key=value
const haystacks = new Map(runs.map((run) => [run.id,
  [run.name, run.id, run.state ?? "done", ...doc.axes.flatMap(({ key }) => [`${key}=${valueLabel(run, key)} `, `${shortKey(key)}=${valueLabel(run, key)} `])]
    .join(" ").toLowerCase()]));

function applyFilter() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  // "r=1" means rank 1, not 16: a word with '=' has to end where the value ends, and to start where the key does
  const matches = (text, word) => (word.includes("=") ? ` ${text}`.includes(` ${word} `) : text.includes(word));
  state.passing = new Set(runs.filter((run) => words.every((word) => matches(haystacks.get(run.id), word))).map((run) => run.id));
  redraw();
}

const markTable = () => { for (const line of tableRows) line.classList.toggle("focus", line.dataset.run === state.focus); };
