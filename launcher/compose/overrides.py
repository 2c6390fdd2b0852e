"""Command-line overrides in Hydra's grammar, checked before Hydra sees them, so that mistakes get this project's messages."""

from __future__ import annotations

from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from launcher.compose.checks import (
    LONGEST_QUOTE,
    check_axis_values,
    check_key,
    check_option,
    check_value,
    refuse_split_words,
)
from launcher.compose.foreign_words import SETTINGS_FILE
from launcher.compose.suggestions import in_hydras_quotes, is_text
from launcher.installation import Groups
from train.config import RunConfig
from train.errors import BadInput
from train.section import CONTROL_CHARACTER

# A source of the user's own means the option without the held-out rows and the name of another.
OWN_OPTIONS = {"model": "own", "data": "file"}


@dataclass
class ParsedOverrides:
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


def read_overrides(overrides: list[str], groups: Groups) -> ParsedOverrides:
    """Check `overrides` and split them into Hydra's lines and axes.

    Raises:
        BadInput: no ``key=value``, an unknown key or an unknown option, with the valid ones.
    """
    refuse_split_words(overrides)
    parsed = ParsedOverrides()
    for text in overrides:
        _refuse_bare_option(text, groups)
        override = _parse(text)
        check_key(override, groups)
        key = override.key_or_group
        if not override.is_delete():
            parsed.given.add(key)
        if override.is_sweep_override():
            parsed.axes[key] = _swept_values(override, groups)
            check_axis_values(key, parsed.axes[key])
        else:
            parsed.keys.add(key)
            parsed.lines.append(_hydra_line(override, groups))
            check_value(override)
    return parsed


def own_options(given: Set[str], parsed: ParsedOverrides, groups: Groups) -> list[str]:
    """Lines for Hydra that choose ``model=own`` and ``data=file`` where a source is among the `given` keys, but no option."""
    return [
        f"{group}={option}"
        for group, option in OWN_OPTIONS.items()
        if f"{group}.source" in given and group not in parsed.given and option in groups.get(group, [])
    ]


def _refuse_bare_option(text: str, groups: Groups) -> None:
    """Refuse ``rank`` where ``sweep=rank`` is meant."""
    meant = [f"{group}={text}" for group, options in groups.items() if text in options]
    if meant:
        raise BadInput(f"{text!r} is not a key=value; did you mean {' or '.join(meant)}?")
    if "=" not in text and text.endswith((".yaml", ".yml")):
        raise BadInput(f"{text!r} is not a key=value; {SETTINGS_FILE}.")


def _parse(text: str) -> Override:
    """One override by Hydra's grammar."""
    if CONTROL_CHARACTER.search(text):
        raise BadInput(f"{text!r} has a control character or bytes that are not UTF-8; remove them.")
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, RecursionError) as exc:
        quoted = _quoted(text)
        if quoted is not None:
            return OverridesParser.create().parse_override(quoted)
        detail = str(exc).splitlines()[0][:LONGEST_QUOTE] if "=" in text else "there is no '='"
        if any(text.count(opening) != text.count(closing) for opening, closing in ("[]", "{}", "()")):
            detail = "its brackets do not match"
        raise BadInput(
            f"{text[:LONGEST_QUOTE]!r} is not a key=value: {detail}. Write lora.r=8, lora.r=8,16 or "
            "'lora.target_modules=[q_proj,v_proj]'; put quotes around brackets, braces and spaces."
        ) from exc
    # True and false are numbers here, too.
    is_number = isinstance(override.value(), int | float)
    quoted = _quoted(text) if is_number or _is_one_file(text.partition("=")[2]) else None
    return override if quoted is None else OverridesParser.create().parse_override(quoted)


def _quoted(text: str) -> str | None:
    """``key=value`` with quotes of Hydra's around the value, or around each of several, for a key whose values are text.

    Hydra's grammar wants them around ``=``, ``~``, umlauts and much else, and takes 2024 for a number and ``a,b.jsonl`` for two files.
    """
    key, equals, value = text.partition("=")
    if not equals or not (is_text(key.lstrip("+")) or key in OWN_OPTIONS):
        return None
    values = [value] if _is_one_file(value) or set(value) & set("'\"") else value.split(",")
    return f"{key}={','.join(map(in_hydras_quotes, values))}"


def _is_one_file(value: str) -> bool:
    """Whether a value with commas is the name of a file or folder, and no list of several values."""
    # A text may be longer than a file's name can be.
    with suppress(OSError):
        return "," in value and Path(value).exists()
    return False


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
