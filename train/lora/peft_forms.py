"""The configuration with which stock PEFT adapts exactly the modules that were trained; found by trying PEFT on the meta device.

PEFT does not always mean by a target what training means by it:

- ``q_proj`` also names modules beside the decoder, as in the vision tower of Gemma 3 4B.
- Over many mixtures of experts PEFT 0.21 takes ``gate_proj``, ``up_proj`` and ``down_proj`` for the stacked experts, however they are
  named: by their last part, in full, by a regular expression. It then adapts neither dense nor shared MLPs, and drops their tensors
  with a warning. It leaves parameters alone: ``target_parameters=["up_proj.weight"]`` takes the same tensors under the same names.

So forms of the configuration are tried in turn, the most readable first, and the first that fits is written.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from train.config import LoraConfig, ModelConfig
from train.errors import BadInput, LorapackError
from train.lora.targets import ALL_LINEAR, Target
from train.model.linears import FrozenLinear, frozen_linears

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig

PREFIX = "base_model.model."
# How many differences an error names.
NAMED_DIFFERENCES = 3
LONGEST_REASON = 300

Adapter = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Form:
    """One way to name the adapted modules; `parameters` are those that PEFT does not find as modules."""

    modules: list[str] | str
    layers: list[int] | None = None
    parameters: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Trial:
    """What PEFT made of a form: `differences` from what was trained, in words, and the trained modules that it left out."""

    differences: list[str]
    lost: list[str]


class StockPeft:
    """What stock PEFT makes of adapters of one base; an answer is kept for the other runs of a pack.

    Args:
        model: the base, which every adapter names.
        skeleton: makes the base on the meta device, as stock transformers does; called once, where something is asked.
    """

    def __init__(self, model: ModelConfig, skeleton: Callable[[], PreTrainedModel]) -> None:
        self._model = model
        self._skeleton = skeleton
        self._found: dict[str, PeftLoraConfig] = {}

    @cached_property
    def _base(self) -> PreTrainedModel:
        """The base as it is; PEFT, which changes a model, gets copies."""
        return self._skeleton()

    @cached_property
    def _linears(self) -> dict[str, FrozenLinear]:
        return frozen_linears(self._base)

    def config(self, lora: LoraConfig, targets: Mapping[str, Target], tensors: Adapter) -> PeftLoraConfig:
        """The configuration of `lora` with which PEFT loads `tensors` as the adapter of `targets`.

        A form fits if PEFT adapts the `targets` and no other module, each with its rank and scaling, and if the keys and shapes that
        it expects are those of `tensors`.

        Raises:
            BadInput: none fits. The message has the first differences, and targets that PEFT loads.
            LorapackError: one fits `targets`, but `tensors` are not what training them gives.
        """
        blank = {name: (a.to("meta"), b.to("meta")) for name, (a, b) in tensors.items()}
        key = f"{lora.model_dump_json()} {targets} {[(name, a.shape, b.shape) for name, (a, b) in blank.items()]}"
        if key not in self._found:
            self._found[key] = self._search(lora, targets, blank)
        return deepcopy(self._found[key])

    def check(self, lora: LoraConfig, targets: Mapping[str, Target]) -> None:
        """Refuse an adapter that has not been trained yet, if PEFT could not load it.

        Raises:
            BadInput: see `config`.
        """
        # Where no pattern tells modules apart, rank and strength decide nothing: a search of a thousand runs asks a few questions.
        if not (lora.rank_pattern or lora.alpha_pattern):
            lora = LoraConfig(
                r=1, lora_alpha=1.0, target_modules=lora.target_modules, layers_to_transform=lora.layers_to_transform
            )
            targets = dict.fromkeys(targets, Target(r=1, alpha=1.0, scaling=1.0))
        self.config(lora, targets, self._blank(targets))

    def _search(self, lora: LoraConfig, targets: Mapping[str, Target], tensors: Adapter) -> PeftLoraConfig:
        found, trial = self._first_fit(lora, targets, tensors)
        if found is not None:
            return found
        if self._fits(lora, targets):
            raise LorapackError(
                f"the adapter to be written is not the one that was to be trained: {_some(trial.differences)}. Its checkpoints are "
                "kept; please report this."
            )
        kinds = dict.fromkeys(_last_part(name) for name in targets)
        parts = {kind: {name: t for name, t in targets.items() if _last_part(name) == kind} for kind in kinds}
        good = [kind for kind, part in parts.items() if self._fits(lora, part)]
        advice = f"set lora.target_modules=[{','.join(good)}], which it loads" if good else "choose another model"
        raise BadInput(
            f"PEFT would not load an adapter with lora.target_modules={lora.target_modules!r} over {self._model.source!r} as it is "
            f"trained: {_some(trial.differences)}; {advice}."
        )

    def _fits(self, lora: LoraConfig, targets: Mapping[str, Target]) -> bool:
        """Whether some form fits an adapter of `targets` with the tensors that it ought to have."""
        return self._first_fit(lora, targets, self._blank(targets))[0] is not None

    def _first_fit(
        self, lora: LoraConfig, targets: Mapping[str, Target], tensors: Adapter
    ) -> tuple[PeftLoraConfig | None, Trial]:
        """The first form that fits, and the last trial."""
        names = list(targets)
        whole = [Form(_spelled_out(lora.target_modules, names), lora.layers_to_transform), Form(names)]
        found, trial = self._first_of(whole, lora, targets, tensors)
        # Named in full and lost all the same: PEFT finds these as parameters only.
        if found is None and trial.lost:
            return self._first_of(_split_forms(names, trial.lost), lora, targets, tensors)
        return found, trial

    def _first_of(
        self, forms: Sequence[Form], lora: LoraConfig, targets: Mapping[str, Target], tensors: Adapter
    ) -> tuple[PeftLoraConfig | None, Trial]:
        trial = Trial([], [])
        for form in forms:
            config = self._config(lora, form, list(targets))
            trial = self._try(config, targets, tensors)
            if not trial.differences:
                return config, trial
        return None, trial

    def _config(self, lora: LoraConfig, form: Form, names: Sequence[str]) -> PeftLoraConfig:
        """`form` as PEFT writes it; LoRA+ is part of training, so PEFT has no field for it."""
        # Here, since PEFT is slow to import.
        from peft import LoraConfig as PeftLoraConfig

        config = PeftLoraConfig(
            base_model_name_or_path=self._model.source,
            revision=self._model.revision,
            task_type="CAUSAL_LM",
            inference_mode=True,
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            # Dropout acts in training alone, and PEFT refuses it for parameters.
            lora_dropout=0.0 if form.parameters else lora.lora_dropout,
            target_modules=form.modules,
            target_parameters=form.parameters or None,
            use_rslora=lora.use_rslora,
            layers_to_transform=form.layers,
            rank_pattern=_patterns(lora.rank_pattern, form),
            alpha_pattern=_patterns(lora.alpha_pattern, form),
            # GPT-2's Conv1D keeps [in, out], a linear layer [out, in].
            fan_in_fan_out=any(name in self._linears and self._linears[name].transposed for name in names),
            bias=lora.bias,
        )
        # PEFT writes a set in the order of its hashes, which differ from process to process.
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)
        return config

    def _try(self, config: PeftLoraConfig, targets: Mapping[str, Target], tensors: Adapter) -> Trial:
        """Load meta tensors with `config`, as `PeftModel.from_pretrained` does, and compare."""
        from peft import get_peft_model, set_peft_model_state_dict

        stored = {
            f"{PREFIX}{name}.lora_{letter}.weight": matrix
            for name, pair in tensors.items()
            for letter, matrix in zip("AB", pair, strict=True)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                # A copy, since PEFT rewrites it. Without dropout: PEFT refuses it where it takes targets for experts, and would not
                # say which.
                tried = replace(deepcopy(config), lora_dropout=0.0)
                model = get_peft_model(deepcopy(self._base), tried, low_cpu_mem_usage=True)
                loaded = set_peft_model_state_dict(model, stored, low_cpu_mem_usage=True)
            # What PEFT refuses, it refuses with whatever type: a module of a kind that it does not adapt, tensors of other shapes.
            except Exception as exc:
                return Trial([f"PEFT says {' '.join(str(exc).split())[:LONGEST_REASON]}"], [])
        made = _adapters(model)
        differences = list(_module_differences(made, targets))
        differences += [f"{key} is expected and not in the file" for key in loaded.missing_keys if ".lora_" in key]
        differences += [f"{key} is in the file and not expected" for key in loaded.unexpected_keys]
        return Trial(differences, [name for name in targets if name not in made])

    def _blank(self, targets: Mapping[str, Target]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """An adapter without numbers, of the shapes that training gives it.

        Raises:
            BadInput: the base has no such module.
        """
        missing = [name for name in targets if name not in self._linears]
        if missing:
            raise BadInput(
                f"transformers has no linear layer {_some(missing)} in {self._model.source!r}, so PEFT could not load an adapter of "
                "it; choose another model."
            )
        blank = {}
        for name, target in targets.items():
            out_features, in_features = self._linears[name].shape
            shapes = (target.r, in_features), (out_features, target.r)
            blank[name] = (torch.empty(shapes[0], device="meta"), torch.empty(shapes[1], device="meta"))
        return blank


def _spelled_out(target_modules: list[str] | str, names: Sequence[str]) -> list[str] | str:
    """``all-linear`` by the last parts of module names, as PEFT saves it: other readers do not know ``all-linear``."""
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        return _last_parts(names)
    return target_modules


def _split_forms(names: Sequence[str], lost: Sequence[str]) -> list[Form]:
    """What PEFT `lost` as parameters and the rest as modules: by their last parts, then in full."""
    kept = [name for name in names if name not in set(lost)]
    return [
        Form(spell(kept), parameters=[f"{name}.weight" for name in spell(lost)]) for spell in (_last_parts, list[str])
    ]


def _patterns(patterns: Mapping[str, float], form: Form) -> dict[str, Any]:
    """Patterns of module names, so that they also fit the names of parameters where the form has some."""
    return {rf"({pattern})(\.weight)?" if form.parameters else pattern: value for pattern, value in patterns.items()}


def _adapters(model: torch.nn.Module) -> dict[str, Any]:
    """PEFT's layers with an adapter, by the base's names."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix(PREFIX): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


def _module_differences(made: Mapping[str, Any], targets: Mapping[str, Target]) -> Iterator[str]:
    for name in made.keys() - targets.keys():
        yield f"{name} would be adapted too"
    for name, target in targets.items():
        if name not in made:
            yield f"{name} would not be adapted"
            continue
        r, scaling = made[name].r["default"], made[name].scaling["default"]
        if (r, scaling) != (target.r, target.scaling):
            yield f"{name} would have rank {r} and scaling {scaling} instead of {target.r} and {target.scaling}"


def _last_parts(names: Sequence[str]) -> list[str]:
    return sorted({_last_part(name) for name in names})


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _some(texts: Sequence[str]) -> str:
    more = len(texts) - NAMED_DIFFERENCES
    return "; ".join(texts[:NAMED_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
