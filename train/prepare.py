"""Fetches models and tokenizes data before any job needs them: ``python -m train.prepare``.

The launcher runs this as a process of its own, so that it never imports torch itself. The process reads one JSON document from stdin
and writes one to stdout. Everything else (progress, what libraries print) goes to stderr.

    stdin     {"cache": …, "requests": [{"model": ModelConfig, "data": DataConfig, "loras": [LoraConfig, …]}, …]}
    stdout    {"ok": true, "prepared": [{…, "model_dir": …}, …]}

    stdin     {"cache": …, "judge": ModelConfig}
    stdout    {"ok": true, "facts": …}

              {"ok": false, "error": …, "exit_code": …, "message": …}

What is ``prepared`` for a request: the stats of its tokenized data and its model's folder. ``judge`` names a model that was fetched
already, and is answered by its `ModelFacts`, which the cache keeps too.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from train.config import DataConfig, LoraConfig, ModelConfig
from train.errors import BadInput, LorapackError
from train.log import log_to
from train.lora.loadable import is_known_to_load, remember_that_it_loads
from train.lora.targets import adapted_modules
from train.model.source import staged_model
from train.section import parse_section
from train.store.layout import CacheDir

log = logging.getLogger("lorapack.prepare")

Json = dict[str, Any]


def main() -> int:
    """Answer one document of requests; the exit code is that of the answer."""
    log_to(sys.stderr)
    with guarded_stdout() as out:
        answer = answer_document(sys.stdin.read())
        out.write(json.dumps(answer) + "\n")
    exit_code: int = answer.get("exit_code", 0)
    return exit_code


@contextmanager
def guarded_stdout() -> Iterator[TextIO]:
    """Yield the real stdout; meanwhile, what this process and its libraries print goes to stderr instead."""
    # On the level of file descriptors, since C libraries write to descriptor 1 without asking Python.
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(real), "w") as out:
            yield out
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


def answer_document(document: str) -> Json:
    """The answer to one JSON document of requests. Errors are answers too."""
    try:
        request = json.loads(document)
        cache = CacheDir(Path(request["cache"]))
        if "judge" in request:
            return {"ok": True, "facts": judge(request["judge"], cache)}
        return {"ok": True, "prepared": [prepare(item, cache) for item in request["requests"]]}
    except LorapackError as exc:
        return _failure(exc, exc.exit_code)
    except Exception as exc:
        # The last place to catch it: the launcher shows the message, and stderr has the traceback.
        traceback.print_exc()
        return _failure(exc, 1)


def prepare(request: Json, cache: CacheDir) -> Json:
    """Put the model and the tokenized data of one request into the cache.

    Returns:
        The stats of the data, and ``model_dir``, the model's folder.

    Raises:
        BadInput: the model or the data cannot be used, or the model lacks what an adapter of ``loras`` targets, or PEFT could not
            load such an adapter.
        StorageError: the cache cannot be written.
    """
    # Imported here because they are heavy.
    from train.data.loading import load_tokenized, summary
    from train.lora.peft_forms import StockPeft
    from train.model.loading import check_files, stock_skeleton
    from train.model.staging import stage_model
    from train.nn.facts import known_facts

    model = parse_section(ModelConfig, request["model"], "model")
    data = parse_section(DataConfig, request["data"], "data")
    model_dir = stage_model(model, cache)
    check_files(model_dir, model)
    facts = known_facts(model_dir, model, cache)
    facts.check(data.max_length)
    modules = list(facts.linears)
    peft = StockPeft(model, partial(stock_skeleton, model_dir, model))
    # Before tokenizing, which may take minutes.
    for section in request["loras"]:
        lora = parse_section(LoraConfig, section, "lora")
        targets = adapted_modules(lora, modules)
        if not is_known_to_load(model_dir, model, lora, cache):
            peft.check(lora, targets)
            remember_that_it_loads(model_dir, model, lora, cache)
    stats = load_tokenized(data, model, model_dir, cache).stats
    log.info(f"{data.name} for {model.name}: {summary(stats)}")
    return stats | {"model_dir": str(model_dir)}


def judge(section: Json, cache: CacheDir) -> Json:
    """What is known of a model that was fetched already, by which path it is computed first of all.

    Raises:
        BadInput: it was not fetched, or transformers cannot build it.
    """
    from train.nn.facts import known_facts

    model = parse_section(ModelConfig, section, "model")
    model_dir = staged_model(model, cache)
    if model_dir is None:
        raise BadInput(f"model.source={model.source!r} is not in the cache {cache.path}; fetch it first.")
    return known_facts(model_dir, model, cache).model_dump(mode="json")


def _failure(exc: Exception, exit_code: int) -> Json:
    """The answer to an error: its class if it is one of this project's, else also its class as a part of the message."""
    families = [kind.__name__ for kind in type(exc).__mro__ if kind.__module__ == LorapackError.__module__]
    message = str(exc) if families else f"{type(exc).__name__}: {exc}"
    return {"ok": False, "error": (families or [type(exc).__name__])[0], "exit_code": exit_code, "message": message}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # Ctrl-C: shells report 128 + SIGINT. What was fetched completely is kept, and what was half written is removed.
        sys.exit(130)
