"""`Report` -> one HTML file with style, script and data inside. Its policy forbids every request.

What the page shows comes from `page_document`; how it looks is in ``page/``, a script per part of the page.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.report.axes import axes_label, axis_charts, value_label
from launcher.report.comparison import Answers, Curve, Report, Sample, report_json

PAGE_DIR = Path(__file__).parent / "page"
# Each uses only earlier ones; together they are one script.
SCRIPTS = ("core.js", "chart.js", "curves.js", "axes.js", "parallel.js", "bars.js", "table.js", "answers.js", "main.js")


def render_page(report: Report) -> str:
    """The whole page. Its Content-Security-Policy allows only its own script and style, by their hashes."""
    style = (PAGE_DIR / "page.css").read_text("utf-8")
    script = (
        "(() => {\n'use strict';\n" + "\n".join((PAGE_DIR / name).read_text("utf-8") for name in SCRIPTS) + "})();\n"
    )
    parts = {
        "policy": _policy(script, style),
        "title": html.escape(report.sweep),
        "style": style,
        "data": embedded_json(page_document(report)),
        "script": script,
    }
    page = (PAGE_DIR / "page.html").read_text("utf-8")
    for name, text in parts.items():
        before, _, after = page.partition(f"<!--{name}-->")
        page = before + text + after
    return page


def page_document(report: Report) -> dict[str, Any]:
    """Everything that the page shows: what `launcher report --json` prints, with curves, charts and answers."""
    return report_json(report) | {
        "axes": [asdict(axis) for axis in report.axes],
        "labels": {run.id: _labels(run.axes) for run in report.runs},
        "charts": [asdict(chart) | {"axis": chart.axis.key} for chart in axis_charts(report)],
        "curves": _packed_curves(report.curves),
        "answers": _packed_answers(report.answers),
    }


def embedded_json(document: Any) -> str:
    """`document` as JSON that cannot end its script element: ``<`` is written as an escape, NaN is refused."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _labels(axes: dict[str, Any]) -> dict[str, Any]:
    """A run's axes in one line, and each value as people write it."""
    return {"run": axes_label(axes), "axes": {key: value_label(value) for key, value in axes.items()}}


def _packed_curves(curves: tuple[Curve, ...]) -> dict[str, Any]:
    """The curves with five significant digits. Step numbers are mostly the same for all runs, so `grids` keeps each list once."""
    grids: dict[tuple[float, ...], int] = {}
    runs = [
        {
            "run": curve.run,
            "grid": grids.setdefault(curve.steps, len(grids)),
            "losses": [_five_digits(loss) for loss in curve.losses],
            "eval_grid": grids.setdefault(curve.eval_steps, len(grids)),
            "eval_losses": [_five_digits(loss) for loss in curve.eval_losses],
            "steps_per_point": curve.steps_per_point,
        }
        for curve in curves
    ]
    return {"grids": list(grids), "runs": runs}


def _packed_answers(answers: tuple[Answers, ...]) -> dict[str, Any]:
    """Answers as [text, whole]. Prompts and the base's answers are mostly the same for all runs, so `asked` keeps them once."""
    asked: dict[tuple[Sample, ...], int] = {}
    runs = {
        own.run: {
            "asked": asked.setdefault(own.base, len(asked)),
            "step": own.step,
            "answers": [[sample.answer, sample.whole] for sample in own.tuned],
        }
        for own in answers
    }
    prompts = [
        [{"prompt": s.prompt, "expected": s.expected, "base": [s.answer, s.whole]} for s in one] for one in asked
    ]
    return {"asked": prompts, "runs": runs}


def _five_digits(value: float) -> float:
    return float(f"{value:.5g}")


def _policy(script: str, style: str) -> str:
    """The policy that lets a browser use this script and this style, and fetch nothing."""
    rules = ("default-src 'none'", f"script-src '{_sha256(script)}'", f"style-src '{_sha256(style)}'", "img-src data:")
    return "; ".join((*rules, "base-uri 'none'", "form-action 'none'"))


def _sha256(text: str) -> str:
    """The source expression of an inline element with this content (W3C Content Security Policy, level 2)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
