"""Markdown of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import log2
from statistics import mean

from bench.measuring import Measured

# Packing pays while doubling the runs makes a pack at least this much faster.
PAYS = 1.15
HEADER = (
    "what",
    "setting",
    "tokens/step",
    "ms/step",
    "tok/s",
    "of the ceiling",
    "peak GiB",
    "forecast",
    "reserved GiB",
    "note",
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed_table(measured: Sequence[Measured], flop_parameters: int, ceiling_flops: float) -> str:
    """A line per result. An adapter over a frozen base takes 4 FLOP per token and weight, not counting recomputation.

    Forward and backward take 2 each; the 2 for the gradients of frozen weights are not needed.
    """
    return markdown(HEADER, [_line(m, 4 * flop_parameters / ceiling_flops) for m in measured])


def _line(m: Measured, share_per_token: float) -> list[str]:
    if m.error is not None:
        return [m.who, m.setting.label, m.error, *[""] * 7]
    return [
        m.who,
        m.setting.label,
        f"{m.tokens_per_step:,.0f}",
        f"{m.ms_per_step:,.0f}{_error(m.forecast_ms, m.time_error)}",
        f"{m.tokens_per_second:,.0f}",
        f"{m.tokens_per_second * share_per_token:.2f}",
        f"{m.peak_allocated_gib:.1f}",
        f"{m.forecast_gib:.1f}{_error(m.forecast_gib, m.memory_error)}" if m.forecast_gib else "",
        f"{m.peak_reserved_gib:.1f}",
        m.note,
    ]


def _error(forecast: float, error: float) -> str:
    """How far a forecast is off, where there is one: ``(+3 %)``."""
    return f" ({100 * error:+.0f} %)" if forecast else ""


def together(parts: Sequence[Measured], processes: int) -> Measured:
    """One line for processes that trained at the same time: speeds and memory add up, the step's time is the slowest's."""
    failed = [part for part in parts if part.error is not None]
    if failed or len(parts) < processes:
        return replace(parts[0], error=failed[0].error if failed else f"only {len(parts)} of {processes} reported")
    return replace(
        parts[0],
        ms_per_step=max(part.ms_per_step for part in parts),
        tokens_per_step=sum(part.tokens_per_step for part in parts),
        tokens_per_second=sum(part.tokens_per_second for part in parts),
        peak_allocated_gib=sum(part.peak_allocated_gib for part in parts),
        peak_reserved_gib=sum(part.peak_reserved_gib for part in parts),
    )


def where_packing_stops(measured: Sequence[Measured]) -> str:
    """From which size of a step more runs in a pack bring little, by results with the same batch and different numbers of runs."""
    good = sorted((m for m in measured if m.error is None), key=lambda m: m.setting.runs)
    for fewer, more in pairwise(good):
        gain = more.tokens_per_second / fewer.tokens_per_second
        # From 4 to 16 runs are two doublings, so a gain of 1.44 is 1.2 for each.
        doublings = log2(more.setting.runs / fewer.setting.runs)
        if gain ** (1 / doublings) < PAYS:
            return (
                f"Packing stops paying at about {fewer.tokens_per_step:,.0f} tokens a step ({fewer.setting.runs} runs): "
                f"{more.setting.runs} runs bring {100 * (gain - 1):+.0f} % tok/s."
            )
    return (
        f"Packing pays up to the largest pack measured ({good[-1].setting.runs} runs)."
        if good
        else "Nothing was measured."
    )


def ratios(measured: Sequence[Measured], ours: Sequence[Measured]) -> str:
    """How many times faster than each peer lorapack is; `ours` are repeated measurements of one setting, of which the mean counts."""
    good = [m for m in ours if m.error is None]
    peers = [m for m in measured if m.error is None and not m.who.startswith("lorapack")]
    if not good or not peers:
        return ""
    speed = mean(m.tokens_per_second for m in good)
    lines = [f"- {speed / m.tokens_per_second:.2f} times {m.who}, {m.setting.label}" for m in peers]
    return "\n".join([f"lorapack {good[0].setting.label} ({speed:,.0f} tok/s) is as fast as:", *lines])
