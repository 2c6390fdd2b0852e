"""Checks of single overrides before Hydra sees them: each mistake is answered with what to type."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from types import NoneType
from typing import Any

from hydra.core.override_parser.types import Override

from launcher.compose.keys import (
    accepts,
    field_of,
    is_key,
    key_fields,
    listed_name,
    members,
    section_classes,
    type_words,
)
from launcher.compose.suggestions import (
    assignment,
    axis_for_list,
    list_for_axis,
    nearest_key,
    option_instead,
    respelled,
    suggestion,
)
from launcher.config import FolderConfig
from launcher.installation import Groups
from train.errors import BadInput

# Characters of a wrong override that a message repeats.
LONGEST_QUOTE = 200

# What Hydra's own settings, by the beginning of their key, are called here. `%s` stands for the user's value.
HYDRAS = {
    "hydra.run.dir": "root=%s",
    "hydra.sweep.dir": "root=%s",
    "hydra.sweep.subdir": "sweep.name=%s",
    "hydra.job.name": "sweep.name=%s",
    "hydra.verbose": "--debug",
    "hydra.launcher.partition": "cluster.partitions={%s:{}}",
    "hydra.launcher.account": "cluster.account=%s",
    "hydra.launcher.qos": "cluster.qos=%s",
    "hydra.launcher.cpus_per_task": "cluster.cpus=%s",
    "hydra.launcher.mem_gb": "cluster.ram_gib=%s",
    "hydra.launcher.gpus_per_node": "cluster.gpus_per_job=%s",
    "hydra.launcher.array_parallelism": "cluster.max_parallel=%s",
    "hydra.sweeper": "sweep.grid={lora.r:[8,16],train.seed:[0,1]}",
}

TOP_KEYS = (*section_classes(), *FolderConfig.model_fields)


def check_option(group: str, option: Any, groups: Groups) -> str:
    """Return `option` if `group` has it.

    Raises:
        BadInput: it has not; the message names those it has.
    """
    if not isinstance(option, str) or option not in groups[group]:
        instead = option_instead(group, option, groups[group])
        raise BadInput(f"{group}={option} is not an option{instead} {one_of(groups[group])}")
    return option


def refuse_split_words(overrides: list[str]) -> None:
    """Refuse what the shell has split at a space: ``lora.r 8``, ``lora.r= 8``, ``lora.r = 8`` and ``lora.r=8, 16``."""
    for i, word in enumerate(overrides):
        rest = overrides[i + 1 :]
        joined = joined_words(word, rest)
        if joined is not None:
            shown = " ".join([word, *rest[:2]])[:LONGEST_QUOTE]
            raise BadInput(f"{shown!r} is split at the space by the shell; write {shlex.quote(joined)} without spaces.")


def joined_words(word: str, rest: list[str]) -> str | None:
    """The one ``key=value`` that `word` and the words after it were meant to be; None where a word stands for itself."""
    following = rest[0] if rest else "="
    if "=" not in word:
        target = nearest_key(word) if rest else None
        value = "".join(rest[:2]) if following == "=" else following
        if target is None or "=" in value.lstrip("="):
            return None
        return assignment(target, value.lstrip("="))
    if "=" in following or not (word.endswith((",", "=")) or following.startswith(",")):
        return None
    parts = [word]
    for part in rest:
        if "=" in part or not (parts[-1].endswith((",", "=")) or part.startswith(",")):
            break
        parts.append(part)
    return "".join(parts)


def check_key(override: Override, groups: Groups) -> None:
    """Refuse a key outside of the configuration tree, and one of Hydra's own."""
    key = override.key_or_group
    value = override.input_line.partition("=")[2] if override.input_line and "=" in override.input_line else None
    if key.split(".")[0].split("/")[0] == "hydra":
        raise BadInput(
            f"{override.input_line!r} is a setting of Hydra's own, which has no effect here{_hydras(key, value)}"
        )
    if not is_key(key) or override.package is not None:
        section = key.rpartition(".")[0]
        where = section if is_key(section) else ""
        shown = f"python -m launcher keys {where.split('.')[0]}".rstrip()
        fixed = " The keys are fixed; none can be added." if override.is_add() or override.is_force_add() else ""
        raise BadInput(
            f"unknown key {override.get_key_element()!r}{suggestion(key, value)}{fixed} "
            f"{one_of(_valid_keys(where))} '{shown}' explains them."
        )
    if override.is_delete() and key in groups:
        raise BadInput(f"'~{key}' would leave the section {key} without values; choose a file. {one_of(groups[key])}")


def _hydras(key: str, value: str | None) -> str:
    """The end of the sentence about one of Hydra's settings."""
    if key == "hydra/launcher":
        return f"; did you mean cluster={'slurm' if value == 'submitit_slurm' else 'local'}?"
    found = next((ours for theirs, ours in HYDRAS.items() if key.replace("/", ".").startswith(theirs)), None)
    return "; leave it out." if found is None else f"; did you mean {shlex.quote(found.replace('%s', value or '...'))}?"


def _valid_keys(section: str) -> list[str]:
    """What stands below `section`, or at the top."""
    if not section:
        return list(TOP_KEYS)
    listed = listed_name(section)
    return [name.removeprefix(f"{listed}.") for name in key_fields() if name.rpartition(".")[0] == listed]


def check_value(override: Override) -> None:
    """Refuse an empty value, a list where the key takes one value, and foreign spellings, each with what to type."""
    key, value = override.key_or_group, override.value()
    key_field = field_of(key)
    if override.is_delete() or key_field is None:
        return
    if value == "":
        null = f", {key}=null for none," if NoneType in members(key_field.annotation) else ""
        kind = type_words(key_field.annotation, key_field.metadata)
        raise BadInput(f"{key}= is empty; give it a value ({kind}){null} or leave it out.")
    axis = axis_for_list(key, value)
    if axis is not None:
        raise BadInput(
            f"{override.input_line!r} gives a list, and {key} takes one value; write {axis}, where commas compare runs."
        )
    _refuse_spelling(key, value)


def check_axis_values(key: str, values: list[Any]) -> None:
    """Refuse the elements of one list as an axis, and foreign spellings of values."""
    if field_of(key) is None:
        return
    lists = list_for_axis(key, values)
    if lists is not None:
        one, several = (shlex.quote(text) for text in lists)
        raise BadInput(
            f"{key} takes a list, and commas without brackets compare runs; write {one} for one run with all of them, "
            f"or {several} for a run with each."
        )
    for value in values:
        _refuse_spelling(key, value)


def _refuse_spelling(key: str, value: Any) -> None:
    """Refuse a value that the key does not take, with the spelling that it takes or with its type."""
    key_field = field_of(key)
    spelled = None if "${" in str(value) else respelled(key, value)
    if key_field is None or (spelled is None and (accepts(key, value) or "${" in str(value))):
        return
    meaning = " ".join((key_field.description or "").split())
    kind = type_words(key_field.annotation, key_field.metadata)
    instead = f"give it a value ({kind})" if spelled is None else f"write {shlex.quote(f'{key}={spelled}')}"
    raise BadInput(f"{key}={value} is not valid; {instead}. {meaning}".rstrip())


def one_of(valid: Iterable[str]) -> str:
    """A sentence that lists what is allowed."""
    return f"Valid: {', '.join(valid)}."
