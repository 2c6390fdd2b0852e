"""What is known of models in folders, measured in the process of the tests."""

from __future__ import annotations

from pathlib import Path

from train.config import ModelConfig
from train.model.facts import ModelFacts
from train.model.source import staged_model
from train.store.layout import CacheDir


def sizes(folder: Path) -> ModelFacts:
    """What a folder's configuration says of its model, without a verdict."""
    # Here, so that torch is loaded only for tests that ask.
    from train.model.loading import stock_skeleton
    from train.nn.facts import measure_sizes

    return measure_sizes(stock_skeleton(folder, ModelConfig(name="m", source=str(folder))))


def linear_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """(out, in) features of every linear layer that can be adapted."""
    return sizes(folder).linears


def measured_here(model: ModelConfig, cache: CacheDir) -> ModelFacts:
    """As `launcher.estimate.checking.measured_facts`, without a process of its own."""
    from train.nn.facts import known_facts

    folder = staged_model(model, cache)
    assert folder is not None
    return known_facts(folder, model, cache)
