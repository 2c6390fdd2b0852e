"""The axes of a sweep as plain arithmetic: which keys can be one, and which combinations they span."""

from __future__ import annotations

from itertools import product
from typing import Any

from launcher.compose.checks import check_option, one_of
from launcher.compose.keys import CHANGES_NO_RESULT, COMPUTED, section_classes
from launcher.compose.overrides import run_keys
from launcher.compose.suggestions import nearest_key
from launcher.config import FolderConfig
from launcher.installation import Groups
from train.config import RunConfig
from train.errors import BadInput

MAX_RUNS = 10_000

RUN_GROUPS = tuple(RunConfig.model_fields)
Point = dict[str, Any]


def flatten(axes: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"lora": {"r": [8]}}``, as ``sweep.grid.lora.r=[8]`` makes it, is ``{"lora.r": [8]}``."""
    flat: dict[str, Any] = {}
    for key, values in axes.items():
        flat |= flatten(values, f"{prefix}{key}.") if isinstance(values, dict) else {f"{prefix}{key}": values}
    return flat


def span(grid: dict[str, list[Any]], paired: dict[str, list[Any]], groups: Groups) -> list[Point]:
    """Every combination of `grid`, the first axis slowest, each with every element of the `paired` lists.

    Raises:
        BadInput: an unknown or empty axis, paired lists of different length, or more than `MAX_RUNS` combinations.
    """
    for kind, axes in (("grid", grid), ("zip", paired)):
        for key, values in axes.items():
            _check_axis(f"sweep.{kind}", key, values, groups)
    _check_pairs(grid, paired)
    _check_size([*grid.values(), *list(paired.values())[:1]])
    pairs = [dict(zip(paired, values, strict=True)) for values in zip(*paired.values(), strict=True)] or [{}]
    return [dict(zip(grid, values, strict=True)) | pair for values in product(*grid.values()) for pair in pairs]


def _check_axis(where: str, key: str, values: list[Any], groups: Groups) -> None:
    """Refuse an axis that no result depends on, or that has no values."""
    valid = [*RUN_GROUPS, *(name for name in run_keys() if name not in CHANGES_NO_RESULT | COMPUTED)]
    if key.split(".")[0] in {*section_classes(), *FolderConfig.model_fields}.difference(RUN_GROUPS):
        raise BadInput(f"{key} takes one value; only what describes a run can be compared, as in lora.r=8,16.")
    if key not in valid:
        nearby = [name for name in valid if name.startswith(f"{key.split('.')[0]}.")] or valid
        why = "changes no result" if key in CHANGES_NO_RESULT | COMPUTED else "is not a key of a run"
        near = nearest_key(key)
        hint = f"; did you mean {near!r}?" if near in valid else "."
        raise BadInput(f"{where} has the axis {key!r}, which {why}{hint} {one_of(nearby)}")
    if not values:
        raise BadInput(f"{where} has no values for {key}; give at least one: {key}: [a, b].")
    if key in RUN_GROUPS:
        for option in values:
            check_option(key, option, groups)


def _check_pairs(grid: dict[str, list[Any]], paired: dict[str, list[Any]]) -> None:
    """Refuse paired lists of different length, and a key that is an axis twice."""
    lengths = {key: len(values) for key, values in paired.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise BadInput(f"sweep.zip pairs its lists element by element, but {listed} values; make them equally long.")
    twice = grid.keys() & paired.keys()
    if twice:
        raise BadInput(f"{min(twice)} is an axis of both sweep.grid and sweep.zip; leave it in one of them.")


def _check_size(lists: list[list[Any]]) -> None:
    """Refuse a sweep so large that it can only be a slip."""
    runs = 1
    for values in lists:
        runs *= len(values)
    if runs > MAX_RUNS:
        raise BadInput(
            f"the sweep's axes span {runs:,} runs; {MAX_RUNS:,} is the most. Take fewer values or fewer axes."
        )
