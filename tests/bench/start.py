"""The process that measures lorapack: sets what torch reads from the environment before torch is imported, as a job does.

python -m bench.start --model FOLDER --settings SETTINGS.json --out RESULTS.jsonl [--profile t4]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from train.runtime.environment import prepare_torch
from train.store.layout import CacheDir


def bench_cache(model: Path) -> CacheDir:
    """The cache of benchmarks, next to the model folder."""
    return CacheDir(model.parent / "cache")


def main() -> None:
    """Measure every setting in the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--settings", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--timed", type=int, default=20)
    parser.add_argument("--profile", choices=["this-gpu", "t4"], default="this-gpu")
    given = parser.parse_args()
    prepare_torch(bench_cache(given.model).compiled)

    from bench.measuring import Setting
    from bench.ours import measure_all

    settings = [Setting.of(values) for values in json.loads(given.settings.read_text())]
    measure_all(given.model, settings, given.out, given.warm, given.timed, given.profile)


if __name__ == "__main__":
    main()
