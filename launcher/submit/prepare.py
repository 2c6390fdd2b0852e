"""Fetch models and tokenize data before anything is submitted. A process does it, so that the launcher never imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launcher.installation import child_environment
from train.config import LoraConfig, RunConfig
from train.data.source import read_dataset_stats
from train.errors import BadInput, LorapackError, StorageError
from train.lora.loadable import is_known_to_load, targeting
from train.model.facts import read_facts
from train.model.source import staged_model
from train.store.layout import CacheDir


def prepare(configs: Iterable[RunConfig], cache: Path) -> list[dict[str, Any]]:
    """Fetch each distinct model, check that it has what adapters target, and tokenize each distinct data set.

    Progress goes to stderr.

    Returns:
        For each distinct pair of model and data, in the order of their first appearance: the stats of the data, and ``model_dir``.

    Raises:
        BadInput: a model or a data set that cannot be trained on, or a target that the model does not have.
        LorapackError: the process failed.
    """
    requests = [_request(alike) for alike in _by_model_and_data(configs)]
    if not requests:
        return []
    answer = _ask({"cache": str(cache), "requests": requests})
    if not answer["ok"]:
        # Nothing has started yet, so a full disk is for the user to fix, like any other input.
        is_input = answer["exit_code"] == BadInput.exit_code or answer["error"] == StorageError.__name__
        raise (BadInput if is_input else LorapackError)(answer["message"])
    prepared: list[dict[str, Any]] = answer["prepared"]
    return prepared


def unprepared(configs: Iterable[RunConfig], cache: Path) -> list[RunConfig]:
    """Those of `configs` whose model or tokenized data is not in the cache, or of which it is not known yet how the model is computed,
    or whether PEFT loads their adapters.
    """
    groups = _by_model_and_data(configs)
    return [config for alike in groups if not _is_prepared(alike, CacheDir(cache)) for config in alike]


def _by_model_and_data(configs: Iterable[RunConfig]) -> list[list[RunConfig]]:
    """The configurations that share model and data, in the order of their first appearance."""
    groups: dict[str, list[RunConfig]] = {}
    for config in configs:
        groups.setdefault(config.model.model_dump_json() + config.data.model_dump_json(), []).append(config)
    return list(groups.values())


def _request(alike: list[RunConfig]) -> dict[str, Any]:
    """What `train.prepare` is asked about runs that share model and data. A thousand adapters have few different targets."""
    shared = alike[0]
    loras = [lora.model_dump() for lora in _by_targets(alike)]
    return {"model": shared.model.model_dump(), "data": shared.data.model_dump(), "loras": loras}


def _by_targets(alike: list[RunConfig]) -> list[LoraConfig]:
    """One adapter for each choice of modules."""
    return list({targeting(config.lora): config.lora for config in alike}.values())


def _is_prepared(alike: list[RunConfig], cache: CacheDir) -> bool:
    model = alike[0].model
    folder = staged_model(model, cache)
    if folder is None or read_dataset_stats(alike[0].data, model, cache) is None:
        return False
    facts = read_facts(folder, model, cache)
    judged = facts is not None and facts.judged
    return judged and all(is_known_to_load(folder, model, lora, cache) for lora in _by_targets(alike))


def _ask(question: dict[str, Any]) -> dict[str, Any]:
    """Run ``train.prepare`` on `question`; its stderr is the terminal's."""
    process = subprocess.run(
        [sys.executable, "-m", "train.prepare"],
        input=json.dumps(question),
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
        check=False,
    )
    try:
        answer: dict[str, Any] = json.loads(process.stdout)
    except json.JSONDecodeError as exc:
        raise LorapackError(
            f"Preparing model and data failed (exit code {process.returncode}); its output is above."
        ) from exc
    return answer
