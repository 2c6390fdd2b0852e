"""The base of every section of the configuration: how values are checked, and the message for a wrong one."""

from __future__ import annotations

import re
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from train.errors import BadInput

NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")
# The last range holds lone surrogates: that is what Python makes of bytes that are not UTF-8.
CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Section(BaseModel):
    """A part of the configuration. Unknown keys, wrong types and infinities are rejected, and values never change.

    The text below each key is its meaning in ``python -m launcher keys`` and in docs/configuration.md.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


S = TypeVar("S", bound=Section)


def parse_section(section: type[S], values: dict[str, Any], prefix: str = "") -> S:
    """Check plain nested `values` against `section`; `prefix` goes before the keys in messages.

    Raises:
        BadInput: naming every wrong key in full, its value and what is allowed.
    """
    try:
        checked = section.model_validate(values)
    except ValidationError as exc:
        reasons = sorted({explain(section, error, prefix) for error in exc.errors()})
        raise BadInput(f"{'; '.join(reasons).removesuffix('.')}.") from exc
    refuse_control_characters(checked.model_dump(), prefix)
    return checked


def refuse_control_characters(value: Any, key: str = "") -> None:
    """Reject control characters in any string of a nested value: they could run commands in a job script.

    Raises:
        BadInput: naming the key.
    """
    if isinstance(value, str) and CONTROL_CHARACTER.search(value):
        raise BadInput(f"{key}={value!r} has a control character or bytes that are not UTF-8; remove them.")
    if isinstance(value, dict):
        for name, item in value.items():
            refuse_control_characters(name, key)
            refuse_control_characters(item, f"{key}.{name}".lstrip("."))
    if isinstance(value, list):
        for item in value:
            refuse_control_characters(item, key)


def check_name(name: str, key: str) -> str:
    """Return `name` if it can be a folder's name everywhere.

    Raises:
        BadInput: it has other characters, is too long, or is ``.`` or ``..``.
    """
    if not NAME_PATTERN.fullmatch(name) or set(name) == {"."}:
        raise BadInput(f"{key}={name!r} cannot name a folder; use 1 to 64 letters, digits, '.', '_' or '-'.")
    return name


def explain(section: type[BaseModel], error: Any, prefix: str) -> str:
    """One sentence for one of pydantic's errors, with the full key, the value and what is allowed."""
    path = [str(part) for part in error["loc"] if not _is_union_member(part)]
    key = ".".join([prefix, *path]).strip(".")
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(section, path[:-1])
        return f"unknown key {key!r}; " + (
            f"valid keys there are {', '.join(valid)}" if valid else "none is valid there"
        )
    if error["type"] == "missing":
        return f"{key} is missing; give it a value: {key}=..."
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    # A check of several keys names them itself.
    speaks_for_itself = error["type"] == "value_error" and key in {"", "model", "train"}
    return message if speaks_for_itself else f"{key}={error['input']!r}: {message}"


def _is_union_member(part: str | int) -> bool:
    """Whether a part of pydantic's location names the branch of a union (``list[str]``, ``int``) instead of a key."""
    return isinstance(part, str) and (part in {"int", "bool", "str", "float"} or "[" in part)


def _valid_keys(section: type[BaseModel], path: list[str]) -> list[str]:
    """The fields below `path`, for a message; a dictionary of sections takes any name."""
    annotation: Any = section
    for part in path:
        annotation = (
            get_args(annotation)[1] if get_origin(annotation) is dict else annotation.model_fields[part].annotation
        )
        if get_origin(annotation) is not dict and not (
            isinstance(annotation, type) and issubclass(annotation, BaseModel)
        ):
            return []
    return list(annotation.model_fields)
