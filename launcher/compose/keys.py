"""Every key of the configuration as data: its type in words, its default and who gives it, and its meaning.

All of it is read from the pydantic classes and from conf/, so that nothing about a key is written down twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from launcher.config import ClusterConfig, FolderConfig, SweepConfig
from launcher.installation import find_groups
from train.config import HOW_KEYS, RunConfig, TrackingConfig
from train.section import Section

# Stands for the user's own word, as in ``cluster.partitions.<name>.gpu``.
ANY_NAME = "<name>"
STRICT = ConfigDict(strict=True, allow_inf_nan=False)

# A name is not a hyper-parameter, and what only changes files, memory or speed gives the same run again.
CHANGES_NO_RESULT = {"model.name", "data.name"} | {f"train.{key}" for key in HOW_KEYS["train"]}
COMPUTED = {"model.fingerprint", "data.fingerprint"}

# The files of conf/ by group and option, each with what it sets.
Choices = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Key:
    """One key and all that is known of it.

    default, choice: the value without any override, and the ``group=option`` that gives it; None where the class does.
    otherwise: the values that other choices of the group give; the class's own has the key ``""``.
    """

    name: str
    type: str
    meaning: str
    default: Any
    choice: str | None = None
    otherwise: dict[str, Any] = field(default_factory=dict)

    @property
    def section(self) -> str:
        """Where it is listed: ``lora``, ``cluster.partitions.<name>``, or nothing for a top-level key."""
        return self.name.rpartition(".")[0]

    @property
    def can_be_axis(self) -> bool:
        """Whether a run with another value is another run, so that values can be compared."""
        return self.section in RunConfig.model_fields and self.name not in CHANGES_NO_RESULT | COMPUTED


def section_classes() -> dict[str, type[Section]]:
    """The class of each section, in the order in which people read them."""
    of_runs = {name: run_field.annotation for name, run_field in RunConfig.model_fields.items()}
    return of_runs | {"sweep": SweepConfig, "cluster": ClusterConfig, "tracking": TrackingConfig}  # type: ignore[return-value]


@cache
def key_fields() -> dict[str, FieldInfo]:
    """Every key in full, such as ``lora.r``, with its field."""
    found = dict(FolderConfig.model_fields)
    for section, model in section_classes().items():
        found |= dict(_fields_below(model, f"{section}."))
    return found


def is_key(name: str) -> bool:
    """Whether `name` is a section, a key, or lies in a dictionary that takes any name, such as ``lora.rank_pattern.q_proj``."""
    top, _, rest = name.partition(".")
    if not rest:
        return top in FolderConfig.model_fields or top in section_classes()
    annotation: Any = section_classes().get(top)
    for part in rest.split("."):
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
            if not _is_section(annotation):
                return True
        elif _is_section(annotation) and part in annotation.model_fields:
            annotation = annotation.model_fields[part].annotation
        else:
            return False
    return True


def field_of(name: str) -> FieldInfo | None:
    """The field of the key `name`; None for a section and below a dictionary that takes anything."""
    return key_fields().get(listed_name(name))


def listed_name(name: str) -> str:
    """`name` as `key_fields` lists it: ``cluster.partitions.<name>.gpu`` for ``cluster.partitions.a100.gpu``."""
    return re.sub(r"^cluster\.partitions\.[^.]+(?=\.|$)", f"cluster.partitions.{ANY_NAME}", name)


def accepts(name: str, value: Any) -> bool:
    """Whether the type and range of a key take `value`. What its class checks beyond them is not asked."""
    try:
        _adapter(listed_name(name)).validate_python(value)
    except ValidationError:
        return False
    return True


def all_keys(folders: tuple[Path, ...]) -> list[Key]:
    """Every key with its default as the configuration files in `folders` set it; the first folder that has a file wins."""
    choices, chosen = read_choices(folders), read_defaults(folders)
    top_values = _load(find_file(folders, "config.yaml"))
    return [_key(name, key_field, choices, chosen, top_values) for name, key_field in key_fields().items()]


def read_choices(folders: tuple[Path, ...]) -> Choices:
    """What each option of each group sets."""
    return {
        group: {option: _load(find_file(folders, f"{group}/{option}.yaml")) for option in options}
        for group, options in find_groups(folders).items()
    }


def read_defaults(folders: tuple[Path, ...]) -> dict[str, str]:
    """The option of each group that ``config.yaml`` chooses."""
    entries = _load(find_file(folders, "config.yaml"))["defaults"]
    return {group: option for entry in entries if isinstance(entry, dict) for group, option in entry.items()}


def find_file(folders: tuple[Path, ...], name: str) -> Path:
    """The configuration file of that name that Hydra takes."""
    return next(folder / name for folder in folders if (folder / name).is_file())


def members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type that it is."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def type_words(annotation: Any, bounds: list[Any] | None = None) -> str:
    """A type as people say it: ``number > 0, at most 1``, ``one of linear, cosine``, ``list of strings or null``."""
    types = [member for member in members(annotation) if member is not NoneType]
    words = [_one_type(member, bounds or [], alone=len(types) == 1) for member in types]
    if NoneType in members(annotation):
        words.append("null")
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def value_text(value: Any) -> str:
    """A value as it is typed on the command line; a variable of the environment as people write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return _number_text(value)
    if isinstance(value, list):
        return f"[{','.join(map(value_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{value_text(item)}' for key, item in value.items())}}}"
    variable = re.fullmatch(r"\$\{oc\.env:(\w+),(.*)\}", str(value))
    return f"${variable[1]}, else {variable[2]}" if variable else str(value)


def _key(name: str, key_field: FieldInfo, choices: Choices, chosen: dict[str, str], top_values: dict[str, Any]) -> Key:
    """One key, with its default looked up in the chosen option, in ``config.yaml``, and in the class."""
    group, _, rest = name.partition(".")
    given = {f"{group}={option}": values[rest] for option, values in choices.get(group, {}).items() if rest in values}
    given = {choice: value for choice, value in given.items() if value != "???"}
    choice: str | None = f"{group}={chosen.get(group)}"
    if not key_field.is_required():
        given[""] = key_field.get_default(call_default_factory=True)
    if choice not in given:
        choice = None
    default = top_values[name] if name in top_values else given.pop(choice or "", None)
    meaning = " ".join((key_field.description or "").split())
    return Key(name, type_words(key_field.annotation, key_field.metadata), meaning, default, choice, given)


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    """pydantic's check of one key; building it takes a while, and an axis may have thousands of values."""
    annotated: Any = key_fields()[name].annotation
    for bound in key_fields()[name].metadata:
        annotated = Annotated[annotated, bound]
    return TypeAdapter(annotated, config=STRICT)


def _fields_below(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """The fields of a section in full, then those of the sections that its dictionaries hold."""
    nested = []
    for name, key_field in model.model_fields.items():
        yield f"{prefix}{name}", key_field
        if get_origin(key_field.annotation) is dict and _is_section(get_args(key_field.annotation)[1]):
            nested.append((get_args(key_field.annotation)[1], f"{prefix}{name}.{ANY_NAME}."))
    for inner, inner_prefix in nested:
        yield from _fields_below(inner, inner_prefix)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _load(path: Path) -> dict[str, Any]:
    """A YAML file as Hydra reads it: PyYAML alone would take 1e-3 for a string."""
    values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _one_type(annotation: Any, bounds: list[Any], *, alone: bool) -> str:
    """One member of a union in words; `alone` where no other member but null is there."""
    if get_origin(annotation) is Literal:
        options = ", ".join(map(value_text, get_args(annotation)))
        if not alone:
            return options
        return f"one of {options}" if len(get_args(annotation)) > 1 else f"only {options}"
    if annotation is bool:
        return "true or false" if alone else "true, false"
    if get_origin(annotation) is list:
        return f"list of {_plain_name(get_args(annotation)[0])}s"
    if get_origin(annotation) is dict:
        return f"{{name: {_one_type(get_args(annotation)[1], [], alone=True)}}}"
    if _is_section(annotation):
        return "settings"
    return " ".join(filter(None, [_plain_name(annotation), _bounds_words(bounds)]))


def _plain_name(annotation: Any) -> str:
    return {int: "integer", float: "number", str: "string"}.get(annotation, "value")


def _bounds_words(bounds: list[Any]) -> str:
    """``from 1 to 4096``, or ``> 0, at most 1``."""
    limits = {type(bound): getattr(bound, type(bound).__name__.lower()) for bound in bounds}
    if limits.keys() == {Ge, Le}:
        return f"from {limits[Ge]} to {limits[Le]}"
    words = {Gt: ">", Ge: "at least", Lt: "<", Le: "at most"}
    return ", ".join(f"{words[kind]} {limit}" for kind, limit in limits.items() if kind in words)


def _number_text(value: float) -> str:
    """``0.05`` and ``3``, and below a hundredth ``2e-4``."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:g}"
    digits, _, exponent = f"{value:.6e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
