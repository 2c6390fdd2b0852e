"""A run whose folder cannot be written any more ends alone: the others learn what they would have learnt, to the last bit."""

import shutil
from pathlib import Path

import pytest
import torch

from json_lines import read_lines
from packs import make_loop, remains, run_config, run_dirs, tiny_base, train
from train.runtime.signals import StopFlag
from train.store.layout import RunDir

CONFIGS = [
    run_config(),
    run_config({"r": 8, "lora_dropout": 0.1}, {"max_steps": 24}),
    run_config({"r": 2}, {"seed": 3}),
]


class Deleting(StopFlag):
    """Deletes a run's folder at a look at the flag: in the middle of a step or of an evaluation."""

    def __init__(self, run: RunDir, look: int) -> None:
        super().__init__()
        self.run, self.looks_left = run, look

    def check(self) -> None:
        self.looks_left -= 1
        if self.looks_left == 0:
            shutil.rmtree(self.run.path)


@pytest.mark.parametrize("look", [3, 9, 14, 22])
def test_the_others_are_the_same_to_the_last_bit(look: int, tmp_path: Path) -> None:
    base = tiny_base(torch.float32)
    train(tmp_path / "whole", base, CONFIGS)
    lost = RunDir(tmp_path / "torn" / "run1-x")
    make_loop(tmp_path / "torn", base, CONFIGS, stop=Deleting(lost, look)).run()
    assert not lost.path.exists(), "what the user deleted must not come back"
    whole, torn = remains(tmp_path / "whole"), remains(tmp_path / "torn")
    assert torn == {name: content for name, content in whole.items() if not name.startswith("run1-x")}
    assert [read_lines(run.attempts)[-1]["cause"] for run in run_dirs(tmp_path / "torn")] == ["done", "done"]


def test_where_every_folder_is_lost_the_pack_ends(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, tiny_base(torch.float32), CONFIGS[:1], stop=Deleting(RunDir(tmp_path / "run0-x"), 3))
    loop.run()
    assert loop.sessions == []
    assert not (tmp_path / "run0-x").exists()
