"""The packed trainer against plain transformers + peft + torch.optim.AdamW, batch by batch in the same order."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch.nn.utils.rnn import pad_sequence
from transformers import BitsAndBytesConfig, LlamaForCausalLM, get_scheduler

import packs
from json_lines import read_lines
from train.config import QuantConfig, RunConfig
from train.data.sampling import examples_of_step
from train.data.token_table import TokenizedData

STEPS = 10
CONFIGS = [
    packs.run_config({"r": 8}, {"max_steps": STEPS, "lr_scheduler_type": "cosine", "warmup_steps": 2, "eval_steps": 0}),
    packs.run_config(
        {"r": 4, "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"up_proj": 2}},
        {"max_steps": STEPS, "batch_size": 6, "weight_decay": 0.1, "max_grad_norm": 0.5, "eval_steps": 0, "seed": 5},
    ),
    packs.run_config(
        {"r": 16, "loraplus_lr_ratio": 8.0}, {"max_steps": STEPS, "learning_rate": 1e-3, "eval_steps": 0, "seed": 6}
    ),
]


def reference_losses(
    config: RunConfig, model: LlamaForCausalLM, data: TokenizedData, start: dict[str, Any]
) -> list[float]:
    """The textbook loop: padded batches, PEFT's layers, torch's optimizer, transformers' schedule."""
    lora, train = config.lora, config.train
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.r, lora_alpha=lora.lora_alpha, target_modules=lora.target_modules, use_rslora=lora.use_rslora,
            rank_pattern=lora.rank_pattern, alpha_pattern=lora.alpha_pattern, task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    parameters = dict(adapted.named_parameters())
    for name, (a, b) in start.items():
        parameters[f"base_model.model.{name}.lora_A.default.weight"].data.copy_(a)
        parameters[f"base_model.model.{name}.lora_B.default.weight"].data.copy_(b)
    ratio = lora.loraplus_lr_ratio or 1.0
    groups = [
        {"params": [p for n, p in parameters.items() if f"lora_{part}" in n], "lr": train.learning_rate * factor}
        for part, factor in (("A", 1.0), ("B", ratio))
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=train.weight_decay)
    schedule = get_scheduler(train.lr_scheduler_type, optimizer, train.warmup(STEPS), STEPS)
    losses = []
    for step in range(STEPS):
        rows = [data.train.example(int(row)) for row in examples_of_step(train, len(data.train), step)]
        tokens = pad_sequence([torch.tensor(t).long() for t, _ in rows], batch_first=True, padding_value=0)
        labels = pad_sequence([torch.tensor(x).long() for _, x in rows], batch_first=True, padding_value=-100)
        mask = pad_sequence([torch.ones(len(t), dtype=torch.long) for t, _ in rows], batch_first=True)
        loss = adapted(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        if train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def mend(model: LlamaForCausalLM) -> None:
    """Keep bitsandbytes from its bfloat16 kernel without gradient, which it takes on CPUs with AVX512-BF16 even in float32."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            assert hasattr(module, "support_avx512bf16_for_cpu"), (
                "bitsandbytes renamed its switch; look at what replaced it"
            )
            module.support_avx512bf16_for_cpu = False


@pytest.mark.parametrize("quant", [packs.SIXTEEN_BIT, packs.NF4], ids=["32 bit", "NF4"])
def test_losses_equal_those_of_the_textbook(tmp_path: Path, quant: QuantConfig) -> None:
    data = packs.random_data()
    packs.tiny_llama(torch.float32).save_pretrained(tmp_path / "model")
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    loop = packs.make_loop(tmp_path / "pack", packs.tiny_base(torch.float32, quant, "nf4"), CONFIGS, data)
    starts = [
        {name: (a.clone(), b.clone()) for name, (a, b) in loop.adapters.tensors(row).items()}
        for row in range(len(CONFIGS))
    ]
    loop.run()
    for row, config in enumerate(CONFIGS):
        model = LlamaForCausalLM.from_pretrained(
            tmp_path / "model",
            dtype=torch.float32,
            device_map="cpu",
            quantization_config=quantized if quant.load_in_4bit else None,
        )
        mend(model)
        expected = reference_losses(config, model, data, starts[row])
        ours = [line["loss"] for line in read_lines(packs.run_dirs(tmp_path / "pack")[row].journal) if "loss" in line]
        assert ours == pytest.approx(expected, abs=1e-4)
        # Something was learnt, so the comparison says something.
        assert max(expected) - min(expected) > 0.01


def test_gradients_survive_an_evaluation_of_an_nf4_base(tmp_path: Path) -> None:
    """bitsandbytes' Linear4bit loses them on CPUs with AVX512-BF16 after a forward without gradient; ours may not."""
    base = packs.tiny_base(torch.bfloat16, packs.NF4, "nf4")
    packs.train(tmp_path, base, [packs.run_config(train={"eval_steps": 2, "max_steps": 6})])
    lines = [line for line in read_lines(packs.run_dirs(tmp_path)[0].journal) if "grad_norm" in line]
    assert len(lines) == 6
    assert all(line["grad_norm"] > 0 for line in lines)
