"""What one run trains: the typed, range-checked configuration tree and the identity derived from it.

Light on purpose: the launcher imports it on the login node. Field names are those of PEFT's `LoraConfig`, transformers'
`TrainingArguments` and `BitsAndBytesConfig`; every default lives here or in ``conf/``, never in both.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from train.errors import BadInput

NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")
COMMIT_PATTERN = re.compile(r"[0-9a-f]{40}")
CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # the last are bytes that were no UTF-8

# Keys that say how or where a run is computed, never what: they are left out of the run's identity.
HOW_KEYS = {
    "model": {"name", "source", "revision"},  # `model.fingerprint` stands for them
    "data": {"name", "source", "eval_source"},  # `data.fingerprint` stands for them
    "train": {
        *("save_steps", "sample_prompts", "sample_tokens"),
        *("micro_batch_tokens", "residency", "gradient_checkpointing", "compile"),
    },
}


class Section(BaseModel):
    """A part of the configuration: unknown keys, wrong types and infinities are refused; values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


class ModelConfig(Section):
    """The frozen base model. `source` is a hub id, a local folder, ``pypi:package==version`` or ``builtin:tiny``."""

    name: str
    source: str
    revision: str | None = None
    trust_remote_code: bool = False
    fingerprint: str | None = None

    @model_validator(mode="after")
    def _remote_code_needs_a_commit(self) -> ModelConfig:
        if self.trust_remote_code and not COMMIT_PATTERN.fullmatch(self.revision or ""):
            raise ValueError(
                f"model.trust_remote_code=true runs code from {self.source!r}; pin model.revision to a full 40-digit commit"
            )
        return self


class DataConfig(Section):
    """Instructions to learn. `source` is a hub id, a json, jsonl, csv or parquet file, or ``builtin:tasks``.

    `format` is Alpaca (instruction, input, output) or chat (messages); ``auto`` looks at the columns. Without
    `eval_source`, `eval_rows` rows are split off `source` by `split_seed`. Lengths are in tokens.
    """

    name: str
    source: str
    eval_source: str | None = None
    revision: str | None = None
    split: str = "train"
    format: Literal["auto", "alpaca", "chat"] = "auto"
    train_rows: int | None = Field(None, ge=1)
    eval_rows: int = Field(200, ge=1)
    split_seed: int = Field(0, ge=0)
    max_length: int = Field(512, ge=8)
    response_only: bool = True
    fingerprint: str | None = None


class LoraConfig(Section):
    """PEFT's `LoraConfig`, plus `loraplus_lr_ratio` (LoRA+, arXiv 2402.12354: learning rate of B over that of A)."""

    r: int = Field(ge=1, le=4096)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | str
    use_rslora: bool = False
    loraplus_lr_ratio: float | None = Field(None, gt=0)
    layers_to_transform: list[int] | None = None
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    bias: Literal["none"] = "none"

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_are_regexes_with_positive_values(cls, patterns: dict[str, float]) -> dict[str, float]:
        for pattern, value in patterns.items():
            if value <= 0:
                raise ValueError(f"the value of {pattern!r} is {value}; it has to be positive")
            try:
                re.compile(pattern)
            except re.error as exc:
                raise ValueError(f"{pattern!r} is no regular expression: {exc}") from exc
        return patterns

    @field_validator("target_modules")
    @classmethod
    def _targets_something(cls, targets: list[str] | str) -> list[str] | str:
        if not targets:
            raise ValueError("it is empty; name at least one module, or 'all-linear'")
        return targets

    @field_validator("layers_to_transform")
    @classmethod
    def _layers_are_indices(cls, layers: list[int] | None) -> list[int] | None:
        if layers is not None and (not layers or min(layers) < 0):
            raise ValueError(f"{layers} has to be a list of layer indices from 0; leave it null for all layers")
        return layers


class QuantConfig(Section):
    """bitsandbytes' NF4 (QLoRA, arXiv 2305.14314) or a base in the run's own dtype."""

    load_in_4bit: bool
    bnb_4bit_quant_type: Literal["nf4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True


class TrainConfig(Section):
    """The optimization of one run. `batch_size` counts the sequences of an optimizer step, however they are cut.

    `max_steps` null means `num_train_epochs` decides; `warmup_steps` null means `warmup_ratio` does. `eval_steps` 0 evaluates
    only before the first and after the last step. At every evaluation the run answers `sample_prompts` held-out prompts (0: none) in
    at most `sample_tokens` tokens, for people to read. The keys from `save_steps` on change files, memory and speed, not results.
    """

    learning_rate: float = Field(gt=0, le=1)
    num_train_epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(ge=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    warmup_steps: int | None = Field(None, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0)
    seed: int = Field(0, ge=0, lt=2**32)
    dtype: Literal["auto", "float16", "bfloat16", "float32", "float64"] = "auto"
    eval_steps: int = Field(0, ge=0)
    save_steps: int = Field(50, ge=1)
    sample_prompts: int = Field(4, ge=0, le=64)
    sample_tokens: int = Field(32, ge=1, le=1024)
    micro_batch_tokens: int | Literal["auto"] = "auto"
    residency: Literal["auto", "nf4", "resident"] = "auto"
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    compile: bool | Literal["auto"] = "auto"

    @field_validator("micro_batch_tokens")
    @classmethod
    def _micro_batch_is_positive(cls, tokens: int | str) -> int | str:
        if isinstance(tokens, int) and tokens < 1:
            raise ValueError(f"{tokens} has to be at least 1, or 'auto'")
        return tokens

    def steps_per_epoch(self, train_rows: int) -> int:
        """Optimizer steps that see each of `train_rows` rows once; the last batch of an epoch may be smaller."""
        return math.ceil(train_rows / self.batch_size)

    def total_steps(self, train_rows: int) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps or max(1, math.ceil(self.num_train_epochs * self.steps_per_epoch(train_rows)))

    def warmup(self, total_steps: int) -> int:
        """Warm-up steps, as transformers counts them."""
        return self.warmup_steps if self.warmup_steps is not None else math.ceil(self.warmup_ratio * total_steps)


class RunConfig(Section):
    """One hyper-parameter configuration, complete: what ``config.yaml`` of a run folder holds."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig
    quant: QuantConfig
    train: TrainConfig

    def identity(self) -> dict[str, Any]:
        """The part of the configuration that decides the result, as plain values."""
        return {
            section: {key: value for key, value in values.items() if key not in HOW_KEYS.get(section, ())}
            for section, values in self.model_dump().items()
        }

    def run_id(self) -> str:
        """Ten hexadecimal digits of the identity's SHA-256: the same for the same result, on any machine.

        Raises:
            ValueError: the fingerprints of model and data are not resolved yet.
        """
        if self.model.fingerprint is None or self.data.fingerprint is None:
            raise ValueError("a run has an id only once model.fingerprint and data.fingerprint are resolved")
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:10]


class TrackingConfig(Section):
    """Where numbers go besides the journal. `auto` is online where a key is found and the server answers, else offline.

    `project` and `entity` null leave it to WANDB_PROJECT and WANDB_ENTITY; `key_file` holds the API key and nothing else.
    """

    mode: Literal["auto", "online", "offline", "off"]
    project: str | None = None
    entity: str | None = None
    key_file: str | None = None

    @field_validator("project")
    @classmethod
    def _w_and_b_takes_the_project(cls, project: str | None) -> str | None:
        if project is not None and (len(project) > 128 or set(project) & set("/\\#?%:")):
            raise ValueError(
                f"{project!r} is no name of a W&B project: it has at most 128 characters, and none of / \\ # ? % :"
            )
        return project


def parse_run_config(values: dict[str, Any]) -> RunConfig:
    """Check plain nested `values` and return the typed configuration.

    Raises:
        BadInput: naming every wrong key in full, its value and what is allowed.
    """
    return parse_section(RunConfig, values)


def read_run_config(path: Path) -> RunConfig:
    """The configuration that is frozen in a run folder (`train.store.layout.RunDir.config`).

    Raises:
        BadInput: see `parse_run_config`.
    """
    return parse_run_config(yaml.safe_load(path.read_text()))


def parse_section(section: type[S], values: dict[str, Any], prefix: str = "") -> S:
    """Like `parse_run_config`, for any section; `prefix` goes before the keys in messages."""
    try:
        checked = section.model_validate(values)
    except ValidationError as exc:
        raise BadInput("; ".join(sorted({_explain(section, error, prefix) for error in exc.errors()}))) from exc
    refuse_control_characters(checked.model_dump(), prefix)
    return checked


def refuse_control_characters(value: Any, key: str = "") -> None:
    """Refuse control characters in any string of a nested value: they could run commands in a job script.

    Raises:
        BadInput: naming the key.
    """
    if isinstance(value, str) and CONTROL_CHARACTER.search(value):
        raise BadInput(f"{key}={value!r} has a control character or what is no UTF-8; remove it.")
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


def _explain(section: type[Section], error: Any, prefix: str) -> str:
    """One sentence for one of pydantic's errors, with the full key, the value and what is allowed."""
    path = [str(part) for part in error["loc"] if not _is_union_member(part)]
    key = ".".join([prefix, *path]).strip(".")
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}; valid keys there are {', '.join(_valid_keys(section, path[:-1]))}"
    if error["type"] == "missing":
        return f"{key} is missing; give it a value"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    speaks_for_itself = error["type"] == "value_error" and key in {"", "model"}  # a check of several keys names them
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
