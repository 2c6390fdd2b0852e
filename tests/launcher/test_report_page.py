import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launcher.report.html_page import PAGE_DIR, SCRIPTS, embedded_json, page_document, render_page
from launcher.report.writer import build_report, report_json
from synthetic_sweeps import QUESTIONS, SyntheticSweep


class Page(HTMLParser):
    """The elements of a page as a browser's parser sees them, with the text of each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        # An element without children so far.
        self.inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        self.inside = True

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (attributes, text)
            for (name, attributes), text in zip(self.elements, self.texts, strict=True)
            if name == tag
        ]

    def data(self):
        (text,) = [text for attributes, text in self.all("script") if attributes.get("type") == "application/json"]
        return json.loads(text)


@pytest.fixture
def sweep(tmp_path: Path) -> SyntheticSweep:
    sweep = SyntheticSweep(tmp_path / "wide").grid({"lora.r": [4, 8], "train.seed": [0, 1]})
    sweep.add({"lora.r": 16}, finished=False)
    return sweep.accept("python -m launcher sweep=rank train.seed=0,1")


def test_the_embedded_data_is_the_report(sweep: SyntheticSweep):
    report = build_report(sweep.dir)
    data = Page(render_page(report)).data()
    assert data == json.loads(json.dumps(page_document(report)))
    expected = json.loads(json.dumps(report_json(report)))
    for key in ("sweep", "commands", "best", "noise", "caveats", "rows", "groups", "unfinished"):
        assert data[key] == expected[key]
    assert [axis["key"] for axis in data["axes"]] == expected["axes"]


def test_curves_and_charts_belong_to_runs_of_the_report(sweep: SyntheticSweep):
    report = build_report(sweep.dir)
    data = Page(render_page(report)).data()
    ids = {run.id for run in report.runs}
    assert {curve["run"] for curve in data["curves"]["runs"]} == ids == data["labels"].keys()
    for curve in data["curves"]["runs"]:
        assert len(data["curves"]["grids"][curve["grid"]]) == len(curve["losses"])
        assert len(data["curves"]["grids"][curve["eval_grid"]]) == len(curve["eval_losses"])
    (chart,) = data["charts"]
    assert chart["axis"] == "lora.r"
    assert {run for run, _, _ in chart["points"]} == {row.id for row in report.rows}
    assert [best["value"] for best in chart["best"]] == ["4", "8"]
    assert all(best["half_width"] > 0 for best in chart["best"])


def test_answers_share_their_prompts_and_belong_to_their_runs(sweep: SyntheticSweep):
    report = build_report(sweep.dir)
    data = Page(render_page(report)).data()["answers"]
    assert data["runs"].keys() == {run.id for run in report.runs}
    (asked,) = data["asked"]
    assert [sample["prompt"] for sample in asked] == [question for question, _, _ in QUESTIONS]
    assert [sample["base"] for sample in asked] == [[answer, i > 0] for i, (_, _, answer) in enumerate(QUESTIONS)]
    tuned = data["runs"][report.rows[0].id]
    assert (tuned["step"], len(tuned["answers"])) == (60, len(QUESTIONS))
    assert ["3", True] in tuned["answers"]


def test_runs_without_samples_make_a_report_too(sweep: SyntheticSweep):
    for run in sweep.dir.runs():
        run.samples.unlink()
    assert Page(render_page(build_report(sweep.dir))).data()["answers"] == {"asked": [], "runs": {}}


def test_the_page_names_no_address_and_loads_nothing(sweep: SyntheticSweep):
    text = render_page(build_report(sweep.dir))
    assert not re.search(r"https?:|//[a-z0-9.-]+\.[a-z]{2,}/|\burl\(|@import|\bfetch\(|XMLHttpRequest|\bimport\(", text)
    page = Page(text)
    loading = [attributes for _, attributes in page.elements if {"src", "srcset", "href", "action"} & attributes.keys()]
    assert [attributes["href"] for attributes in loading] == ["data:,", "#runs"]


def test_the_policy_allows_exactly_the_pages_own_script_and_style(sweep: SyntheticSweep):
    page = Page(render_page(build_report(sweep.dir)))
    (policy,) = [
        attributes["content"] for attributes, _ in page.all("meta") if "Content-Security-Policy" in attributes.values()
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    ((_, script),) = [item for item in page.all("script") if "type" not in item[0]]
    ((_, style),) = page.all("style")
    for name, text in (("script-src", script), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    assert not [
        attributes for _, attributes in page.elements if any(key.startswith(("on", "style")) for key in attributes)
    ]


@pytest.mark.parametrize(
    "hostile", ["</script><script>alert(1)</script>", "<!--data-->", "<!--<script>", '"><img src=x>']
)
def test_nothing_that_a_user_names_can_break_out_of_the_data(tmp_path: Path, hostile: str):
    sweep = SyntheticSweep(tmp_path / "sweep")
    sweep.add({"data.name": hostile, "data.fingerprint": "f8"}, name="a")
    sweep.add({"data.name": "plain"}, name="b")
    sweep.accept(f"python -m launcher 'data.name={hostile}'")
    harmless = Page(render_page(build_report(SyntheticSweep(tmp_path / "other").grid({"lora.r": [1, 2]}).dir)))
    page = Page(render_page(build_report(sweep.dir)))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in harmless.elements]
    (embedded,) = [text for attributes, text in page.all("script") if "type" in attributes]
    assert not set(embedded) & set("<>&")
    assert page.data()["commands"] == [f"python -m launcher 'data.name={hostile}'"]
    assert hostile in [row["axes"]["data.name"] for row in page.data()["rows"]]


def test_a_hostile_sweep_name_stays_text(tmp_path: Path):
    sweep = SyntheticSweep(tmp_path / "<img src=x onerror=alert(1)>").grid({"lora.r": [1, 2]})
    page = Page(render_page(build_report(sweep.dir)))
    assert not page.all("img")
    assert page.data()["sweep"] == "<img src=x onerror=alert(1)>"


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        embedded_json({"loss": float("nan")})


def test_every_element_that_the_scripts_look_up_exists(sweep: SyntheticSweep):
    ids = {
        attributes["id"] for _, attributes in Page(render_page(build_report(sweep.dir))).elements if "id" in attributes
    }
    looked_up = {
        name for script in SCRIPTS for name in re.findall(r'byId\("([^"]+)"\)', (PAGE_DIR / script).read_text("utf-8"))
    }
    assert looked_up <= ids
    assert {path.name for path in PAGE_DIR.glob("*.js")} == set(SCRIPTS)
