"""Command-line overrides in Hydra's grammar, checked before Hydra sees them, so that mistakes get this project's messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.errors import HydraException

from launcher.installation import Groups
from train.config import CONTROL_CHARACTER, RunConfig
from train.errors import BadInput

SECTIONS = ("model", "data", "lora", "quant", "train", "cluster", "sweep", "tracking")
TOP_KEYS = (*SECTIONS, "root", "cache")
# Their values are names, paths and such, whatever characters they have.
TEXT_KEYS = {"root", "cache", "sweep.name", "model.name", "model.source", "model.revision"} | {
    f"data.{key}" for key in ("name", "source", "eval_source", "revision", "split")
}
# A source of the user's own means the option without the held-out rows and the name of another.
OWN_OPTIONS = {"model": "own", "data": "file"}
LONGEST_QUOTE = 200  # characters of a wrong override that a message repeats


@dataclass
class Request:
    """What the command line asks for: `lines` for Hydra, and the axes that several values of one key make.

    `keys` are those with one value each, `given` all that have any.
    """

    lines: list[str] = field(default_factory=list)
    axes: dict[str, list[Any]] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    given: set[str] = field(default_factory=set)


def run_keys() -> list[str]:
    """Every key of a run's configuration in full, such as ``lora.r``."""
    return [
        f"{section}.{key}"
        for section, field in RunConfig.model_fields.items()
        if field.annotation is not None
        for key in field.annotation.model_fields
    ]


def read_overrides(overrides: list[str], groups: Groups) -> Request:
    """Check `overrides` and split them into Hydra's lines and axes.

    Raises:
        BadInput: no ``key=value``, an unknown key or an unknown option, with the valid ones.
    """
    request = Request()
    for text in overrides:
        override = _parse(text)
        _check_key(override)
        key = override.key_or_group
        if not override.is_delete():
            request.given.add(key)
        if override.is_sweep_override():
            request.axes[key] = _swept_values(override, groups)
        else:
            request.keys.add(key)
            request.lines.append(_hydra_line(override, groups))
    return request


def own_options(given: Set[str], request: Request, groups: Groups) -> list[str]:
    """Lines for Hydra that choose ``model=own`` and ``data=file`` where a source is among the `given` keys, but no option."""
    return [
        f"{group}={option}"
        for group, option in OWN_OPTIONS.items()
        if f"{group}.source" in given and group not in request.given and option in groups.get(group, [])
    ]


def check_option(group: str, option: Any, groups: Groups) -> str:
    """Return `option` if `group` has it.

    Raises:
        BadInput: it has not; the message names those it has.
    """
    if option not in groups[group]:
        raise BadInput(
            f"{group}={option} is no option{did_you_mean(str(option), groups[group])} {one_of(groups[group])}"
        )
    return str(option)


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """The end of a clause about a wrong `word`: the nearest of `valid` if there is one, else a full stop."""
    near = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else "."


def one_of(valid: Iterable[str]) -> str:
    """A sentence that lists what is allowed."""
    return f"Valid are {', '.join(valid)}."


def _parse(text: str) -> Override:
    """One override by Hydra's grammar."""
    if CONTROL_CHARACTER.search(text):
        raise BadInput(f"{text!r} has a control character or what is no UTF-8; remove it.")
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, RecursionError) as exc:
        quoted = _quoted(text)
        if quoted is not None:
            return OverridesParser.create().parse_override(quoted)
        detail = str(exc).splitlines()[0][:LONGEST_QUOTE] if "=" in text else "there is no '='"
        raise BadInput(
            f"{text[:LONGEST_QUOTE]!r} is no key=value: {detail}. Give lora.r=8, lora.r=8,16 or "
            "'lora.target_modules=[q_proj,v_proj]'; put quotes around brackets, braces and spaces."
        ) from exc
    is_number = isinstance(override.value(), int | float)  # true and false too
    quoted = _quoted(text) if is_number or _is_one_file(text.partition("=")[2]) else None
    return override if quoted is None else OverridesParser.create().parse_override(quoted)


def _quoted(text: str) -> str | None:
    """``key=value`` with quotes of Hydra's around the value, or around each of several, for a key whose values are text.

    Hydra's grammar wants them around ``=``, ``~``, umlauts and much else, and takes 2024 for a number and ``a,b.jsonl`` for two files.
    """
    key, equals, value = text.partition("=")
    if key.lstrip("+") not in TEXT_KEYS or not equals:
        return None
    values = [value] if _is_one_file(value) or set(value) & set("'\"") else value.split(",")
    return f"{key}={','.join(QuotedString(item, Quote.single).with_quotes() for item in values)}"


def _is_one_file(value: str) -> bool:
    """Whether a value with commas is the name of a file or folder, and no list of several values."""
    with suppress(OSError):  # longer than names may be
        return "," in value and Path(value).exists()
    return False


def _check_key(override: Override) -> None:
    """Refuse a key outside of the configuration tree; keys inside a section are checked with its values."""
    top = override.key_or_group.split(".")[0]
    if top not in TOP_KEYS or override.package is not None:
        in_full = [key for key in run_keys() if key.endswith(f".{top}")]
        hint = f"; did you mean {in_full[0]!r}?" if in_full else did_you_mean(top, TOP_KEYS)
        raise BadInput(f"unknown key {override.get_key_element()!r}{hint} {one_of(TOP_KEYS)}")


def _hydra_line(override: Override, groups: Groups) -> str:
    """The line for Hydra. Values are added by force: keys that only the typed classes know need no '+' from the user."""
    line = str(override.input_line).lstrip("+")
    if override.is_delete():
        return line
    if override.key_or_group in groups:
        check_option(override.key_or_group, override.value(), groups)
        return line
    return f"++{line}"


def _swept_values(override: Override, groups: Groups) -> list[Any]:
    """The values of ``key=a,b``, ``choice(…)``, ``range(…)``, or of ``glob(…)`` over a group's options."""
    key, value = override.key_or_group, override.value()
    if isinstance(value, Glob):
        return list(value.filter(groups.get(key, [])))
    if not override.is_discrete_sweep():
        raise BadInput(f"{override.input_line!r} has no finite list of values; list them: {key}=a,b,c.")
    parser = OverridesParser.create()
    return [parser.parse_override(f"{key}={text}").value() for text in override.sweep_string_iterator()]
