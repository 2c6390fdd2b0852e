"""What is known of a model from its configuration alone: its sizes, its linear layers, and the path by which it is computed.

`train.nn.facts` measures this on a small copy, which takes torch and some seconds, so it is kept in the cache. Light on purpose: the
launcher reads it on the login node (`launcher.estimate.checking` has it measured).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path

from pydantic import Field

from train.config import ModelConfig
from train.errors import BadInput, DamagedFile
from train.model.folder import CONFIG
from train.sizing import Activations, BaseSize, ComputePath, ExpertsSize
from train.store.layout import CacheDir
from train.store.record_file import FileRecord, read_record
from train.store.storage import readable

# What decides the verdict, beside this project's own code.
VERSIONED = ("torch", "transformers")
ROOMS = ("model", "nn")


class ModelFacts(FileRecord):
    """``facts/<key>.json`` in the cache.

    Attributes:
        path: how packs compute the model; None if it was not judged yet, or is refused.
        attempts: what each path gave that was tried, one sentence each.
        longest: on sequences with more tokens the path is wrong, as positions turn by other angles there (LongRoPE); None if on none.
        refusal: why the model cannot be trained, None if it can, or was not judged yet.
        hidden, vocabulary: of the text decoder and its head.
        parameters: all weights of the text decoder and its head, tied ones once.
        linears: (out, in) features of every linear layer that can be adapted, by its module's full name, in the model's order.
        kept: values per token that our decoder keeps for the backward whatever learns, None if the architecture has no description for
            it; `kept_inputs` are those that it keeps where one of some linear layers learns (`train.sizing.Activations`).
        expert_parameters: weights of all experts in all layers. A layer has `experts`, and a token goes through `chosen` of them.
    """

    model_type: str
    layers: int
    hidden: int
    vocabulary: int
    parameters: int
    linears: dict[str, tuple[int, int]]
    tied: bool
    kept: int | None = None
    kept_inputs: list[tuple[list[str], int]] = Field(default_factory=list)
    expert_parameters: int = 0
    experts: int = 0
    chosen: int = 0
    path: ComputePath | None = None
    attempts: list[str] = Field(default_factory=list)
    longest: int | None = None
    refusal: str | None = None

    @property
    def judged(self) -> bool:
        """Whether it was tried how the model is computed."""
        return self.path is not None or self.refusal is not None

    def check(self, longest: int) -> None:
        """Refuse what cannot be trained on sequences of at most `longest` tokens.

        Raises:
            BadInput: no path computes the model, or not on sequences that long.
        """
        if self.refusal is not None:
            raise BadInput(self.refusal)
        if self.longest is not None and longest > self.longest:
            raise BadInput(
                f"the architecture {self.model_type!r} turns positions by other angles in texts of more than {self.longest} tokens, "
                f"which the path {self.path} does not keep apart; set data.max_length to at most {self.longest} (now {longest})."
            )

    def size(self) -> BaseSize:
        """The numbers that decide how it fits on a device."""
        experts = (
            ExpertsSize(self.expert_parameters, self.experts, min(self.chosen, self.experts)) if self.experts else None
        )
        inputs = tuple((frozenset(names), width) for names, width in self.kept_inputs)
        activations = None if self.kept is None else Activations(self.kept, inputs)
        return BaseSize(self.layers, self.hidden, self.parameters, self.linears, experts, activations)


def read_facts(model_dir: Path, model: ModelConfig, cache: CacheDir) -> ModelFacts | None:
    """The facts of the model in a folder, if they are in the cache.

    Raises:
        BadInput: the folder cannot be read.
    """
    try:
        return read_record(facts_file(model_dir, model, cache), ModelFacts)
    # It is only a cache: what cannot be read is measured again.
    except DamagedFile:
        return None


def facts_file(model_dir: Path, model: ModelConfig, cache: CacheDir) -> Path:
    """Where the facts are kept: by the model's configuration, the code that computes it, and the versions of what it calls.

    Raises:
        BadInput: the folder cannot be read.
    """
    code = sorted(model_dir.glob("*.py")) if model.trust_remote_code else []
    digest = hashlib.sha256(_judges().encode())
    with readable(model_dir):
        for file in (model_dir / CONFIG, *code):
            digest.update(file.read_bytes())
    return cache.facts(digest.hexdigest()[:20])


@cache
def _judges() -> str:
    """What stands for the code that decides: versions, and a hash of this project's own rooms (some 80 files, some milliseconds)."""
    digest = hashlib.sha256()
    for room in ROOMS:
        for file in sorted((Path(__file__).parents[1] / room).glob("*.py")):
            digest.update(file.read_bytes())
    return " ".join([digest.hexdigest(), *map(_version, VERSIONED)])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
