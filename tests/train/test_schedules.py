"""Schedules: their arguments are transformers', and run ids from before there were arguments stay what they were."""

import inspect
from typing import Any, get_args

import pytest
import torch
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

import packs
from train.config import RunConfig, parse_run_config
from train.errors import BadInput
from train.schedules import SCHEDULES, ScheduleName
from train.trainer.optim import learning_rate_schedule

FROM_THE_TRAINER = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
NOT_OF_THE_STEP_ALONE = {"reduce_lr_on_plateau", "greedy"}

ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-4, "power": 2.0}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 4}),
    ("warmup_stable_decay", {"num_decay_steps": 5}),
    ("warmup_stable_decay", {"num_decay_steps": 5, "num_stable_steps": 3, "decay_type": "1-sqrt", "min_lr_ratio": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 1e-4}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.0}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}),
]


def test_names_arguments_and_defaults_are_those_of_transformers() -> None:
    assert (
        set(get_args(ScheduleName)) == set(SCHEDULES) == {kind.value for kind in SchedulerType} - NOT_OF_THE_STEP_ALONE
    )
    for name, arguments in SCHEDULES.items():
        theirs = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters
        assert set(arguments.model_fields) == set(theirs) - FROM_THE_TRAINER, name
        for key, field in arguments.model_fields.items():
            required = theirs[key].default is inspect.Parameter.empty
            assert field.is_required() == required, (name, key)
            assert required or field.default == theirs[key].default, (name, key)


@pytest.mark.parametrize(("name", "arguments"), ARGUMENTS)
def test_rates_are_those_of_transformers_step_by_step(name: str, arguments: dict[str, Any]) -> None:
    values = {"lr_scheduler_type": name, "lr_scheduler_kwargs": arguments, "warmup_ratio": 0.3, "max_steps": 20}
    config = packs.run_config(train=values).train
    rate = learning_rate_schedule(config, 20)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    total = None if "num_stable_steps" in arguments else 20
    scheduler = get_scheduler(name, optimizer, config.warmup(20), total, arguments)
    for step in range(20):
        assert rate(step) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    # In any order, since a resumed run begins in the middle.
    assert rate(7) == rate(7)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cosine", {"cycles": 2.0}, "unknown key 'cycles'; valid keys there are num_cycles"),
        (
            "linear",
            {"num_cycles": 2.0},
            "unknown key 'num_cycles'; none is valid there (train.lr_scheduler_type=linear)",
        ),
        ("cosine_with_restarts", {"num_cycles": 2.5}, "num_cycles=2.5"),
        ("warmup_stable_decay", {}, "num_decay_steps is missing"),
        ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "sqrt"}, "decay_type='sqrt'"),
        ("cosine_with_min_lr", {}, "either min_lr or min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 0.0, "min_lr_rate": 0.1}, "either min_lr or min_lr_rate"),
        ("polynomial", {"lr_end": 0.5}, "lr_end=0.5 is not below train.learning_rate=0.01"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_valid(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as refusal:
        packs.run_config(train={"lr_scheduler_type": name, "lr_scheduler_kwargs": arguments})
    assert message in str(refusal.value)


def config_of(train: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    return parse_run_config(
        {
            "model": {"name": "tiny", "source": "builtin:tiny", "fingerprint": "hub:0123456789"},
            "data": {"name": "tasks", "source": "builtin:tasks", "fingerprint": "abcdef"} | sections.get("data", {}),
            "lora": {"r": 8, "lora_alpha": 16.0, "target_modules": "all-linear"} | sections.get("lora", {}),
            "quant": {"load_in_4bit": False} | sections.get("quant", {}),
            "train": {"learning_rate": 1e-3, "batch_size": 4} | train,
        }
    )


def test_run_ids_of_version_0_1_0_stay_valid() -> None:
    """Computed by 0.1.0: a run that it finished is not trained again."""
    cosine = {"max_steps": 60, "lr_scheduler_type": "cosine", "warmup_ratio": 0.05}
    epochs = {"num_train_epochs": 3, "seed": 7, "dtype": "bfloat16", "save_steps": 9}
    warmup = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "micro_batch_tokens": 4096}
    before = {
        "04a6e2968e": config_of({}),
        "055f3a6dce": config_of(cosine, lora={"r": 16, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}),
        "e13b11960c": config_of(
            epochs,
            lora={"rank_pattern": {"q_proj": 4}, "loraplus_lr_ratio": 4.0},
            quant={"load_in_4bit": True},
        ),
        "a2fc648e58": config_of(warmup, data={"max_length": 1024, "format": "chat", "eval_rows": 50}),
    }
    assert {config.run_id(): run_id for run_id, config in before.items()} == {run_id: run_id for run_id in before}


def test_arguments_decide_the_run_id_by_what_they_change() -> None:
    def run_id(**arguments: Any) -> str:
        return config_of({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": arguments}).run_id()

    assert run_id() == run_id(num_cycles=0.5)
    assert run_id(num_cycles=1) == run_id(num_cycles=1.0) != run_id()
