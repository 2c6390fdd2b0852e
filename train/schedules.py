"""The learning rate schedules and their arguments. Light: it checks them without importing transformers.

Names, arguments and defaults are those of transformers' `get_scheduler`; a test compares them with its signatures. Its kinds
``reduce_lr_on_plateau`` and ``greedy`` are left out: their rate depends on past losses, not on the step alone, so a resumed run
could not repeat it.

A kind that transformers adds is a name in `ScheduleName` and its arguments in `SCHEDULES`. One that transformers lacks would also need
a case in `train.trainer.optim.learning_rate_schedule`, which calls `get_scheduler`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ScheduleName = Literal[
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
]
Shape = Literal["linear", "cosine", "1-sqrt"]


class ScheduleArguments(BaseModel):
    """What ``train.lr_scheduler_kwargs`` may hold for one schedule: nothing here, more in the subclasses."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def refuse_learning_rate(self, learning_rate: float) -> None:
        """Refuse a `learning_rate` that the schedule cannot begin from.

        Raises:
            ValueError: naming both values.
        """


class Cosine(ScheduleArguments):
    """Half a cosine wave from the learning rate to 0; `num_cycles` counts whole waves."""

    num_cycles: float = Field(0.5, gt=0)


class CosineWithRestarts(ScheduleArguments):
    """`num_cycles` half waves, each from the learning rate to 0 (SGDR, arXiv 1608.03983)."""

    num_cycles: int = Field(1, ge=1)


class Polynomial(ScheduleArguments):
    """From the learning rate to `lr_end`, by the `power` of what remains."""

    lr_end: float = Field(1e-7, ge=0)
    power: float = Field(1.0, gt=0)

    def refuse_learning_rate(self, learning_rate: float) -> None:
        """Refuse a rate that is not above `lr_end`."""
        if learning_rate <= self.lr_end:
            raise ValueError(
                f"lr_end={self.lr_end} is not below train.learning_rate={learning_rate}; choose a smaller lr_end"
            )


class InverseSqrt(ScheduleArguments):
    """Falls with the inverse square root of the step, which is 1/2 after three times `timescale` (null: the warm-up steps)."""

    timescale: int | None = Field(None, ge=1)


class WarmupStableDecay(ScheduleArguments):
    """Constant after the warm-up, then `num_decay_steps` down to `min_lr_ratio` of the learning rate.

    `num_stable_steps` null means all steps that warm-up and decay leave.
    """

    num_decay_steps: int = Field(ge=0)
    num_stable_steps: int | None = Field(None, ge=0)
    warmup_type: Shape = "linear"
    decay_type: Shape = "cosine"
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    num_cycles: float = Field(0.5, gt=0)


class CosineWithMinLr(Cosine):
    """A cosine that ends at `min_lr`, or at `min_lr_rate` times the learning rate."""

    min_lr: float | None = Field(None, ge=0)
    min_lr_rate: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _one_minimum(self) -> CosineWithMinLr:
        if (self.min_lr is None) == (self.min_lr_rate is None):
            raise ValueError(
                "give either min_lr or min_lr_rate, not both, as in 'train.lr_scheduler_kwargs={min_lr_rate:0.1}'"
            )
        return self


class CosineWarmupWithMinLr(CosineWithMinLr):
    """The same, with a warm-up from `warmup_lr_rate` times the learning rate (null: one over the warm-up steps)."""

    warmup_lr_rate: float | None = Field(None, ge=0, le=1)


SCHEDULES: dict[ScheduleName, type[ScheduleArguments]] = {
    "linear": ScheduleArguments,
    "cosine": Cosine,
    "constant": ScheduleArguments,
    "constant_with_warmup": ScheduleArguments,
    "cosine_with_restarts": CosineWithRestarts,
    "polynomial": Polynomial,
    "inverse_sqrt": InverseSqrt,
    "warmup_stable_decay": WarmupStableDecay,
    "cosine_with_min_lr": CosineWithMinLr,
    "cosine_warmup_with_min_lr": CosineWarmupWithMinLr,
}


def given_arguments(name: ScheduleName, values: dict[str, Any]) -> dict[str, Any]:
    """The checked `values` of a schedule, as numbers of the right type: an integer where a float is meant becomes one.

    Raises:
        pydantic.ValidationError: an unknown argument, a wrong value, or one that is missing.
    """
    return SCHEDULES[name].model_validate(values).model_dump(exclude_unset=True)


def deciding_arguments(name: ScheduleName, values: dict[str, Any]) -> dict[str, Any]:
    """`values` without those that say what holds anyway: equal for schedules that are equal."""
    return SCHEDULES[name].model_validate(values).model_dump(exclude_defaults=True)
