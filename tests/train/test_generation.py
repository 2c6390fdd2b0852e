"""Greedy answers of a pack, token by token, against transformers' own generation with each run's adapter loaded by PEFT."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch

import packs
from architectures import ARCHITECTURES, VOCABULARY, tiny_model
from train.nn.generation import GenerationLimits, generate
from train.nn.packed_model import DeviceSetup, pack_model
from train.runtime.signals import StopFlag, Stopped
from train.sizing import ComputePath
from train.store.layout import RunDir

MAX_TOKENS = 12
UNCLOSED = GenerationLimits(MAX_TOKENS, set(), 10_000)
PROMPTS = [np.random.default_rng(i).integers(0, packs.VOCABULARY, 2 + 3 * i).astype(np.int32) for i in range(4)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """The eight diverse runs, trained for a few steps so that each answers in its own way."""
    folder = tmp_path_factory.mktemp("pack")
    packs.train(folder, packs.tiny_base(), packs.DIVERSE)
    return packs.run_dirs(folder)


def reference(adapter: Path | None, prompt: np.ndarray, ends: set[int]) -> list[int]:
    """What transformers says."""
    model = packs.tiny_llama()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).to(torch.float64).eval()
    tokens = torch.from_numpy(prompt).long()[None]
    out = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,
    )
    return [int(token) for token in out[0, len(prompt) :]]


@pytest.mark.slow
@pytest.mark.parametrize("device", packs.DEVICES, ids=str)
@pytest.mark.parametrize("micro_batch_tokens", [10_000, 30], ids=["whole", "cut"])
@pytest.mark.parametrize("ends", [set(), set(range(0, 97, 4))], ids=["to the limit", "until closed"])
def test_every_run_answers_as_transformers_with_its_adapter(
    trained: list[RunDir], tmp_path: Path, micro_batch_tokens: int, ends: set[int], device: torch.device
) -> None:
    base = packs.tiny_base(device=device)
    pack = packs.make_loop(tmp_path, base, packs.DIVERSE)
    for session, run in zip(pack.sessions, trained, strict=True):
        loaded = peft.load_peft_weights(str(run.adapter))
        for name, (a, b) in pack.adapters.tensors(session.run_index).items():
            a.copy_(loaded[f"base_model.model.{name}.lora_A.weight"])
            b.copy_(loaded[f"base_model.model.{name}.lora_B.weight"])
    # Not all runs ask the same.
    prompts = {row: PROMPTS[: 1 + row % 4] for row in range(8)}
    found = generate(base, prompts, 8, GenerationLimits(MAX_TOKENS, ends, micro_batch_tokens), StopFlag())
    expected = {row: [reference(trained[row].adapter, p, ends) for p in asked] for row, asked in prompts.items()}
    assert found == expected
    assert len({tuple(answers[0]) for answers in found.values()}) > 3, "the runs hardly differ: that proves little"


# FlashAttention and grouped products run on GPUs alone.
@pytest.mark.gpu
def test_in_half_precision_on_a_gpu_the_cache_changes_no_answer(tmp_path: Path) -> None:
    base = packs.tiny_base(torch.bfloat16, device=torch.device("cuda"))
    packs.make_loop(tmp_path, base, packs.DIVERSE)
    found = generate(base, dict.fromkeys(range(8), PROMPTS), 8, UNCLOSED, StopFlag())
    follow = [[np.append(p, answer[:-1]) for p, answer in zip(PROMPTS, own, strict=True)] for own in found.values()]
    # The last token alone, without a cache.
    again = generate(base, dict(enumerate(follow)), 8, GenerationLimits(1, set(), 10_000), StopFlag())
    pairs = [(own[-1], anew[0]) for run in range(8) for own, anew in zip(found[run], again[run], strict=True)]
    # Two likeliest tokens may be as likely.
    assert sum(own == anew for own, anew in pairs) > 0.9 * len(pairs)


@pytest.mark.parametrize("path", ["own", "flat", "padded"])
def test_the_bare_base_answers_as_transformers(path: ComputePath) -> None:
    base = packs.tiny_base(path=path)
    assert base.path == path
    found = generate(base, {0: PROMPTS}, 1, UNCLOSED, StopFlag())
    assert found == {0: [reference(None, prompt, set()) for prompt in PROMPTS]}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        *((name, "padded") for name in ("gpt2", "falcon-alibi", "qwen3.5", "gpt-oss", "falcon-h1", "llama4")),
        # Windows of 8 tokens, caps, heads of several sizes, keys shared between layers.
        *((name, "flat") for name in ("mistral", "gemma2", "gemma3", "gemma4-small", "youtu", "qwen3-moe")),
    ],
)
def test_any_architecture_answers_as_transformers(name: str, path: ComputePath) -> None:
    if missing := ARCHITECTURES[name].missing:
        pytest.skip(missing)
    prompts = [np.arange(3, 3 + n, dtype=np.int32) % VOCABULARY for n in (2, 7, 11)]
    setup = DeviceSetup(packs.SIXTEEN_BIT, packs.CPU, "resident", longest=64)
    found = generate(pack_model(tiny_model(name), setup, path=path), {0: prompts}, 1, UNCLOSED, StopFlag())[0]
    model = tiny_model(name)
    for prompt, answer in zip(prompts, found, strict=True):
        tokens = torch.from_numpy(prompt).long()
        for token in answer:
            with torch.no_grad():
                assert int(model(tokens[None], use_cache=False).logits[0, -1].argmax()) == token
            tokens = torch.cat([tokens, torch.tensor([token])])


def test_an_answer_ends_with_the_first_closing_token_or_at_the_limit() -> None:
    (whole,) = generate(packs.tiny_base(), {0: PROMPTS[:1]}, 1, UNCLOSED, StopFlag())[0]
    assert len(whole) == MAX_TOKENS
    (closed,) = generate(
        packs.tiny_base(), {0: PROMPTS[:1]}, 1, GenerationLimits(MAX_TOKENS, {whole[2]}, 100), StopFlag()
    )[0]
    assert closed == whole[: whole.index(whole[2]) + 1]


def test_it_stops_when_the_job_is_asked_to() -> None:
    stop = StopFlag()
    stop.signal_name = "SIGTERM"
    with pytest.raises(Stopped):
        generate(packs.tiny_base(), {0: PROMPTS}, 1, UNCLOSED, stop)
