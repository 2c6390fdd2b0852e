import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from json_lines import read_lines
from launcher.cli import VERBS
from stand_in import SMALL, Program, install, wait_for
from train.store.layout import RunDir, SweepDir
from train.store.lease import process_started, read_lease
from train.store.storage import read_json


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("installed"))


@pytest.fixture
def program(installed: Path, tmp_path: Path) -> Program:
    return Program(installed, tmp_path)


def sweep_of(program: Program) -> SweepDir:
    (path,) = (program.cwd / "runs").iterdir()
    return SweepDir(path)


def first_run(program: Program) -> RunDir:
    return sweep_of(program).runs()[0]


def training(program: Program) -> bool:
    return (program.cwd / "runs").exists() and any(
        run.pace.exists() for path in (program.cwd / "runs").iterdir() for run in SweepDir(path).runs()
    )


def test_every_verb_has_help_and_the_program_starts_light() -> None:
    script = (
        "import sys; from launcher.cli import main; main(['-h']);"
        "print(sorted({'pydantic','hydra','rich','submitit','yaml'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
    for verb in filter(None, VERBS):
        assert f"  {verb} " in found.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    from launcher.cli import main

    with pytest.raises(SystemExit) as end:
        main([*filter(None, [verb]), "--debug", "-h"])
    assert end.value.code == 0
    assert f"usage: python -m launcher {verb}".strip() in capsys.readouterr().out


def test_status_and_list_do_not_import_hydra(program: Program) -> None:
    (program.cwd / "runs" / "some" / "plans").mkdir(parents=True)
    for verb in ("status", "list"):
        script = f"import sys; from launcher.cli import main; main(['{verb}']); print({{'hydra', 'submitit'}} & sys.modules.keys())"
        command = [sys.executable, "-c", script]
        found = subprocess.run(
            command, cwd=program.cwd, env=program.environment, capture_output=True, text=True, check=True
        )
        assert found.stdout.splitlines()[-1] == "set()"


def test_one_line_trains_reports_and_then_has_nothing_to_do(program: Program) -> None:
    first = program("sweep=rank", *SMALL)
    assert first.returncode == 0, first.stderr
    sweep = sweep_of(program)
    assert all(run.result.exists() for run in sweep.runs())
    assert sweep.report.exists()
    assert str(sweep.report) in first.stdout
    again = program("sweep=rank", *SMALL)
    assert again.returncode == 0
    assert "nothing to train" in again.stdout
    assert [plan.name for plan in sweep.plans.iterdir()] == ["1.json"]


@pytest.mark.slow
def test_one_more_value_trains_only_that_value(program: Program) -> None:
    name = "sweep.name=mine"
    assert program("lora.r=4,8", name, *SMALL).returncode == 0
    assert program("lora.r=4,8,16", name, *SMALL).returncode == 0
    packs = [
        read_json(path)["runs"] for path in sorted(sweep_of(program).jobs.glob("*/pack.json"), key=os.path.getmtime)
    ]
    assert [len(runs) for runs in packs] == [2, 1]
    assert len(sweep_of(program).runs()) == 3


@pytest.mark.slow
def test_json_is_all_that_stdout_gets(program: Program) -> None:
    planned = json.loads(program("plan", "sweep=rank", *SMALL, "--json").stdout)
    assert not (program.cwd / "runs").exists()
    program.environment |= {"NETRC": os.devnull, "WANDB_API_KEY": ""}
    behind = {"": ["sweep=rank", *SMALL], "plan": SMALL, "stage": SMALL, "merge": ["r8"], "chat": ["r8", "2+2=?"]}
    documents = {}
    for name, verb in VERBS.items():
        assert verb.json
        done = program(*filter(None, [name]), *behind.get(name, []), "--json")
        # Their documents come from a server: tests of their own have one.
        if name in {"sync", "dashboard"}:
            assert (done.returncode, done.stdout) == (2, "")
        else:
            assert done.returncode == 0, done.stderr
            documents[name] = json.loads(done.stdout)
    assert {row["id"] for row in documents[""]["rows"]} == {run["id"] for run in planned["runs"]}
    assert {run["state"] for run in documents["status"]["runs"]} == {"done"}
    assert documents["list"]["sweeps"][0]["done"] == len(planned["runs"])
    assert documents["report"]["rows"] == documents["resume"]["rows"] == documents[""]["rows"]
    assert documents["stage"]["staged"][0]["train_rows"] == 4000
    assert documents["cancel"] == {"runs": []}
    # What the stand-in was asked.
    assert documents["chat"][-2:] == ["2+2=?", "--json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["statsu"], "did you mean 'status'"),
        (["status", "--wrong"], "--wrong"),
        (["status"], "There is no sweep below"),
        (["status", "lora.r=8"], "'lora.r=8' has no effect here"),
        (["lora.r=0", *SMALL], "lora.r=0"),
        (["lora.rr=8", *SMALL], "lora.rr"),
        (["data.split=bad", *SMALL], "row 3 of the data is malformed"),
    ],
)
def test_a_mistake_is_one_paragraph_and_leaves_nothing(program: Program, arguments: list[str], said: str) -> None:
    refused = program(*arguments)
    assert refused.returncode == 2
    assert said in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr
    assert refused.stdout == ""
    assert not (program.cwd / "runs").exists()


def test_debug_shows_the_traceback(program: Program) -> None:
    refused = program("lora.r=0", *SMALL, "--debug")
    assert "Traceback" in refused.stderr
    assert refused.returncode == 1


@pytest.mark.slow
def test_ctrl_c_stops_resumably_and_resume_goes_on(program: Program) -> None:
    launched = program.start("model=tiny", "train.max_steps=2000", "train.weight_decay=0.02")
    wait_for(lambda: training(program))
    run = first_run(program)
    lease = read_lease(run)
    assert lease is not None
    launched.send_signal(signal.SIGINT)
    out, err = launched.communicate(timeout=30)
    assert launched.returncode == 130, err
    assert "saving a checkpoint" in out
    assert "python -m launcher model=tiny" in out
    assert read_lines(run.attempts)[-1]["cause"] == "preempted"
    assert read_lines(run.attempts)[-1]["detail"] == "SIGINT"
    assert run.checkpoint_steps()
    assert process_started(lease.pid) is None
    assert process_started(int(lease.job)) is None
    assert read_lease(sweep_of(program)) is None
    steps_before = len(read_lines(run.journal))
    resumed = program.start("resume")
    wait_for(lambda: len(read_lines(run.journal)) > steps_before + 5)
    assert program("cancel").returncode == 0
    assert resumed.wait(timeout=30) == 1
    resumed.communicate()
    assert [line["cause"] for line in read_lines(run.attempts)] == ["preempted", "cancelled"]


def test_the_second_ctrl_c_kills(program: Program) -> None:
    launched = program.start("model=tiny", "train.max_steps=10", "train.weight_decay=20.0")
    wait_for(
        lambda: (program.cwd / "runs").exists() and sweep_of(program).runs() and first_run(program).journal.exists()
    )
    lease = read_lease(first_run(program))
    assert lease is not None
    launched.send_signal(signal.SIGINT)
    out = launched.stdout
    assert out is not None
    while "saving a checkpoint" not in out.readline():
        assert launched.poll() is None
    launched.send_signal(signal.SIGINT)
    launched.communicate(timeout=10)
    assert launched.returncode == 130
    assert process_started(lease.pid) is None


@pytest.mark.slow
def test_a_second_launcher_is_told_and_a_dead_one_is_replaced(program: Program) -> None:
    slow = ["model=tiny", "train.max_steps=2000", "train.weight_decay=0.02", "sweep.name=mine"]
    first = program.start("lora.r=4", *slow)
    wait_for(lambda: training(program))
    second = program("lora.r=8", *slow)
    assert second.returncode == 1
    assert "Another launcher" in second.stderr
    assert len(sweep_of(program).runs()) == 1
    run = first_run(program)
    first.kill()
    first.communicate()
    lease = read_lease(run)
    assert lease is not None
    # The job outlives its launcher.
    assert lease.alive()
    again = program("lora.r=4", *slow)
    assert "runs are training" in again.stdout
    os.kill(lease.pid, signal.SIGTERM)
    wait_for(lambda: read_lease(run) is None)
    assert program("lora.r=8", "model=tiny", "train.max_steps=5", "sweep.name=mine").returncode == 0


@pytest.mark.slow
def test_a_failing_job_shows_why_and_where(program: Program) -> None:
    failed = program("train.seed=13", *SMALL)
    assert failed.returncode == 1
    assert "the stand-in was told to break" in failed.stdout
    # The job's own, the end of its log.
    assert "Traceback" in failed.stdout
    assert "_log.err" in failed.stdout
    held = program("train.seed=13", *SMALL)
    assert held.returncode == 1
    assert "resume" in held.stdout
    assert len(read_lines(first_run(program).attempts)) == 1
    assert program("resume").returncode == 1
    assert len(read_lines(first_run(program).attempts)) == 2


@pytest.mark.slow
def test_logs_print_what_the_job_said(program: Program) -> None:
    assert program(*SMALL).returncode == 0
    printed = program("logs", "run").stdout
    assert "loading the stand-in" in printed
    assert printed.count("==> ") >= 1
    assert program("logs", "--follow").stdout == printed
    told = json.loads(program("logs", "--json").stdout)
    (log,) = [log for log in told["logs"] if log["path"].endswith(".out")]
    assert "loading the stand-in" in log["lines"]
    (attempt,) = read_lines(first_run(program).attempts)
    assert (log["job"], log["node"]) == (attempt["job"], attempt["node"])
    endless = program("logs", "--json", "-f")
    assert (endless.returncode, endless.stdout) == (2, "")


@pytest.mark.slow
def test_merge_and_chat_find_the_run_and_the_cache_it_was_trained_from(program: Program) -> None:
    assert program("lora.r=4,8", "cache=my_cache", *SMALL).returncode == 0
    run = next(run for run in sweep_of(program).runs() if run.name == "r8")
    cache = str(program.cwd / "my_cache")
    assert json.loads(program("merge", "r8").stdout) == ["merge", str(run.path), cache]
    assert json.loads(program("chat", "r8", "2+2=?", "cache=other").stdout)[2:] == [str(program.cwd / "other"), "2+2=?"]
    newest = json.loads(program("chat", "how many?", "--json").stdout)
    assert newest[2:] == [cache, "how many?", "--json"]
    ambiguous = program("merge", "r")
    assert ambiguous.returncode == 2
    assert "r4-" in ambiguous.stderr
