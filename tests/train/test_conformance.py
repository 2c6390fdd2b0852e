"""Every architecture of `architectures` as a pack computes it, against stock transformers and PEFT.

A few of each path run always, the others are slow. What is not right yet is in `conformance_gaps`, and has to leave it when it is.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import conformance
import packs
from architectures import ARCHITECTURES, EXHAUSTIVE
from conformance import ROWS, Trained, adapter_error, relative_error
from conformance_gaps import GAPS
from train.data.sampling import TokenSequence, sequences_of
from train.errors import BadInput
from train.export import merge_adapter
from train.lora.peft_files import read_adapter
from train.nn.base import judge_architecture
from train.nn.generation import GenerationLimits, generate
from train.runtime.signals import StopFlag

# Some of each path, and one to refuse.
SHORT = {"llama", "phi4-mini", "gemma3", "qwen3-moe", "opt", "gpt2", "falcon-7b", "gptj", "qwen3.5", "doge-window"}
# Float32: what stock transformers and packs compute in another order.
EVAL_TOLERANCE, TRAIN_TOLERANCE, LOGIT_TOLERANCE = 1e-6, 1e-5, 1e-5
NEW_TOKENS = 12


def every_architecture(check: str, refused: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Parametrize over the architectures that are to be trained, or those that are to be refused, with the gaps of a check."""
    cases = []
    for name, architecture in ARCHITECTURES.items():
        if (architecture.path is None) == refused:
            gap = GAPS.get(name, {}).get(check)
            marks = [pytest.mark.xfail(strict=True, reason=gap)] if gap else []
            cases.append(pytest.param(name, marks=marks if name in SHORT else [*marks, *EXHAUSTIVE]))
    return pytest.mark.parametrize("name", cases)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """The pack of two runs on an architecture, trained once."""
    found: dict[str, Trained] = {}

    def get(name: str) -> Trained:
        if name not in found:
            found[name] = conformance.train(tmp_path_factory.mktemp("pack"), name)
        return found[name]

    return get


@every_architecture("path")
def test_it_takes_the_fastest_path_that_is_right(name: str) -> None:
    """By the judge that `plan` asks, which knows the configuration alone, and by the one that a job asks."""
    wanted = ARCHITECTURES[name].path
    assert judge_architecture(conformance.stock(name)).path == wanted
    assert conformance.verdict(name).path == wanted
    assert conformance.packed(name).path == wanted


@every_architecture("refusal", refused=True)
def test_a_refusal_says_what_was_measured(name: str) -> None:
    for verdict in (judge_architecture(conformance.stock(name)), conformance.verdict(name)):
        with pytest.raises(BadInput, match=r"differ by \d\.\de-\d+"):
            verdict.checked(name)


@every_architecture("evaluation")
def test_the_loss_of_each_row_is_stock_transformers(name: str) -> None:
    expected = conformance.stock_losses(conformance.stock(name), ROWS)
    found = conformance.pack_losses(conformance.packed(name), ROWS)
    assert float(((found - expected) / expected).abs().max()) < EVAL_TOLERANCE


@every_architecture("training")
def test_two_runs_learn_as_with_stock_peft(name: str, trained: Callable[[str], Trained]) -> None:
    pack = trained(name)
    for config, start, found in zip(pack.configs, pack.starts, pack.losses, strict=True):
        expected = conformance.stock_training(name, config, start)
        assert found == pytest.approx(expected, rel=TRAIN_TOLERANCE)
        # Something was learnt, so the comparison says something.
        assert max(expected) - min(expected) > 0.01


@every_architecture("isolation")
def test_another_run_changes_nothing(name: str, tmp_path: Path) -> None:
    """Neither by its rows nor by a NaN. Experts see other numbers of tokens then, and round otherwise."""
    tolerance = 1e-6 if ARCHITECTURES[name].moe else 0.0
    loop = conformance.started(tmp_path, name, conformance.packed(name))
    own = sequences_of(0, ROWS, np.arange(4))
    others = [
        TokenSequence(1, place, (tokens + shift) % packs.VOCABULARY, labels)
        for shift in (0, 5)
        for place, (tokens, labels) in enumerate(map(ROWS.example, range(4, 8)))
    ]
    losses, (gradient, _) = conformance.gradients(loop, own + others[:4])
    assert float(gradient_norm(gradient)) > 1e-3
    for ill in (False, True):
        if ill:
            for a, _ in loop.adapters.tensors(1).values():
                a.fill_(float("nan"))
        again, (same, _) = conformance.gradients(loop, own + others[4:])
        assert relative_error(again[:1], losses[:1]) <= tolerance
        assert adapter_error(same, gradient) <= tolerance
    assert bool(again[1].isnan())


def gradient_norm(adapter: conformance.Adapter) -> torch.Tensor:
    return torch.cat([matrix.flatten() for pair in adapter.values() for matrix in pair]).norm()


@every_architecture("nf4")
def test_nf4_is_the_dequantized_model(name: str) -> None:
    expected = conformance.stock_losses(conformance.dequantized(name), ROWS)
    found = conformance.pack_losses(conformance.packed(name, packs.NF4), ROWS)
    assert float(((found - expected) / expected).abs().max()) < EVAL_TOLERANCE
    unquantized = conformance.stock_losses(conformance.stock(name), ROWS)
    assert relative_error(expected, unquantized) > 1e-3


@every_architecture("checkpointing")
def test_checkpointed_activations_change_no_gradient(name: str, tmp_path: Path) -> None:
    found = []
    for recomputed in (False, True):
        base = conformance.packed(name)
        if recomputed:
            base.checkpoint_activations()
        loop = conformance.started(tmp_path / str(recomputed), name, base)
        sequences = [s for run in (0, 1) for s in sequences_of(run, ROWS, np.arange(4 * run, 4 * run + 4))]
        found.append(conformance.gradients(loop, sequences))
    (losses, kept), (same_losses, recomputed_gradients) = found
    assert torch.equal(losses, same_losses)
    for one, other in zip(kept, recomputed_gradients, strict=True):
        assert adapter_error(other, one) < 1e-6


@every_architecture("peft")
def test_stock_peft_loads_the_adapter_to_the_same_model(
    name: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    pack = trained(name)
    loop = pack.resume(tmp_path)
    untrained = conformance.stock_logits(conformance.stock(name))
    for row, run in enumerate(pack.runs):
        loaded = peft.PeftModel.from_pretrained(conformance.stock(name), run.adapter).eval()
        expected = conformance.stock_logits(loaded)
        assert relative_error(conformance.pack_logits(loop, row), expected) < LOGIT_TOLERANCE
        assert relative_error(expected, untrained) > 1e-2


@every_architecture("merge")
def test_the_merged_model_is_the_tuned_one(name: str, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    """The sum of weight and adapter is rounded to float32, which some families amplify: no more than PEFT's own merge."""
    pack = trained(name)
    for row, run in enumerate(pack.runs):
        adapter = read_adapter(run.adapter)
        tuned = conformance.stock_tuned(name, pack.configs[row].lora, adapter)
        expected = conformance.stock_logits(tuned)
        unavoidable = relative_error(conformance.stock_logits(tuned.merge_and_unload()), expected)
        model = conformance.stock(name)
        merge_adapter(model, adapter, pack.configs[row].lora)
        model.save_pretrained(tmp_path / str(row))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / str(row), dtype=torch.float32).eval()
        error = relative_error(conformance.stock_logits(merged), expected)
        assert error < max(LOGIT_TOLERANCE, 2 * unavoidable)


@every_architecture("generation")
def test_it_answers_as_stock_transformers(name: str, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    pack = trained(name)
    prompts = {row: [ROWS.example(row + i)[0][: 3 + 5 * i] for i in range(2)] for row in range(2)}
    loop = pack.resume(tmp_path)
    found = generate(loop.base, prompts, 2, GenerationLimits(NEW_TOKENS, set(), 10_000), StopFlag())
    for row, asked in prompts.items():
        model = conformance.stock_tuned(name, pack.configs[row].lora, read_adapter(pack.runs[row].adapter))
        assert found[row] == [conformance.stock_greedy(model, prompt, NEW_TOKENS) for prompt in asked]
