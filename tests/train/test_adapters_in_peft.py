"""What a run leaves behind is a stock PEFT adapter: loaded by PEFT it gives the trainer's own logits."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import packs
from train.data.micro_batch import MicroBatch
from train.data.sampling import TokenSequence
from train.errors import LorapackError
from train.nn.packed_model import PackedModel

CASES = {"plain": 0, "dropout": 1, "all-linear, rsLoRA": 2, "mlp": 3, "one layer": 5, "patterns": 6, "regex": 7}
TOKENS, LABELS = packs.random_table(1, seed=5).example(0)


@torch.no_grad()
def trainers_logits(base: PackedModel) -> torch.Tensor:
    """Logits [T, vocabulary] of the run in the first row of whatever pack sits on `base`."""
    batch = MicroBatch([TokenSequence(0, 0, TOKENS, LABELS)], 1, packs.CPU)
    return base.head.logits(base.hidden_states(batch))[:, : base.head.vocab_size]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.tensor(TOKENS).long()[None]).logits[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_peft_gives_the_trainers_logits(case: int, tmp_path: Path) -> None:
    base = packs.tiny_base(torch.float32)
    packs.train(tmp_path, base, [packs.DIVERSE[case]])
    ours = trainers_logits(base)
    model = packs.tiny_llama(torch.float32)
    untuned = logits(model)
    tuned = logits(peft.PeftModel.from_pretrained(model, packs.run_dirs(tmp_path)[0].adapter).eval())
    torch.testing.assert_close(ours, tuned, atol=1e-5, rtol=0)
    assert float((tuned - untuned).abs().max()) > 0.01


def test_an_adapter_that_is_not_the_trained_one_is_not_written(tmp_path: Path) -> None:
    loop = packs.make_loop(tmp_path, packs.tiny_base(torch.float32), [packs.run_config()])
    del loop.sessions[0].targets["model.layers.1.self_attn.v_proj"]
    with pytest.raises(LorapackError, match=r"model\.layers\.1\.self_attn\.v_proj.* is in the file and not expected"):
        loop.run()
    run = packs.run_dirs(tmp_path)[0]
    assert not run.adapter.exists()
    assert not run.result.exists()
    assert run.checkpoint_steps()
