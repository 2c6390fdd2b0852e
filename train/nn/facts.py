"""The facts of a model (`train.model.facts`), measured: sizes on a model without weights, the path on a small copy."""

from __future__ import annotations

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from train.config import ModelConfig
from train.errors import BadInput, StorageError
from train.model.anatomy import decoder_layers, layers_name, text_decoder
from train.model.copies import small_model
from train.model.experts import expert_stacks
from train.model.facts import ModelFacts, facts_file, read_facts
from train.model.layer_kinds import text_config
from train.model.linears import frozen_linears
from train.model.loading import CHOOSE_ANOTHER, foreign_errors, quiet, stock_skeleton
from train.model.narrowing import chosen_experts
from train.nn.base import judge_architecture
from train.nn.description import Undescribable
from train.nn.kept import activations
from train.nn.reading import describe_model
from train.sizing import Activations
from train.store.layout import CacheDir
from train.store.record_file import write_record
from train.store.storage import make_folder

# How transformers' decoders name the module that makes angles of positions.
ROTATION = "rotary_emb"
FEW_POSITIONS = 8
# No text is longer.
LONGEST_TEXT = 2**18


def known_facts(model_dir: Path, model: ModelConfig, cache: CacheDir) -> ModelFacts:
    """The facts of the model in a folder, from the cache; measured now, and kept there, if the cache does not have them.

    Raises:
        BadInput: transformers cannot build the model.
    """
    found = read_facts(model_dir, model, cache)
    if found is not None and found.judged:
        return found
    full = _skeleton(model_dir, model)
    sizes = measure_sizes(full)
    # First without a verdict: if this process is stopped meanwhile, the sizes are known.
    _keep(sizes, facts_file(model_dir, model, cache))
    facts = with_verdict(sizes, full)
    _keep(facts, facts_file(model_dir, model, cache))
    return facts


def _skeleton(model_dir: Path, model: ModelConfig) -> PreTrainedModel:
    with quiet(), foreign_errors(f"the model in {model_dir}", CHOOSE_ANOTHER):
        return stock_skeleton(model_dir, model)


def measure_sizes(full: PreTrainedModel) -> ModelFacts:
    """The facts of a model, without a verdict; its weights may be on ``meta``.

    Raises:
        BadInput: no list of decoder layers is found.
    """
    text = text_config(full.config)
    embedding, head = full.get_input_embeddings(), full.get_output_embeddings()
    if head is None:
        raise BadInput(
            f"the architecture {full.config.model_type!r} is not a decoder that predicts the next token; choose another model."
        )
    stacks = expert_stacks(full).values()
    linears = {name: linear.shape for name, linear in frozen_linears(full).items()}
    hidden = embedding.weight.shape[1]
    kept = _activations(full, linears, hidden)
    return ModelFacts(
        model_type=full.config.model_type,
        layers=len(decoder_layers(full)),
        hidden=hidden,
        vocabulary=head.weight.shape[0],
        parameters=sum(parameter.numel() for parameter in {*text_decoder(full).parameters(), *head.parameters()}),
        linears=linears,
        tied=head.weight is embedding.weight,
        kept=None if kept is None else kept.kept,
        kept_inputs=[] if kept is None else [(sorted(names), width) for names, width in kept.inputs],
        expert_parameters=sum(stack.weight.numel() for stack in stacks),
        experts=max((stack.experts for stack in stacks), default=0),
        chosen=chosen_experts(vars(text)) if stacks else 0,
    )


def _activations(full: PreTrainedModel, linears: dict[str, tuple[int, int]], hidden: int) -> Activations | None:
    """What our decoder would keep for the backward; None for an architecture that it does not compute."""
    try:
        description = describe_model(full)
    except Undescribable:
        return None
    return activations(description, layers_name(full), linears, hidden)


def with_verdict(sizes: ModelFacts, full: PreTrainedModel) -> ModelFacts:
    """`sizes` with the judge's verdict on the architecture."""
    try:
        verdict = judge_architecture(full)
        path = verdict.checked(sizes.model_type)
    except BadInput as exc:
        return sizes.model_copy(update={"refusal": str(exc)})
    # Our decoder turns each sequence by its own length.
    longest = None if path == "own" else longest_of_one_rotation(small_model(full))
    attempts = [str(attempt) for attempt in verdict.attempts]
    return sizes.model_copy(update={"path": path, "attempts": attempts, "longest": longest})


@torch.no_grad()
def longest_of_one_rotation(model: PreTrainedModel) -> int | None:
    """Up to how many tokens positions turn by the same angles whatever the length of the text; None if always.

    LongRoPE (arXiv 2402.13753) takes other frequencies where any text of a batch is longer than the texts of pretraining.
    """
    modules = [module for name, module in text_decoder(model).named_modules() if name.endswith(ROTATION)]
    bounds = [bound for bound in map(_bound_of_rotation, modules) if bound is not None]
    return min(bounds, default=None)


def _bound_of_rotation(module: Any) -> int | None:
    """Bisect for the first length at which the first positions turn otherwise."""
    x = torch.zeros(1, 1, 8)
    below, beyond = FEW_POSITIONS, LONGEST_TEXT

    def turns(length: int) -> torch.Tensor:
        # A copy, as the module keeps the frequencies that it used last.
        cos: torch.Tensor = copy.deepcopy(module)(x, torch.arange(length)[None])[0]
        return cos[..., :FEW_POSITIONS, :].clone()

    try:
        first = turns(below)
        if torch.equal(turns(beyond), first):
            return None
        while beyond - below > 1:
            middle = (below + beyond) // 2
            below, beyond = (middle, beyond) if torch.equal(turns(middle), first) else (below, middle)
    # A rotation that is called otherwise, such as one per kind of layer.
    except (TypeError, RuntimeError, ValueError):
        return None
    return below


def _keep(facts: ModelFacts, file: Path) -> None:
    # A cache that is read-only for this user: it is measured again next time.
    with suppress(StorageError):
        make_folder(file.parent)
        write_record(file, facts)
