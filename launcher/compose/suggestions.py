"""What somebody probably meant: words of other tools and slips of the keyboard, answered with this project's own keys.

One table of foreign words, and `difflib` over it and all known keys, do the work: a new word is a word in `FOREIGN`.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from hydra.core.override_parser.types import Quote, QuotedString

from launcher.compose.keys import ANY_NAME, accepts, field_of, key_fields, members, section_classes, value_text
from train.config import RunConfig
from train.data.row_files import READERS

# Shares of difflib's ratio. Names in full share their section, so they have to agree more: `lora.rnak` is 0.89 near to
# `lora.rank`, but `train.lrate` is 0.73 near to `train.dtype`.
CLOSE_NAME = 0.85
CLOSE_WORD = 0.75

# What other tools call a key, in any section; a word with a dot only as a whole. `%s` stands for the user's value.
FOREIGN = {
    "lora.r": "rank lora_r lora_rank lora_dim",
    "lora.lora_alpha": "alpha lora_scaling",
    "lora.lora_dropout": "dropout",
    "lora.target_modules": "modules targets lora_target lora_target_modules lora_modules",
    "lora.use_rslora": "rslora",
    "train.learning_rate": "lr peak_lr max_lr rate",
    "train.num_train_epochs": "epochs num_epochs n_epochs max_epochs train_epochs",
    "train.max_steps": "steps num_steps train_steps max_train_steps max_iters iters",
    "train.batch_size": "per_device_train_batch_size train_batch_size micro_batch_size per_device_batch_size bs",
    "train.batch_size=N": "gradient_accumulation_steps grad_accum accumulate_grad_batches accumulation_steps",
    "train.lr_scheduler_type": "scheduler lr_scheduler lr_schedule schedule",
    "train.warmup_ratio": "warmup",
    "train.warmup_steps": "num_warmup_steps",
    "train.weight_decay": "wd decay",
    "train.adam_beta1": "beta1",
    "train.adam_beta2": "beta2",
    "train.adam_epsilon": "eps epsilon adam_eps",
    "train.max_grad_norm": "clip grad_clip gradient_clipping clip_grad_norm max_norm",
    "train.seed": "random_seed random_state data_seed",
    "train.dtype": "precision torch_dtype mixed_precision compute_dtype",
    "train.dtype=bfloat16": "bf16",
    "train.dtype=float16": "fp16",
    "train.eval_steps": "eval_every eval_interval evaluation_steps",
    "train.save_steps": "save_every save_interval checkpoint_steps",
    "train.compile": "torch_compile",
    "data.max_length": "max_seq_length max_seq_len seq_len cutoff_len block_size context_length sequence_len",
    "data.source": "path file files dataset datasets dataset_name dataset_path data_path data_file data_files train_file",
    "data.eval_source": "eval_file eval_path val_file validation_file test_file eval_dataset",
    "data.eval_rows": "val_set_size eval_size test_size",
    "data.train_rows": "max_samples max_train_samples num_samples",
    "model.source": "model.path model.file model.id model.model model.model_name name_or_path model_name_or_path "
    "pretrained_model_name_or_path base_model base_model_name_or_path model_name model_id model_path",
    "quant.load_in_4bit": "use_4bit 4bit qlora int4",
    "quant.bnb_4bit_use_double_quant": "double_quant use_double_quant use_nested_quant",
    "root": "output_dir out_dir output save_dir logging_dir run_dir",
    "cache": "cache_dir hf_home model_cache",
    "sweep.name": "name run_name wandb.name experiment experiment_name exp_name",
    "tracking": "wandb report_to logger use_wandb wandb.enabled",
    "tracking.project": "wandb_project project_name",
    "tracking.entity": "wandb_entity wandb_team team",
    "tracking.mode": "wandb_mode",
    "cluster.gpus_per_job": "gpus_per_node num_gpus n_gpus nproc_per_node",
    "cluster.cpus": "cpus_per_task num_cpus",
    "cluster.ram_gib": "mem mem_gb memory",
    "cluster.max_parallel": "array_parallelism max_jobs",
    "cluster.partitions={%s:{}}": "partition slurm_partition",
}
SYNONYMS = {word: target for target, words in FOREIGN.items() for word in words.split()}

# What the name of a key does not say to somebody who knows another tool.
REMARKS = {
    "train.batch_size": "It counts all sequences of an optimizer step: the batch size per device times the accumulation steps.",
    "train.batch_size=N": "N is the batch size per device times {value}: all sequences of an optimizer step.",
    "train.num_train_epochs": "Add train.max_steps=null, or the number of steps decides.",
}

# Words of other tools that have no key here, and what holds instead.
ABSENT = {
    "The optimizer is AdamW; its keys are train.weight_decay and train.adam_beta1, adam_beta2 and adam_epsilon.": "optim optimizer",
    "Every step is logged, so no key is needed.": "logging_steps log_interval log_steps log_every_n_steps logging_strategy",
    "The time limit of a job follows from the forecast; 'python -m launcher plan ...' shows it.": "time timeout timeout_min "
    "time_limit time_min walltime minutes hours",
    "The type of GPU belongs to a partition: cluster.partitions.NAME.gpu=a100; 'python -m launcher doctor' shows the names and "
    "types.": "gpu gpu_type gres",
    "The base is held in 4 bit (quant=nf4) or in train.dtype (quant=none).": "load_in_8bit use_8bit 8bit int8",
    "LoRA, rsLoRA (lora.use_rslora) and LoRA+ (lora.loraplus_lr_ratio) can be trained; other variants cannot.": "use_dora dora "
    "init_lora_weights peft_type pissa modules_to_save",
    "Every combination is trained (sweep.grid), or paired values (sweep.zip); there is no search.": "method search sampler "
    "n_trials early_stopping early_terminate metric",
    "Sequences are never padded, so no key is needed.": "packing padding padding_side pad_token pad_to_max_length "
    "group_by_length sample_packing",
    "A job has one node; cluster.gpus_per_job says how many of its GPUs share a step.": "nodes num_nodes n_nodes nnodes "
    "deepspeed fsdp strategy",
}
ANSWERS = {word: answer for answer, words in ABSENT.items() for word in words.split()}

# Spellings of a value; of several, the first that the key takes is proposed.
VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("none", "nil", "undefined"), (None, "none", "off")),
    "-1": (None,),
    **dict.fromkeys(("yes", "on", "y", "1", "true"), (True, "online")),
    **dict.fromkeys(("no", "off", "n", "0", "false", "disabled"), (False, "off")),
    **dict.fromkeys(("bf16", "torch.bfloat16"), ("bfloat16",)),
    **dict.fromkeys(("fp16", "half", "16", "torch.float16"), ("float16",)),
    **dict.fromkeys(("fp32", "full", "32", "torch.float32"), ("float32",)),
}
# The same for the options of groups.
OPTIONS = {
    "quant": dict.fromkeys(("4bit", "qlora", "int4", "true"), "nf4")
    | dict.fromkeys(("16bit", "lora", "false"), "none"),
    "tracking": dict.fromkeys(("wandb", "true", "all"), "online") | dict.fromkeys(("none", "false", "disabled"), "off"),
    "cluster": dict.fromkeys(("submitit", "submitit_slurm", "sbatch"), "slurm") | {"submitit_local": "local"},
}
ALL_LINEAR = "all-linear"


def nearest_key(name: str) -> str | None:
    """The key, section or complete assignment (of `FOREIGN`) that `name` probably means; None where nothing is near."""
    wanted = name.lower().replace("-", "_").lstrip("+~_")
    section, _, last = wanted.rpartition(".")
    if section.startswith("cluster.partitions."):
        partition_keys = [name.rpartition(".")[2] for name in key_fields() if ANY_NAME in name]
        near = _near(last, partition_keys, 0.6)
        return f"{section}.{near}" if near else None
    names, words = _known_names(), _known_words()
    exact = names.get(wanted) or words.get(wanted) or words.get(last)
    if exact is not None or other_way(name) is not None:
        return exact
    if not section and _near(wanted, section_classes(), CLOSE_WORD):
        return _near(wanted, section_classes(), CLOSE_WORD)
    return names.get(_near(wanted, names, CLOSE_NAME)) or words.get(_near(last, words, CLOSE_WORD))


def other_way(name: str) -> str | None:
    """What holds here instead of a setting that only other tools have; None where `name` is no such word."""
    return ANSWERS.get(name.rpartition(".")[2].lower().replace("-", "_").lstrip("+~_"))


def suggestion(name: str, value: str | None) -> str:
    """The end of a clause about an unknown key: ``; did you mean lora.r=8?`` with the user's value, else a full stop."""
    target = nearest_key(name)
    last = name.rpartition(".")[2]
    if target is None and other_way(name) is not None:
        return f". {other_way(name)}"
    several = [key for key in key_fields() if key.rpartition(".")[2] == last and ANY_NAME not in key]
    meant = [target] if target is not None else several
    if not meant:
        return "."
    remark = REMARKS.get(meant[0], "").format(value=value)
    return f"; did you mean {' or '.join(shlex.quote(assignment(key, value)) for key in meant)}? {remark}".rstrip()


def option_instead(group: str, option: Any, options: Iterable[str]) -> str:
    """The same for an unknown option of a group: a source of the user's own, another spelling, or a near one."""
    text = str(option)
    if group in {"model", "data"} and _is_source(text):
        return f"; did you mean {shlex.quote(f'{group}.source={text}')}?"
    if isinstance(option, dict) and option:
        given = " ".join(shlex.quote(f"{group}.{key}={value_text(value)}") for key, value in option.items())
        return f"; did you mean {given}?"
    spelled = OPTIONS.get(group, {}).get(text.lower(), re.sub(r"\.ya?ml$", "", text))
    folded = {name.lower().replace("-", "_"): name for name in options}
    near = _near(spelled.lower().replace("-", "_"), folded, 0.6)
    if not near and group in {"model", "data"}:
        return f"; for one of your own write {group}.source= and a hub id or a path."
    return f"; did you mean {shlex.quote(f'{group}={folded[near]}')}?" if near else "."


def respelled(key: str, value: Any) -> str | None:
    """How to type a value that `key` does not take, as it takes it; None where it does, or where nothing fits."""
    if not accepts(key, value):
        return next((value_text(other) for other in _spellings(key, value) if accepts(key, other)), None)
    # PEFT takes a string for a regular expression on a layer's whole name, which no bare `q_proj` matches.
    if _takes_list(key) and isinstance(value, str) and re.fullmatch(r"\w+", value):
        return ALL_LINEAR if value.lower().replace("_", "-") == ALL_LINEAR else f"[{value}]"
    return None


def axis_for_list(key: str, value: Any) -> str | None:
    """``lora.r=8,16`` for a list where the key takes each of its elements, but no list."""
    if not isinstance(value, list) or not value or accepts(key, value):
        return None
    # Nothing else can be an axis.
    if key.split(".")[0] not in RunConfig.model_fields:
        return None
    return f"{key}={','.join(map(value_text, value))}" if all(accepts(key, item) for item in value) else None


def list_for_axis(key: str, values: list[Any]) -> tuple[str, str] | None:
    """For ``lora.target_modules=q_proj,v_proj``: how to give both to one run, and how to compare them."""
    if not _takes_list(key) or not accepts(key, values):
        return None
    if not all(respelled(key, value) == f"[{value_text(value)}]" for value in values):
        return None
    texts = [value_text(value) for value in values]
    return f"{key}=[{','.join(texts)}]", f"{key}={','.join(f'[{text}]' for text in texts)}"


def is_text(key: str) -> bool:
    """Whether the values of a key are names, paths and such, whatever characters they have."""
    return str in _types(key) and {str, NoneType} >= set(_types(key))


def in_hydras_quotes(text: str) -> str:
    """`text` as a value that Hydra's grammar takes as it is."""
    return str(QuotedString(text, Quote.single).with_quotes())


@cache
def _known_names() -> dict[str, str]:
    """Names in full, those of other tools too, and the key that each means."""
    foreign = {f"{target.split('.')[0]}.{word}": target for word, target in SYNONYMS.items() if "." in target}
    return foreign | {name: name for name in key_fields()}


@cache
def _known_words() -> dict[str, str]:
    """Words without a section and the key that each means; those that several sections have are left out."""
    keys = [name for name in key_fields() if ANY_NAME not in name]
    last_parts = [name.rpartition(".")[2] for name in keys]
    unique = {last: name for last, name in zip(last_parts, keys, strict=True) if last_parts.count(last) == 1}
    return unique | SYNONYMS | {section: section for section in section_classes()}


def assignment(target: str, value: str | None) -> str:
    """``key=value`` to type, with the value in the spelling that the key takes."""
    if "=" in target:
        return target.replace("%s", value or "...")
    if value is None:
        return target
    if target in OPTIONS:
        return f"{target}={OPTIONS[target].get(value.lower(), value)}"
    known = target in key_fields() and not is_text(target)
    fits = [other for other in VALUES.get(value.lower(), ()) if known and accepts(target, other)]
    return f"{target}={value_text(fits[0]) if fits else value}"


def _near(word: str, known: Iterable[str], cutoff: float) -> str:
    """The nearest of the `known` words, empty where none is near enough."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), "")


def _is_source(text: str) -> bool:
    """Whether an option looks like a file, a folder, a hub id or a ``kind:`` source."""
    return (
        "/" in text
        or ":" in text
        or text.startswith(("~", "."))
        or text.endswith(tuple(READERS))
        or Path(text).is_dir()
    )


def _spellings(key: str, value: Any) -> Iterator[Any]:
    """Other values that `value` may stand for, the likeliest first."""
    text = str(value).lower()
    yield from VALUES.get(text, ())
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    if isinstance(value, str):
        choices = {str(choice).lower(): choice for choice in _choices(key)}
        near = _near(text.replace("-", "_"), choices, CLOSE_WORD)
        if near:
            yield choices[near]
    if not isinstance(value, list | dict):
        yield [value]
    if key == "cluster.partitions" and isinstance(value, str):
        yield {value: {}}


def _choices(key: str) -> list[Any]:
    """The words that a key takes by name."""
    return [choice for member in _types(key) if get_origin(member) is Literal for choice in get_args(member)]


def _takes_list(key: str) -> bool:
    return any(get_origin(member) is list for member in _types(key))


def _types(key: str) -> tuple[Any, ...]:
    """The types that a key takes; none for what is not a key."""
    key_field = field_of(key)
    return () if key_field is None else members(key_field.annotation)
