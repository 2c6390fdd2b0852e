// Sample answers: the same held-out prompts, answered by the base model and by one tuned run at a time.
const answered = runs.filter((run) => run.id in doc.answers.runs);
const answerView = { run: answered[0] ?? null };

function drawAnswers() {
  byId("answers").hidden = !answered.length;
  if (!answered.length) return;
  const { asked, step, answers } = doc.answers.runs[answerView.run.id];
  const lines = doc.answers.asked[asked].map((sample, index) => html("tr", {},
    html("th", { scope: "row", "data-label": "prompt" }, dense(sample.prompt)),
    html("td", { "data-label": "expected" }, sample.expected),
    answerCell("base model", sample.base, sample.expected),
    answerCell("tuned", answers[index], sample.expected)));
  const titles = ["prompt", "expected", "base model", runLabel(answerView.run)];
  byId("answer-table").replaceChildren(html("table", { class: "answers" },
    html("thead", {}, html("tr", {}, ...titles.map((title) => html("th", { scope: "col" }, title)))), html("tbody", {}, ...lines)));
  byId("answer-caption").textContent = `Greedy answers to held-out prompts, before training and after step ${step}. ✓: exactly what was expected; …: cut off.`;
}

/** Empty lines would only make the table long. */
const dense = (text) => text.replace(/\n\s*\n/g, "\n");

/** An answer, [text, whole]: marked where it is right, and where it was cut off. */
function answerCell(label, [text, whole], expected) {
  const right = whole && text === expected;
  return html("td", { "data-label": label, class: right ? "right" : null }, dense(text), whole ? "" : " …",
    right ? html("span", { class: "mark" }, " ✓") : null);
}

function answerControls() {
  const select = byId("answer-run");
  select.append(...answered.map((run) => html("option", { value: run.id }, isRanked(run) ? `${run.rank}. ${runLabel(run)}` : runLabel(run))));
  select.addEventListener("change", () => { answerView.run = runById.get(select.value); drawAnswers(); });
}
