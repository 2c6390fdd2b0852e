// The page from top to bottom, and what redraws it.
function describe(best) {
  const over = best.eval_rows ? `of ${fixed(0)(best.eval_rows)} rows; ` : "";
  const figures = [
    ["Eval loss", fixed(4)(best.eval_loss), `base model ${fixed(4)(best.base_eval_loss)}`],
    ["Exact match", percent(best.eval_exact_match), `${over}base model ${percent(best.base_eval_exact_match)}`]];
  return [
    html("div", {}, html("div", { class: "eyebrow" }, "Best run"), html("div", { class: "winner" }, runLabel(best)),
      html("div", { class: "muted" }, seedsOf(best)), html("code", { class: "muted" }, `${best.name}-${best.id}`)),
    ...figures.map(([title, value, note]) => html("div", {}, html("div", { class: "eyebrow" }, title), html("div", { class: "figure" }, value), html("div", { class: "muted" }, note))),
  ];
}

/** What is known of the noise in the best run's loss: it may be the luckiest of its seeds. */
function seedsOf(run) {
  const group = doc.groups.find((one) => one.runs.includes(run.id));
  if (!group) return "";
  const count = group.runs.length;
  return count === 1 ? "one seed" : `the best of ${count} seeds, whose mean is ${fixed(4)(group.mean)} (95 % interval ± ${fixed(4)(group.half_width)})`;
}

function drawVerdict() {
  const marks = { larger: "✓", within: "≈", unknown: "?" };
  const { verdict, text, command } = doc.noise;
  const next = command ? html("div", { class: "next" }, html("span", { class: "muted" }, "To find out: "), html("code", {}, command)) : null;
  byId("verdict").replaceChildren(...(doc.rows.length ? describe(doc.rows[0]) : []),
    html("div", { class: `noise ${verdict}` }, html("span", { class: "mark", "aria-hidden": "true" }, marks[verdict]), html("span", {}, text),
      ...doc.caveats.map((sentence) => html("div", { class: "next" }, sentence)), next));
}

/** A pack's time counts once, however many runs shared it. */
function packSeconds() {
  const seconds = new Map();
  for (const row of doc.rows) seconds.set(row.pack ?? row.id, Math.max(row.seconds ?? 0, seconds.get(row.pack ?? row.id) ?? 0));
  return { packs: seconds.size, total: [...seconds.values()].reduce((sum, value) => sum + value, 0) };
}

function drawTiles() {
  const sum = (key) => doc.rows.reduce((total, row) => total + (row[key] ?? 0), 0);
  const peak = doc.rows.reduce((most, row) => Math.max(most, row.peak_memory_gib ?? 0), 0);
  const { packs, total } = packSeconds();
  const tiles = [
    [`${doc.rows.length} of ${runs.length}`, "runs finished"],
    [duration(total), packs === 1 ? "training, in one pack" : `training, in ${packs} packs`],
    [compact(sum("tokens")), "tokens trained"],
    [peak ? `${fixed(2)(peak)} GiB` : MISSING, "peak memory"],
    sum("gpu_hours") ? [fixed(2)(sum("gpu_hours")), "GPU-hours"] : null,
    sum("cost_usd") ? [dollars(sum("cost_usd")), "cost of the finished runs"] : null,
    doc.rows[0]?.device ? [doc.rows[0].device, [doc.rows[0].dtype ?? "device", doc.rows[0].path ? `path ${doc.rows[0].path}` : null].filter(Boolean).join(", ")] : null,
  ];
  byId("tiles").hidden = !doc.rows.length;
  byId("tiles").replaceChildren(...tiles.filter(Boolean).map(([value, note]) => html("div", { class: "tile" }, html("b", {}, value), html("span", { class: "muted" }, note))));
}

function drawCommand() {
  byId("command").hidden = !doc.commands.length;
  const lines = doc.commands.map((command) => {
    const code = html("code", {}, command);
    const copy = html("button", { type: "button", class: "quiet", onclick: () => copyText(code, copy) }, "Copy");
    return html("div", { class: "command" }, code, copy);
  });
  byId("command").replaceChildren(html("h2", {}, doc.commands.length > 1 ? "The commands that made it" : "The command that made it"), ...lines);
}

async function copyText(code, button) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
  } catch {  // a browser that forbids it still lets people copy a selection
    getSelection().selectAllChildren(code);
  }
}

function colorChoice() {
  const select = byId("color");
  select.append(...doc.axes.map((axis) => html("option", { value: axis.key }, axis.key)), html("option", { value: "" }, "run"));
  select.value = state.colorBy;
  select.addEventListener("change", () => { state.colorBy = select.value; redraw(); });
}

const MOST_KEYS = 6;  // of more values the first and the last
/** What the colors mean, beside the choice of what they mean. */
function drawKey() {
  const axis = axisByKey.get(state.colorBy);
  const all = axis ? axis.labels.map((text, index) => [text, shade(axis, index)]) : [];
  const shown = all.length > MOST_KEYS ? [all[0], ["…", "transparent"], all[all.length - 1]] : all;
  byId("key").replaceChildren(...shown.map(([text, color]) => html("span", {}, swatch(color), clipped(text))));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function later(action, wait) {
  let timer = 0;
  return () => { clearTimeout(timer); timer = setTimeout(action, wait); };
}

const preferred = matchMedia("(prefers-color-scheme: dark)");
setTheme(preferred.matches ? "dark" : "light");
preferred.addEventListener("change", () => { setTheme(preferred.matches ? "dark" : "light"); redraw(); });
byId("theme").addEventListener("click", () => { setTheme(isDark() ? "light" : "dark"); redraw(); });
byId("filter").addEventListener("input", later(applyFilter, 120));
// Only a new width changes the drawing: phones change the height while they scroll.
let drawnWidth = innerWidth;
addEventListener("resize", later(() => { if (innerWidth !== drawnWidth) { drawnWidth = innerWidth; redraw(); } }, 150));

byId("sweep").textContent = doc.sweep;
byId("subtitle").textContent = [`${runs.length} ${runs.length === 1 ? "run" : "runs"}`,
  doc.axes.length ? `over ${doc.axes.map((axis) => axis.key).join(", ")}` : ""].filter(Boolean).join(" ");
if (doc.axes.length) byId("filter").placeholder = `Filter: ${shortKey(doc.axes[0].key)}=${doc.axes[0].labels[0]}`;
colorChoice();
curveControls();
barControls();
answerControls();
drawVerdict();
drawTiles();
drawCommand();
listeners.draw.push(drawKey, drawAxes, drawCurves, drawLegend, drawParallel, drawTable, drawAnswers, drawBars);
listeners.focus.push(markCurves, markAxes, markParallel, markTable);
redraw();
