"""The workspace that ``launcher dashboard`` builds with the real wandb-workspaces, and sends to a stand-in for W&B's server."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from synthetic_sweeps import SyntheticSweep
from train.errors import LorapackError
from train.mirror.dashboard import SweptAxis, _deadline, build
from train.store.storage import read_json
from wandb_server import ENTITY, KEY, WandbServer

# wandb-workspaces uses pydantic's old names.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

AXES = [
    SweptAxis("lora.r", "log2"),
    SweptAxis("lora.lora_dropout", "linear"),
    SweptAxis("lora.target_modules", "category"),
    SweptAxis("train.seed", "linear"),
]


def spec_of(workspace: Any) -> dict[str, Any]:
    """The workspace as it goes over the wire."""
    spec: dict[str, Any] = workspace._to_model().spec.model_dump(by_alias=True, exclude_none=True)
    return spec["section"]


def panels(section: dict[str, Any], name: str) -> list[dict[str, Any]]:
    (found,) = [part for part in section["panelBankConfig"]["sections"] if part["name"] == name]
    return [{"type": panel["viewType"], **panel["config"]} for panel in found["panels"]]


@pytest.fixture(scope="module")
def section() -> dict[str, Any]:
    return spec_of(build("wide", AXES, "students", "lorapack"))


def test_it_shows_the_runs_of_the_sweep_alone_best_first(section: dict[str, Any]) -> None:
    (runs,) = section["runSets"]
    wanted = {"key": {"section": "run", "name": "group"}, "op": "=", "value": "wide", "disabled": False}
    assert runs["filters"]["filters"] == [wanted]
    assert runs["sort"]["keys"] == [{"key": {"section": "summary", "name": "eval_loss"}, "ascending": True}]


def test_losses_are_grouped_by_each_axis_and_seeds_are_none(section: dict[str, Any]) -> None:
    curves = panels(section, "Loss")
    assert {curve["type"] for curve in curves} == {"Run History Line Plot"}
    grouped = {(curve["metrics"][0], curve["groupBy"]) for curve in curves if "groupBy" in curve}
    keys = ["lora.value.r", "lora.value.lora_dropout", "lora.value.target_modules"]
    assert grouped == {(loss, key) for loss in ("train/loss", "eval/loss") for key in keys}


def test_eval_loss_stands_against_each_axis_on_its_scale(section: dict[str, Any]) -> None:
    found = panels(section, "Eval loss against what was swept")
    scatter = {p["xAxis"]: p.get("xAxisLogScale", False) for p in found if p["type"] == "Scatter Plot"}
    assert scatter == {"config:lora.value.r": True, "config:lora.value.lora_dropout": False}
    (bars,) = [p for p in found if p["type"] == "Bar Chart"]
    assert (bars["groupBy"], bars["groupAgg"]) == ("lora.value.target_modules", "mean")
    (parallel,) = [p for p in found if p["type"] == "Parallel Coordinates Plot"]
    accessors = [item["accessor"] for item in parallel["columns"]]
    assert accessors[:3] == [
        "config:lora.value.r",
        "config:lora.value.lora_dropout",
        "config:lora.value.target_modules",
    ]
    assert accessors[-1] == "summary:eval_loss"


def test_where_only_seeds_differ_they_are_the_axis() -> None:
    section = spec_of(build("seeds", AXES[-1:], "students", "lorapack"))
    assert "train.value.seed" in {p.get("groupBy") for p in panels(section, "Loss")}


def test_its_numbers_are_those_that_the_mirror_sends(section: dict[str, Any]) -> None:
    from train.mirror.rows import JOURNAL_NAMES, PACE_NAMES

    drawn = [
        metric for name in ("Loss", "Speed, memory and cost") for p in panels(section, name) for metric in p["metrics"]
    ]
    sent = {*JOURNAL_NAMES.values(), *PACE_NAMES.values()}
    assert {metric for metric in drawn if "/" in metric} <= sent
    assert {"train/loss", "eval/loss", "perf/tokens_per_second", "perf/peak_vram_gib"} <= set(drawn)


# ---- the verb


@pytest.fixture
def sweep(tmp_path: Path) -> SyntheticSweep:
    return SyntheticSweep(tmp_path / "runs" / "wide").grid({"lora.r": [4, 8]}).accept("python -m launcher sweep=rank")


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


def dashboard(sweep: SyntheticSweep, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program, in an environment without a key of ours."""
    home = sweep.path.parent.parent
    outer = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-m", "launcher", "dashboard", "wide", f"root={sweep.path.parent}", "--json"],
        env=outer | {"HOME": str(home), "NETRC": str(home / "netrc")} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_it_is_saved_and_its_address_printed_and_again_it_is_the_same(
    sweep: SyntheticSweep, server: WandbServer
) -> None:
    first = dashboard(sweep, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    assert (first.returncode, first.stderr) == (0, "")
    address = json.loads(first.stdout)["address"]
    assert address.startswith(f"{server.url}/{ENTITY}/lorapack?nw=")
    sweep.add({"lora.r": 16})
    assert json.loads(dashboard(sweep, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY).stdout)["address"] == address
    before, after = server.views
    assert (before["displayName"], before["projectName"], before["entityName"]) == ("wide", "lorapack", ENTITY)
    assert before["name"] == after["name"]
    assert after["id"] == read_json(sweep.dir.dashboard)["id"]
    section = json.loads(after["spec"])["section"]
    assert {p["xAxis"] for p in panels(section, "Eval loss against what was swept") if "xAxis" in p} == {
        "config:lora.value.r"
    }
    assert KEY not in "".join(file.read_text() for file in sweep.path.rglob("*") if file.is_file())


def test_a_server_that_refuses_it_is_quoted_in_one_paragraph(
    sweep: SyntheticSweep, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes wrong after the key was looked at."""
    answer = server.graphql

    def once(query: str, variables: dict[str, Any]) -> dict[str, Any]:
        server.mode = "401"
        return answer(query, variables)

    monkeypatch.setattr(server, "graphql", once)
    found = dashboard(sweep, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY, WANDB_SERVICE="3-1-tcp-localhost-1")
    assert (found.returncode, found.stdout) == (1, "")
    assert "could not be saved" in found.stderr
    assert "401" in found.stderr, "not the client of another program, which is not there"
    assert "Traceback" not in found.stderr


def test_silence_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.mirror.dashboard.SAVE_SECONDS", 1)
    with pytest.raises(LorapackError, match="no answer within 1 s"), _deadline("https://wandb.example"):
        time.sleep(30)


def test_without_a_key_one_paragraph_says_what_to_do(sweep: SyntheticSweep, server: WandbServer) -> None:
    found = dashboard(sweep, WANDB_BASE_URL=server.url)
    assert (found.returncode, found.stdout) == (2, "")
    assert "no API key found" in found.stderr
    assert "wandb login" in found.stderr
    assert "Traceback" not in found.stderr
    assert not server.requests


def test_without_the_extra_one_paragraph_says_what_to_install(sweep: SyntheticSweep, tmp_path: Path) -> None:
    """A finder that knows no wandb-workspaces stands in for an environment without it."""
    without = tmp_path / "without"
    without.mkdir()
    (without / "sitecustomize.py").write_text(
        "import importlib.util as util\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'wandb_workspaces' else find(name, *rest)\n"
    )
    path = os.pathsep.join([str(without), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = dashboard(sweep, PYTHONPATH=path, WANDB_API_KEY=KEY)
    assert (found.returncode, found.stdout) == (2, "")
    assert "pip install 'lorapack[dashboard]'" in found.stderr
    assert "Traceback" not in found.stderr
