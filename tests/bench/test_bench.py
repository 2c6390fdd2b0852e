"""The harness on a tiny model: it has to work the first time on a GPU that is lent for minutes."""

from __future__ import annotations

import json
import threading
from itertools import chain, count
from pathlib import Path

import numpy as np
import pytest
import torch

import packs
from bench import forecast, kernels, lockstep, speed
from bench.measuring import LINEARS, Measured, Rendezvous, Setting
from bench.rows import LONGEST, SHORTEST, in_order_of, table
from bench.shapes import SHAPES
from bench.tables import ratios, speed_table, together, where_packing_stops
from train.config import TrainConfig
from train.data.sampling import examples_of_step, sequences_of
from train.nn import decoder


def measured(who: str, tokens_per_second: float, setting: Setting | None = None) -> Measured:
    setting = setting or Setting()
    return Measured(who, setting, 100.0, tokens_per_second / 10, tokens_per_second, 1.0, 2.0)


@pytest.mark.slow
def test_quick_run_measures_lorapack_and_the_plain_script_over_the_same_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    speed.main(["--quick", "--json", str(out), "--models", str(tmp_path / "models"), "--logs", str(tmp_path / "logs")])
    lines = [Measured.of(values) for values in json.loads(out.read_text())["measured"]]
    assert [(m.who, m.setting.runs, m.error) for m in lines] == [
        ("lorapack", 1, None),
        ("lorapack", 2, None),
        ("plain script", 1, None),
    ]
    alone, _two, peer = lines
    assert alone.tokens_per_step == peer.tokens_per_step
    assert all(m.tokens_per_second > 0 and m.ms_per_step > 0 for m in lines)
    printed = capsys.readouterr().out
    assert "times plain script" in printed
    assert "| lorapack | 2 x 4 |" in printed


def test_a_worker_that_fails_is_a_line_with_its_last_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(speed.MODULES, "plain script", "bench.no_such_peer")
    session = speed.Session(tmp_path, {"plain script": tmp_path / "no-model"}, ("--timed", "2"))
    [line] = session.run(speed.Job("plain script", (Setting(),)))
    assert line.error is not None
    assert line.error.startswith("exit code 1: ")
    assert line.error in speed_table([line], 1, 1.0)


def test_rows_have_lengths_like_alpaca_and_peers_take_them_as_a_run_does() -> None:
    rows = table(32_000)
    lengths = rows.lengths()
    assert lengths.min() >= SHORTEST
    assert lengths.max() <= LONGEST
    assert 125 < lengths.mean() < 135
    train = TrainConfig(learning_rate=1e-3, batch_size=4, seed=3)
    step = sequences_of(0, rows, examples_of_step(train, len(rows), step=1))
    peers = in_order_of(3, 32_000)[4:8]
    for sequence, row in zip(step, peers, strict=True):
        np.testing.assert_array_equal(sequence.tokens, row["input_ids"])


def test_the_shape_of_7b_counts_the_weights_of_llama_2() -> None:
    shape = SHAPES["llama2_7b"]
    assert shape.flop_parameters == 32 * (4 * 4096**2 + 3 * 4096 * 11_008) + 32_000 * 4096


def test_processes_at_once_add_up_and_a_missing_one_is_an_error() -> None:
    setting = Setting(processes=2)
    both = together([measured("plain script", 1000, setting), measured("plain script", 800, setting)], 2)
    assert (both.tokens_per_second, both.peak_reserved_gib) == (1800, 4.0)
    assert together([measured("plain script", 1000, setting)], 2).error == "only 1 of 2 reported"


def test_the_line_where_packing_stops_paying() -> None:
    speeds = {1: 1000, 2: 1900, 4: 3600, 8: 3900, 16: 3950}
    line = where_packing_stops([measured("lorapack", speed, Setting(runs=runs)) for runs, speed in speeds.items()])
    assert line == "Packing stops paying at about 360 tokens a step (4 runs): 8 runs bring +8 % tok/s."


def test_ratios_take_the_mean_of_both_runs_of_lorapack() -> None:
    ours = [measured("lorapack", 2000), measured("lorapack, again", 4000)]
    assert "3.00 times Unsloth, 1 x 4" in ratios([*ours, measured("Unsloth", 1000)], ours)


def test_labels_tell_settings_apart() -> None:
    settings = [
        s for t in speed.TABLES.values() for s in (*t.ours, *t.t4, *(s for job in t.peers for s in job.settings))
    ]
    assert len({s.label for s in settings}) == len(set(settings))
    assert Setting(runs=8, targets=LINEARS).label == "8 x 4, all-linear"


def test_who_trains_at_once_starts_together(tmp_path: Path) -> None:
    arrived: list[int] = []

    def arrive(rank: int) -> None:
        Rendezvous(tmp_path, rank).meet("start", 3)
        arrived.append(rank)

    threads = [threading.Thread(target=arrive, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    threads[0].join(timeout=0.3)
    # Two of three wait.
    assert not arrived
    Rendezvous(tmp_path, 2).meet("start", 3)
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(arrived) == [0, 1]


def test_forecasts_are_held_against_measurements(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch is already imported.
    monkeypatch.setattr(forecast, "prepare_torch", lambda compiled: None)
    out = tmp_path / "forecast.json"
    forecast.main(["--quick", "--json", str(out), "--models", str(tmp_path)])
    cases = json.loads(out.read_text())["settings"]
    assert [case["setting"]["runs"] for case in cases] == [1, 2]
    assert all(case["error"] is None and case["forecast_ms"] > 0 for case in cases)
    assert cases[1]["forecast_gib"] > cases[0]["forecast_gib"]
    assert "Memory within 10% in" in capsys.readouterr().out


def test_forecasts_are_tried_over_every_kind_of_pack() -> None:
    cases = forecast.settings(quick=False)
    assert len(cases) >= 12
    assert {case.runs for case in cases} == {1, 4, 8, 16}
    assert {case.batch for case in cases} == {4, 16}
    assert {(case.checkpointing, case.residency) for case in cases} == {
        (recomputed, residency) for recomputed in (False, True) for residency in ("nf4", "resident")
    }


def test_kernels_are_timed_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    kernels.show(chain(kernels.head_cases(4), kernels.row_cases(4)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15
    assert all(line.endswith("GB/s") and " us " in line for line in lines)


def test_lockstep_names_the_operation_where_a_pack_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, config, right, calls = packs.tiny_base(torch.float32), packs.run_config(), decoder.gated_autograd, count()
    assert lockstep.march(base, [config], seed=0, steps=3, folder=tmp_path / "right") == [None]
    # The pack's second layer in the second step: pack and run alone take turns, two layers a step.
    wrong_in_the_pack = 5
    monkeypatch.setattr(
        decoder, "gated_autograd", lambda *given: right(*given) * (1 + (next(calls) == wrong_in_the_pack))
    )
    (difference,) = lockstep.march(base, [config], seed=0, steps=3, folder=tmp_path / "wrong")
    assert difference is not None
    assert difference.startswith("step 2: gated_autograd (operation ")
