"""What a comparison leaves out, and what does not compare: said beside the ranking, since a ranking looks surer than it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from launcher.report.comparison import Axis, Row, Unfinished
from train.config import DataConfig

# A loss is a mean over the tokens of the held-out answers. These keys decide which rows those are, or how they are cut in tokens.
MEASURED_OVER = {f"data.{key}" for key in DataConfig.model_fields if key != "train_rows"}
MEASURED_OVER |= {"model.name", "model.source", "model.revision"}


def caveats_of(axes: Sequence[Axis], rows: Sequence[Row], unfinished: Sequence[Unfinished]) -> tuple[str, ...]:
    """Sentences for whoever reads the ranking of `rows`; none where it says all there is."""
    sentences = []
    if rows and unfinished:
        counts = Counter(run.state for run in unfinished)
        states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        total = len(rows) + len(unfinished)
        have, are = ("has", "is") if len(unfinished) == 1 else ("have", "are")
        sentences.append(f"{len(unfinished)} of {total} runs {have} no result and {are} not compared: {states}.")
    unlike = [axis.key for axis in axes if axis.key in MEASURED_OVER]
    if unlike:
        which = ", ".join(unlike)
        sentences.append(
            f"Losses compare only between runs of the same {which}: it decides over which tokens they are taken."
        )
    return tuple(sentences)
