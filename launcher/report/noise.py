"""How far the ranking can be trusted: the noise between seeds, and caveats of what was compared.

The lead of the best configuration over the second is a difference of two means, each over runs that differ only in their seed. Its
95 % interval is Welch's, for samples of unequal variance (Biometrika 34, 1947), with the degrees of freedom of
Welch and Satterthwaite (Biometrics Bulletin 2, 1946)::

    v = s^2 / n                                      of each configuration: standard deviation s, n seeds
    f = (v1 + v2)^2 / (v1^2 / (n1 - 1) + v2^2 / (n2 - 1))
    lead +- t(f) * sqrt(v1 + v2)

An example: eval losses 1.10, 1.12, 1.14 against 1.20, 1.23, 1.29. The means are 1.12 and 1.24, so the lead is 0.12. With
s1 = 0.0200, s2 = 0.0458, v1 = 0.000133 and v2 = 0.000700, f is 2.74. It is rounded down to 2 for t = 4.303, and the half width is
4.303 * sqrt(0.000833) = 0.1242. The interval, -0.0042 to 0.2442, includes zero: three seeds do not show that the lead is real.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections import Counter
from collections.abc import Sequence

from launcher.report.axes import SEED, axes_label
from launcher.report.comparison import Axis, FinishedRun, Group, LeadVerdict, Noise, UnfinishedRun
from train.config import DataConfig

# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom. Above 30 the normal distribution's 1.96 is within 4 %.
T_95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
T_95 += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]
NORMAL_95 = 1.96
SEEDS_TO_START = 3

# A loss is a mean over the tokens of the held-out answers. These keys decide which rows those are, or how they become tokens.
MEASURED_OVER = {f"data.{key}" for key in DataConfig.model_fields if key != "train_rows"}
MEASURED_OVER |= {"model.name", "model.source", "model.revision"}


def group_by_seed(rows: Sequence[FinishedRun]) -> tuple[Group, ...]:
    """Finished runs that differ only in their seed, as groups with mean and spread of their eval loss; the best mean first."""
    members: dict[str, list[FinishedRun]] = {}
    for row in rows:
        if row.eval_loss is not None:
            members.setdefault(json.dumps(_without_seed(row)), []).append(row)
    return tuple(sorted((_group(group) for group in members.values()), key=lambda group: group.mean))


def judge_noise(groups: Sequence[Group], *, sweep: str, commands: Sequence[str], seeds: Sequence[int]) -> Noise:
    """Whether the first of `groups` leads the second by more than the seeds' noise.

    The two are chosen by their means, after looking. That needs no further correction: comparing the best with the runner-up at the
    usual level verifies the rank (Hung and Fithian, "Rank verification for exponential families", Annals of Statistics 47, 2019).

    sweep, commands, seeds: for the command that would tell more.
    """
    more = more_seeds_command(sweep, commands, seeds)
    if not groups:
        return Noise(LeadVerdict.UNKNOWN, "No run has finished yet, so there is nothing to compare.")
    if len(groups) == 1:
        return Noise(LeadVerdict.UNKNOWN, _spread_text(groups[0]), command=None if len(groups[0].runs) > 1 else more)
    best, second = groups[0], groups[1]
    lead = second.mean - best.mean
    if best.deviation is None or second.deviation is None:
        return Noise(LeadVerdict.UNKNOWN, _one_seed_text(best, second, lead), lead, command=more)
    half_width = _welch_half_width(best, second)
    low, high = lead - half_width, lead + half_width
    text = _lead_text(best, second, low, high)
    if low > 0:
        return Noise(LeadVerdict.LARGER, text, lead, low, high)
    return Noise(LeadVerdict.WITHIN, text, lead, low, high, more)


def more_seeds_command(sweep: str, commands: Sequence[str], seeds: Sequence[int]) -> str:
    """The newest of `commands`, with twice the seeds and at least three, so that it extends this sweep."""
    first = min(seeds, default=0)
    wanted = max(SEEDS_TO_START, 2 * len(seeds)) if len(seeds) > 1 else SEEDS_TO_START
    values = sorted({*seeds, *range(first, first + wanted)})
    extra = [f"{SEED}={','.join(map(str, values))}", f"sweep.name={sweep}"]
    # A verb's command has words without "=" after ``python -m launcher``; only a sweep's own command can be extended.
    composed = [words for words in map(shlex.split, commands) if all("=" in word for word in words[3:])]
    if not composed:
        return f"python -m launcher … {shlex.join(extra)}"
    kept = [word for word in composed[-1] if not word.lstrip("+").startswith((f"{SEED}=", "sweep.name="))]
    return shlex.join([*kept, *extra])


def t_95(degrees_of_freedom: float) -> float:
    """The two-sided 95 % quantile of Student's t, rounded to the wide side between whole degrees of freedom."""
    whole = max(1, math.floor(degrees_of_freedom))
    return T_95[whole - 1] if whole <= len(T_95) else NORMAL_95


def caveats_of(
    axes: Sequence[Axis], rows: Sequence[FinishedRun], unfinished: Sequence[UnfinishedRun]
) -> tuple[str, ...]:
    """Sentences that limit the ranking of `rows`; none if nothing does."""
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


def _without_seed(row: FinishedRun) -> dict[str, object]:
    return {key: value for key, value in row.axes.items() if key != SEED}


def _group(rows: list[FinishedRun]) -> Group:
    """Mean, standard deviation and the mean's 95 % interval of one configuration's eval losses."""
    losses = [row.eval_loss for row in rows if row.eval_loss is not None]
    deviation = statistics.stdev(losses) if len(losses) > 1 else None
    half_width = None if deviation is None else t_95(len(losses) - 1) * deviation / math.sqrt(len(losses))
    axes = _without_seed(rows[0])
    return Group(axes, axes_label(axes), tuple(row.id for row in rows), statistics.fmean(losses), deviation, half_width)


def _welch_half_width(first: Group, second: Group) -> float:
    """Half the width of the 95 % interval of the difference of two means; the formula and an example are at the top."""
    terms = [((group.deviation or 0.0) ** 2 / len(group.runs), len(group.runs) - 1) for group in (first, second)]
    variance = sum(term for term, _ in terms)
    # Both configurations have the same loss with every seed.
    if variance == 0:
        return 0.0
    degrees_of_freedom = variance**2 / sum(term**2 / freedom for term, freedom in terms)
    return t_95(degrees_of_freedom) * math.sqrt(variance)


def _lead_text(best: Group, second: Group, low: float, high: float) -> str:
    """The comparison of two configurations with seeds, in words."""
    seeds = f"{len(best.runs)} and {len(second.runs)} seeds"
    means = (
        f"{best.label} has the lowest mean eval loss, {_plus_minus(best)}, before {second.label}, {_plus_minus(second)}"
    )
    interval = f"95 % interval of the lead over {seeds}: {low:.4f} to {high:.4f}"
    if low > 0:
        return f"{means}. The lead is larger than the noise between seeds ({interval})."
    return f"{means}. The lead is not larger than the noise between seeds ({interval}, which includes zero)."


def _one_seed_text(best: Group, second: Group, lead: float) -> str:
    """What can be said if a configuration has only one seed."""
    single = [group.label for group in (best, second) if group.deviation is None]
    seeds = "one seed per configuration" if len(single) == 2 else f"one seed of {single[0]}"
    return (
        f"{best.label} leads {second.label} by {lead:.4f} in eval loss. With {seeds} nobody can tell "
        "whether that is more than the noise between seeds."
    )


def _spread_text(group: Group) -> str:
    """What can be said of a single configuration."""
    if group.deviation is None:
        return "One run has finished; there is no other configuration to compare it with."
    return (
        f"One configuration with {len(group.runs)} seeds: eval loss {_plus_minus(group)}. "
        "A difference between two runs has to be clearly larger than this to mean anything."
    )


def _plus_minus(group: Group) -> str:
    return f"{group.mean:.4f} (s.d. {group.deviation or 0.0:.4f})"
