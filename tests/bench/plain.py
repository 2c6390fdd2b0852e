"""A peer, the script that most people write: AutoModel in NF4, PEFT's `get_peft_model`, transformers' `Trainer`; bf16.

    python -m bench.plain --model FOLDER --settings SETTINGS.json --out RESULTS.jsonl

One process loads the model once and measures settings one after another. Several processes at once wait for each other (`Rendezvous`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bench.measuring import ALPHA, RANK, Measured, Rendezvous, Setting, StepClock, attempt, note_result, result
from bench.rows import in_order_of

LARGEST_BATCHES = (128, 96, 64, 48, 32, 24, 16, 8, 4)
Load = Callable[[Path, Setting], Any]


def load_plain(folder: Path, setting: Setting) -> Any:
    """The model with an adapter, as the tutorials load it; in float32 and unquantized on a CPU."""
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=setting.targets_in(folder), task_type="CAUSAL_LM")
    if not torch.cuda.is_available():
        return get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": 0}
    )
    return get_peft_model(model, adapter)


class InOrder(Trainer):
    """Takes the rows in order: they are already shuffled, as lorapack shuffles them."""

    def _get_train_sampler(self, *_args: Any, **_kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class CountingCollator:
    """A collator that remembers how many real tokens each batch has."""

    def __init__(self, folder: Path) -> None:
        self._pad = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder), padding=True)
        self.tokens: list[int] = []

    def __call__(self, rows: list[dict[str, list[int]]]) -> Any:
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self._pad(rows)


class Timing(TrainerCallback):
    """Ticks at every step, and keeps training until all processes that train at the same time have been timed."""

    def __init__(self, clock: StepClock, setting: Setting, meeting: Rendezvous) -> None:
        self.clock = clock
        self.processes = setting.processes
        self.meeting = meeting
        self.name = str(setting.processes)

    def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Called by the `Trainer`."""
        self.clock.tick()
        if self.processes > 1 and self.clock.warmed:
            self.meeting.meet(f"start-{self.name}", self.processes)
            self.clock.restart()
        if self.clock.done:
            self.meeting.arrive(f"end-{self.name}")
            control.should_training_stop = self.meeting.all_there(f"end-{self.name}", self.processes)


@dataclass(frozen=True)
class Peer:
    """A program under `Trainer`: its name in tables, the model's folder, the loaded model, and whether `Trainer` checkpoints."""

    name: str
    folder: Path
    model: Any
    checkpointing: bool


def measure(peer: Peer, setting: Setting, clock: StepClock, meeting: Rendezvous) -> Measured:
    """Train with `Trainer` until everything is timed."""
    collator = CountingCollator(peer.folder)
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=setting.batch,
            max_steps=100_000,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=peer.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if peer.checkpointing else None,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        rows = in_order_of(meeting.rank, peer.model.config.vocab_size)
        timing = Timing(clock, setting, meeting)
        trainer = InOrder(peer.model, arguments, collator, rows, callbacks=[timing])
        try:
            trainer.train()
        finally:
            # The next setting's trainer wraps the model's forward again.
            trainer.accelerator.unwrap_model(peer.model, keep_fp32_wrapper=False)
            trainer.accelerator.free_memory()
    return result(peer.name, setting, clock, collator.tokens[clock.warm : clock.warm + clock.timed])


def main(arguments: list[str] | None = None, name: str = "plain script", load: Load = load_plain) -> None:
    """Measure every setting in which this process takes part. All settings have the checkpointing and targets of the first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--timed", type=int, default=20)
    parser.add_argument("--meeting", type=Path, default=None)
    parser.add_argument("--rank", type=int, default=0)
    given = parser.parse_args(arguments)
    settings = [Setting.of(values) for values in json.loads(given.settings.read_text())]
    meeting = Rendezvous(given.meeting or given.out.parent, given.rank)
    checkpointing = load is load_plain and settings[0].checkpointing is True
    peer = Peer(name, given.model, load(given.model, settings[0]), checkpointing)
    for index, setting in enumerate(settings):
        if given.rank < setting.processes:
            measured = _first_that_fits(
                name, setting, lambda s: measure(peer, s, StepClock(given.warm, given.timed), meeting)
            )
            note_result(given.out, index, measured)
            # The other processes must not wait for one that failed.
            if measured.error is not None:
                for event in ("start", "end"):
                    meeting.arrive(f"{event}-{setting.processes}")


def _first_that_fits(who: str, setting: Setting, measure: Callable[[Setting], Measured]) -> Measured:
    """The setting's result; if the setting leaves the batch open, with the largest batch that fits in memory."""
    for batch in [setting.batch] if setting.batch else LARGEST_BATCHES:
        candidate = replace(setting, batch=batch)
        measured = attempt(who, candidate, partial(measure, candidate))
        if measured.error is None:
            break
    return measured


if __name__ == "__main__":
    main()
