"""Builders for tests of the packed trainer: a tiny random Llama, random instructions, and packs of runs over them."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from train.config import ModelConfig, QuantConfig, RunConfig, parse_run_config
from train.data.token_table import TokenizedData, TokenTable
from train.lora.peft_forms import StockPeft
from train.lora.targets import adapted_modules
from train.nn.packed_model import DeviceSetup, PackedModel, Residency, pack_model
from train.runtime.attempts import open_attempt
from train.runtime.signals import StopFlag
from train.sizing import ComputePath
from train.store.layout import RunDir
from train.store.lease import Lease
from train.store.storage import make_folder
from train.trainer.context import JobContext
from train.trainer.loop import PackLoop
from train.trainer.pack import build_loop
from train.trainer.run_writer import NullRunWriter, RunWriter
from train.trainer.samples import AnswerDecoder
from train.trainer.session import RunSession

VOCABULARY = 97
# A tokenizer's part for models without one: a token is its number, and a quarter of them close an answer.
DECODER = AnswerDecoder(
    lambda tokens: " ".join(f"{int(token)}" for token in tokens), frozenset(range(0, VOCABULARY, 4))
)
CPU = torch.device("cpu")
DEVICES = [CPU, torch.device("cuda")] if torch.cuda.is_available() else [CPU]
LACKS_TRITON = (
    None if "CI" in os.environ or find_spec("triton") else "Triton is missing (it comes for Linux): no grouped kernels"
)
SIXTEEN_BIT = QuantConfig(load_in_4bit=False)
NO_LEASE = Lease(token="nobody's", host="here", pid=0, pid_started=0, job="job", attempt=1, started=0.0)
NF4 = QuantConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)


def tiny_llama(dtype: torch.dtype = torch.float64, tied: bool = False) -> LlamaForCausalLM:
    """A random 2-layer Llama with grouped-query attention, of heads as GPUs' kernels take them; the same weights every time."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        # Larger than transformers' initial values, so that gradients are far from zero.
        for parameter in model.parameters():
            parameter.data.mul_(4) if parameter.dim() == 2 else parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def tiny_base(
    dtype: torch.dtype = torch.float64,
    quant: QuantConfig = SIXTEEN_BIT,
    residency: Residency = "resident",
    device: torch.device = CPU,
    path: ComputePath | None = None,
) -> PackedModel:
    return pack_model(tiny_llama(dtype), DeviceSetup(quant, device, residency, longest=64), path=path)


def stock_peft(base: PackedModel) -> StockPeft:
    """PEFT over the model that `base` was made from."""

    def skeleton() -> PreTrainedModel:
        with torch.device("meta"):
            model: PreTrainedModel = type(base.model)(base.model.config)
        return model

    return StockPeft(ModelConfig(name="tiny", source="builtin:tiny"), skeleton)


def random_table(rows: int, seed: int, longest: int = 24) -> TokenTable:
    """Rows of 4 to `longest` random tokens, of which the first third are a masked prompt."""
    random = np.random.default_rng(seed)
    lengths = random.integers(4, longest + 1, rows)
    tokens = random.integers(0, VOCABULARY, int(lengths.sum())).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels = tokens.copy()
    for start, length in zip(offsets[:-1], lengths, strict=True):
        labels[start : start + length // 3] = -100
    return TokenTable(tokens, labels, offsets)


def random_data(rows: int = 50, eval_rows: int = 10, seed: int = 0) -> TokenizedData:
    return TokenizedData(random_table(rows, seed), random_table(eval_rows, seed + 1000), {})


def run_config(lora: dict[str, Any] | None = None, train: dict[str, Any] | None = None) -> RunConfig:
    return parse_run_config(
        {
            "model": {"name": "tiny", "source": "builtin:tiny", "fingerprint": "tiny"},
            "data": {"name": "random", "source": "random", "fingerprint": "random"},
            "lora": {"r": 4, "lora_alpha": 8.0, "target_modules": ["q_proj", "v_proj"]} | (lora or {}),
            "quant": {"load_in_4bit": False},
            "train": {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 20, "save_steps": 7, "eval_steps": 10}
            | (train or {}),
        }
    )


# Eight runs that differ in everything that may differ in a pack.
DIVERSE = [
    run_config(),
    run_config({"r": 8, "lora_dropout": 0.1}, {"seed": 1, "lr_scheduler_type": "cosine", "warmup_ratio": 0.2}),
    run_config(
        {"target_modules": "all-linear", "use_rslora": True}, {"batch_size": 7, "max_steps": 13, "max_grad_norm": 0.1}
    ),
    run_config({"r": 2, "target_modules": ["gate_proj", "up_proj", "down_proj"]}, {"weight_decay": 0.1, "seed": 2}),
    run_config({"loraplus_lr_ratio": 4.0, "lora_dropout": 0.5}, {"learning_rate": 3e-3, "batch_size": 1}),
    run_config({"layers_to_transform": [1], "lora_alpha": 32.0}, {"max_steps": 20, "lr_scheduler_type": "constant"}),
    run_config({"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"v_proj": 64.0}}, {"seed": 3, "max_grad_norm": 0.0}),
    run_config(
        {"target_modules": r".*\.o_proj", "r": 5},
        {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "max_steps": 17, "warmup_steps": 3},
    ),
]


class Recording(RunSession):
    """A session that keeps a copy of its final adapter, which a finished run takes out of the pack."""

    final: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def complete(self, adapter: Any, facts: Any) -> None:
        self.final = {name: (a.clone(), b.clone()) for name, (a, b) in adapter.items()}
        super().complete(adapter, facts)


def make_loop(
    folder: Path,
    base: PackedModel,
    configs: list[RunConfig],
    data: TokenizedData | None = None,
    micro_batch_tokens: int = 10_000,
    decoder: AnswerDecoder | None = None,
    **surroundings: Any,
) -> PackLoop:
    """A pack of runs in folders ``run<i>-x`` below `folder`, ready to train; existing checkpoints are resumed from.

    `surroundings` are fields of `JobContext`.
    """
    job = JobContext(**surroundings)
    data = data or random_data()
    sessions: list[RunSession] = []
    peft = stock_peft(base)
    for i, config in enumerate(configs):
        run = RunDir(make_folder(folder / f"run{i}-x"))
        if not run.result.exists():
            targets = adapted_modules(config.lora, list(base.shapes))
            if job.group.is_main:
                sessions.append(Recording(config, data, targets, RunWriter(run, open_attempt(run), peft)))
            else:
                sessions.append(RunSession(config, data, targets, NullRunWriter(run, NO_LEASE, peft)))
    return build_loop(base, sessions, micro_batch_tokens, decoder, job)


def train(folder: Path, base: PackedModel, configs: list[RunConfig], **kwargs: Any) -> list[Recording]:
    """Train a pack to its end; the sessions, in the order of `configs`."""
    loop = make_loop(folder, base, configs, **kwargs)
    sessions: list[Any] = list(loop.sessions)
    loop.run()
    return sessions


def run_dirs(folder: Path) -> list[RunDir]:
    return [RunDir(path) for path in sorted(folder.glob("run*-x"))]


def remains(folder: Path) -> dict[str, bytes]:
    """Everything of a pack's runs that has to be the same whatever happened."""
    files = {}
    for run in run_dirs(folder):
        files[f"{run.path.name}/journal"] = run.journal.read_bytes()
        files[f"{run.path.name}/adapter"] = (run.adapter / "adapter_model.safetensors").read_bytes()
        if run.samples.exists():
            files[f"{run.path.name}/samples"] = run.samples.read_bytes()
    return files


class StopAfter(StopFlag):
    """Asks to stop at the n-th look at the flag."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def check(self) -> None:
        self.looks -= 1
        if self.looks <= 0:
            self.signal_name = "SIGTERM"
        super().check()
