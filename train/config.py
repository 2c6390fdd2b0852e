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
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from train.errors import BadInput, DamagedFile
from train.schedules import SCHEDULES, ScheduleName, deciding_arguments, given_arguments
from train.section import Section, explain, parse_section

# The forms of a row that `train.data.rows.parse_row` knows; ``auto`` looks at the columns.
RowFormat = Literal["auto", "alpaca", "chat"]

COMMIT_PATTERN = re.compile(r"[0-9a-f]{40}")

# Keys that say how or where a run is computed, never what: they are left out of the run's identity.
HOW_KEYS = {
    # `model.fingerprint` and `data.fingerprint` stand for these.
    "model": {"name", "source", "revision"},
    "data": {"name", "source", "eval_source"},
    "train": {
        *("save_steps", "sample_prompts", "sample_tokens"),
        *("micro_batch_tokens", "residency", "gradient_checkpointing", "compile"),
    },
}

# Keys younger than 0.1.0: at their default they are left out of the identity too, so that run ids from before stay valid.
YOUNGER_KEYS = {"train": {"lr_scheduler_kwargs"}}


class ModelConfig(Section):
    """The frozen base model."""

    name: str
    """Name of the model in folders, tables and charts. By default the last part of `source`."""

    source: str
    """Where the model comes from: a hub id, a local folder, `pypi:package==version`, or `builtin:tiny`."""

    revision: str | None = None
    """Branch, tag or commit on the hub; `null` takes the newest."""

    trust_remote_code: bool = False
    """Allow the model's own code to run. It needs `model.revision` to be a full 40-digit commit."""

    fingerprint: str | None = None
    """Digest of the model's files. It is computed for you; a value you give is replaced."""

    @model_validator(mode="after")
    def _remote_code_needs_a_commit(self) -> ModelConfig:
        if self.trust_remote_code and not COMMIT_PATTERN.fullmatch(self.revision or ""):
            raise ValueError(
                f"model.trust_remote_code=true runs code from {self.source!r}; pin model.revision to a full 40-digit commit"
            )
        return self


class DataConfig(Section):
    """The instructions to learn from and the held-out rows to evaluate on."""

    name: str
    """Name of the data in folders, tables and charts. By default the last part of `source`."""

    source: str
    """Where the rows come from: a hub id, a json, jsonl, csv or parquet file, or `builtin:tasks`."""

    eval_source: str | None = None
    """Where the held-out rows come from, as for `source`. `null` splits `eval_rows` rows off `source`."""

    revision: str | None = None
    """Branch, tag or commit of the data set on the hub; `null` takes the newest."""

    split: str = "train"
    """The split of a hub data set to read."""

    format: RowFormat = "auto"
    """Columns of a row: `alpaca` has instruction, input and output, `chat` has messages. `auto` looks at the columns."""

    train_rows: int | None = Field(None, ge=1)
    """The most rows to train on; `null` takes all."""

    eval_rows: int = Field(200, ge=1)
    """The number of held-out rows."""

    split_seed: int = Field(0, ge=0)
    """Seed that decides which rows are held out when `eval_source` is `null`."""

    max_length: int = Field(512, ge=8)
    """The longest sequence in tokens, prompt and answer together; longer ones are truncated."""

    response_only: bool = True
    """Compute the loss on the answer only, not on the prompt."""

    fingerprint: str | None = None
    """Digest of the data's rows. It is computed for you; a value you give is replaced."""


class LoraConfig(Section):
    """The adapter. Keys are those of PEFT's `LoraConfig`, plus `loraplus_lr_ratio`."""

    r: int = Field(ge=1, le=4096)
    """Rank of the adapter: the rows of A and the columns of B. A higher rank can learn more and costs memory."""

    lora_alpha: float = Field(gt=0)
    """Strength of the adapter: its output is scaled by `lora_alpha / r`."""

    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that an input of the adapter is dropped in training."""

    target_modules: list[str] | str
    """Linear layers that get an adapter: a list of names such as `[q_proj,v_proj]`, `all-linear`, or a regular
    expression that matches a layer's full name."""

    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(r)` instead (rsLoRA, arXiv 2312.03732)."""

    loraplus_lr_ratio: float | None = Field(None, gt=0)
    """Learning rate of B divided by that of A (LoRA+, arXiv 2402.12354); `null` uses one rate for both."""

    layers_to_transform: list[int] | None = None
    """Indices of the layers that get an adapter, counted from 0; `null` takes all layers."""

    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Other ranks for single layers: a name or regular expression, and its rank."""

    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Other alphas for single layers: a name or regular expression, and its alpha."""

    bias: Literal["none"] = "none"
    """Biases are never trained."""

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns_are_regexes_with_positive_values(cls, patterns: dict[str, float]) -> dict[str, float]:
        for pattern, value in patterns.items():
            if value <= 0:
                raise ValueError(f"the value of {pattern!r} is {value}; it has to be positive")
            try:
                re.compile(pattern)
            except re.error as exc:
                raise ValueError(f"{pattern!r} is not a regular expression: {exc}") from exc
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
    """How the frozen base is held. Keys are those of transformers' `BitsAndBytesConfig`."""

    load_in_4bit: bool
    """Hold the base in 4-bit NormalFloat (QLoRA, arXiv 2305.14314); `false` holds it in `train.dtype`."""

    bnb_4bit_quant_type: Literal["nf4"] = "nf4"
    """The 4-bit data type."""

    bnb_4bit_use_double_quant: bool = True
    """Quantize the scales of the 4-bit blocks as well, which saves about 0.4 bit per parameter."""


class TrainConfig(Section):
    """The optimization of one run. Keys are those of transformers' `TrainingArguments` where it has them."""

    learning_rate: float = Field(gt=0, le=1)
    """Highest learning rate of the schedule."""

    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the data. It counts only where `max_steps` is `null`."""

    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; `null` leaves it to `num_train_epochs`."""

    batch_size: int = Field(ge=1)
    """Sequences per optimizer step. How they are split into micro-batches never changes the result."""

    lr_scheduler_type: ScheduleName = "linear"
    """How the learning rate changes over the steps, as transformers' scheduler of that name."""

    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that scheduler, such as `{num_cycles: 3}` for `cosine_with_restarts`."""

    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""

    warmup_steps: int | None = Field(None, ge=0)
    """Steps in which the learning rate rises from 0; `null` leaves it to `warmup_ratio`."""

    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""

    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's running mean of the gradient."""

    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's running mean of the squared gradient."""

    adam_epsilon: float = Field(1e-8, gt=0)
    """Term that keeps AdamW from dividing by zero."""

    max_grad_norm: float = Field(1.0, ge=0)
    """Norm to which the run's gradient is clipped; 0 does not clip."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the adapter's first values, the order of the data and dropout."""

    dtype: Literal["auto", "float16", "bfloat16", "float32", "float64"] = "auto"
    """Precision of the base and the activations. `auto` chooses by the device; adapters are always trained in float32
    or better."""

    eval_steps: int = Field(0, ge=0)
    """Evaluate every so many steps; 0 evaluates only before the first and after the last step."""

    save_steps: int = Field(50, ge=1)
    """Save a checkpoint every so many steps."""

    sample_prompts: int = Field(4, ge=0, le=64)
    """Held-out prompts that the run answers at every evaluation, for you to read; 0 answers none."""

    sample_tokens: int = Field(32, ge=1, le=1024)
    """The most tokens of such an answer."""

    micro_batch_tokens: int | Literal["auto"] = "auto"
    """Tokens that go through the model at once, at least 1. `auto` fits them to the memory."""

    residency: Literal["auto", "nf4", "resident"] = "auto"
    """How a 4-bit base is held in memory: `nf4` dequantizes at every use, `resident` once. The numbers are the same.
    `auto` chooses by free memory."""

    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass to save memory. `auto` chooses by free memory."""

    compile: bool | Literal["auto"] = "auto"
    """Use the compiled GPU kernels. `true` makes a missing compiler an error; `auto` does without them."""

    @field_validator("micro_batch_tokens")
    @classmethod
    def _micro_batch_is_positive(cls, tokens: int | str) -> int | str:
        if isinstance(tokens, int) and tokens < 1:
            raise ValueError(f"{tokens} has to be at least 1, or 'auto'")
        return tokens

    @field_validator("lr_scheduler_kwargs")
    @classmethod
    def _arguments_of_its_schedule(cls, values: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = info.data.get("lr_scheduler_type")
        # A wrong name is an error of its own.
        if name is None:
            return values
        try:
            return given_arguments(name, values)
        except ValidationError as exc:
            raise ValueError(_explain_schedule(name, exc)) from exc

    @model_validator(mode="after")
    def _schedule_begins_from_the_learning_rate(self) -> TrainConfig:
        try:
            # A default is not checked by the validator above, and some schedules need an argument.
            arguments = SCHEDULES[self.lr_scheduler_type].model_validate(self.lr_scheduler_kwargs)
        except ValidationError as exc:
            raise ValueError(_explain_schedule(self.lr_scheduler_type, exc)) from exc
        arguments.refuse_learning_rate(self.learning_rate)
        return self

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
    """The frozen base model."""

    data: DataConfig
    """The instructions to learn from."""

    lora: LoraConfig
    """The adapter."""

    quant: QuantConfig
    """How the base is held."""

    train: TrainConfig
    """The optimization."""

    def identity(self) -> dict[str, Any]:
        """The part of the configuration that decides the result, as plain values."""
        values = self.model_dump()
        values["train"]["lr_scheduler_kwargs"] = deciding_arguments(
            self.train.lr_scheduler_type, self.train.lr_scheduler_kwargs
        )
        return {
            section: {key: value for key, value in of_section.items() if self._decides(section, key, value)}
            for section, of_section in values.items()
        }

    def _decides(self, section: str, key: str, value: Any) -> bool:
        """Whether a key belongs to the identity: it changes the result, and has a value that version 0.1.0 could not express."""
        if key in HOW_KEYS.get(section, ()):
            return False
        default = getattr(self, section).__class__.model_fields[key].get_default(call_default_factory=True)
        return key not in YOUNGER_KEYS.get(section, ()) or value != default

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
    """Weights & Biases. Every number is in the run's journal first."""

    mode: Literal["auto", "online", "offline", "off"]
    """`auto` follows WANDB_MODE. Without it, `auto` is online where an API key is found and the server answers, else
    offline. `offline` writes folders for `wandb sync`; `off` keeps the journals only."""

    project: str | None = None
    """The W&B project; `null` leaves it to WANDB_PROJECT."""

    entity: str | None = None
    """The W&B user or team; `null` leaves it to WANDB_ENTITY."""

    key_file: str | None = None
    """A file that holds the API key and nothing else. `null` reads the key as W&B does."""

    @field_validator("project")
    @classmethod
    def _w_and_b_takes_the_project(cls, project: str | None) -> str | None:
        if project is not None and (len(project) > 128 or set(project) & set("/\\#?%:")):
            raise ValueError(
                "it cannot name a W&B project; a name has at most 128 characters, and none of them is / \\ # ? % or :"
            )
        return project


def parse_run_config(values: dict[str, Any]) -> RunConfig:
    """Check plain nested `values` and return the typed configuration.

    Raises:
        BadInput: naming every wrong key in full, its value and what is allowed.
    """
    return parse_section(RunConfig, values)


# Reading 500 configurations takes 3 s with the parser written in Python.
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_run_config(path: Path) -> RunConfig:
    """The configuration that is frozen in a run folder (`train.store.layout.RunDir.config`).

    Raises:
        DamagedFile: it is missing, cannot be read, or is not a configuration of this version.
    """
    values = read_values(path)
    try:
        return parse_run_config(values)
    except BadInput as exc:
        raise DamagedFile(path, f"cannot be used: {exc}") from exc


def read_values(path: Path) -> dict[str, Any]:
    """`read_run_config` without checking keys and values.

    Raises:
        DamagedFile: it is missing, cannot be read, or does not hold sections of keys.
    """
    try:
        values = yaml.load(path.read_bytes(), YAML_LOADER)
    except FileNotFoundError as exc:
        raise DamagedFile(path, "is missing") from exc
    except OSError as exc:
        raise DamagedFile(path, f"cannot be read ({exc.strerror or exc})") from exc
    except (yaml.YAMLError, ValueError) as exc:
        raise DamagedFile(path, f"is damaged: it is not valid YAML ({' '.join(str(exc).split())})") from exc
    if values is None:
        raise DamagedFile(path, "is damaged: it is empty")
    if not isinstance(values, dict) or not all(isinstance(section, dict) for section in values.values()):
        raise DamagedFile(path, "is damaged: it does not hold sections of keys")
    return values


def _explain_schedule(name: ScheduleName, mistakes: ValidationError) -> str:
    """What is wrong with ``train.lr_scheduler_kwargs``, and what to type where an argument is missing."""
    reasons = set()
    for error in mistakes.errors():
        if error["type"] == "missing":
            key = error["loc"][0]
            reasons.add(f"{key} is missing; set it, as in 'train.lr_scheduler_kwargs={{{key}:10}}'")
        else:
            reasons.add(explain(SCHEDULES[name], error, ""))
    return f"{'; '.join(sorted(reasons))} (train.lr_scheduler_type={name})"
