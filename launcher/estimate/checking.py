"""What is known of a fetched model (`train.model.facts`): from the cache, else measured by a process, since that takes torch.

The process imports torch and transformers and compares the paths on a small copy of the model, some seconds in all. It is stopped after
`MOST_SECONDS`, as a plan should not keep anybody waiting; `prepare` measures without a limit before anything is submitted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from launcher.installation import child_environment
from train.config import ModelConfig
from train.errors import BadInput
from train.model.facts import ModelFacts, read_facts
from train.model.source import staged_model
from train.store.layout import CacheDir

MOST_SECONDS = 20.0
# Until something is said of it.
SILENT_SECONDS = 2.0


def checked_facts(model: ModelConfig, cache: CacheDir) -> ModelFacts | None:
    """The facts of a model; None if it is not fetched yet, or cannot be measured here now.

    Raises:
        BadInput: the model's folder is not sound, or transformers cannot build the model.
    """
    folder = staged_model(model, cache)
    if folder is None:
        return None
    known = read_facts(folder, model, cache)
    # Sizes without a verdict: an earlier measurement was stopped, and another one would be too.
    return measured_facts(model, cache) or read_facts(folder, model, cache) if known is None else known


def measured_facts(model: ModelConfig, cache: CacheDir) -> ModelFacts | None:
    """The facts as a process of its own measures them, None where it fails or is stopped.

    Raises:
        BadInput: transformers cannot build the model.
    """
    question = json.dumps({"cache": str(cache.path), "judge": model.model_dump()})
    with _judging() as process:
        with suppress(subprocess.TimeoutExpired):
            return _facts(process.communicate(question, timeout=SILENT_SECONDS)[0])
        say = f"comparing how {model.name} is computed with transformers, at most {MOST_SECONDS:.0f} s ..."
        print(say, file=sys.stderr, flush=True)
        with suppress(subprocess.TimeoutExpired):
            return _facts(process.communicate(timeout=MOST_SECONDS - SILENT_SECONDS)[0])
    print(f"stopped after {MOST_SECONDS:.0f} s: {model.name} is checked before it is submitted", file=sys.stderr)
    return None


@contextmanager
def _judging() -> Iterator[subprocess.Popen[str]]:
    """`train.prepare`, which is stopped at the end if it still runs."""
    command = [sys.executable, "-m", "train.prepare"]
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=quiet, text=True, env=child_environment()
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _facts(answer: str) -> ModelFacts | None:
    """The facts in an answer of `train.prepare`.

    Raises:
        BadInput: transformers cannot build the model.
    """
    try:
        document = json.loads(answer)
    # No document: the process ended otherwise.
    except ValueError:
        return None
    if document["ok"]:
        return ModelFacts.model_validate_json(json.dumps(document["facts"]))
    if document["exit_code"] == BadInput.exit_code:
        raise BadInput(document["message"])
    return None
