"""Finding a key and a server, within the deadline, and keeping the key to oneself."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirrored import WrittenPack, assert_arrived, launcher, use_server, wait_until
from train.errors import BadInput
from train.mirror.reach import PROBE_SECONDS, PUBLIC_SERVER, find_key, look_for_server, server_url
from train.store.storage import read_json, write_json
from wandb_server import ENTITY, KEY, WandbServer

CANARY = "ca" * 8 + "na" * 4 + "ry" * 8
OTHER_CANARY = CANARY[::-1]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as running:
        use_server(running, tmp_path, monkeypatch, key=None)
        yield running


def write_netrc(folder: Path, key: str) -> None:
    (folder / "netrc").write_text(f"machine 127.0.0.1 login user password {key}\n")
    (folder / "netrc").chmod(0o600)


def test_the_key_is_found_in_three_places(server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_key(server.url, None) is None
    write_netrc(tmp_path, "from-netrc")
    assert find_key(server.url, None) == "from-netrc"
    assert find_key("https://elsewhere.org", None) is None
    (tmp_path / "netrc").write_bytes(b"machine \xff")
    assert find_key(server.url, None) is None, "what cannot be read holds no key"
    file = tmp_path / "key"
    file.touch(0o600)
    file.write_text("from-file\n")
    assert find_key(server.url, str(file)) == "from-file"
    monkeypatch.setenv("WANDB_API_KEY", "from-environment")
    assert find_key(server.url, str(file)) == "from-environment"


def test_a_key_file_that_others_can_read_is_refused(server: WandbServer, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o640)
    with pytest.raises(BadInput, match="chmod 600"):
        look_for_server(str(file))
    with pytest.raises(BadInput, match="cannot be read"):
        look_for_server(str(tmp_path / "missing"))


def test_the_server_is_the_one_that_wandb_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    assert server_url() == PUBLIC_SERVER
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.uni.example/\n")
    assert server_url() == "https://wandb.uni.example"


def test_what_the_probe_finds(server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_netrc(tmp_path, KEY)
    found = look_for_server(None, 30)
    assert (found.trouble, found.entity) == (None, ENTITY)
    assert KEY not in repr(found)
    server.mode = "401"
    assert "rejects the key" in str(look_for_server(None, 30).trouble)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "https://no host")
    assert "https://no host cannot be reached" in str(look_for_server(None, 30).trouble)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    server.mode = "silent"
    began = time.monotonic()
    trouble = str(look_for_server(None).trouble)
    assert "did not answer" in trouble or "timed out" in trouble
    assert time.monotonic() - began < PROBE_SECONDS + 20


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    rows = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "rows.jsonl"


@pytest.mark.slow
def test_canary_keys_are_nowhere_on_disk(
    server: WandbServer, tmp_path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that a sweep, whose job has a key in its environment, leaves behind: runs, cache, home and scratch; and then
    its upload, which finds another in netrc."""
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    write_netrc(tmp_path, OTHER_CANARY)
    server.mode = "500"
    settings = ["model=tiny", "quant=none", "data=file", f"data.source={small_data}", "data.eval_rows=5"]
    folders = [f"root={tmp_path}/runs", f"cache={tmp_path}/cache"]
    with monkeypatch.context() as job:
        job.setenv("WANDB_API_KEY", CANARY)
        done = launcher(tmp_path, *settings, *folders, "lora.r=2,4", "train.max_steps=4", "sweep.name=canary")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "W&B: offline (" in done.stdout
    server.mode = "good"
    sent = launcher(tmp_path, "sync", "--debug", folders[0])
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert len(server.runs) == 2
    (tmp_path / "netrc").unlink()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    for key in (CANARY, OTHER_CANARY):
        assert files_with(key, written) == []
        assert all(key not in text for text in (done.stdout, done.stderr, sent.stdout, sent.stderr))


def files_with(key: str, files: list[Path]) -> list[Path]:
    return [path for path in files if key.encode() in path.read_bytes()]


@pytest.mark.slow
def test_an_environment_without_wandb_says_so_once(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A module table that denies wandb stands in for an environment that was made before it was needed."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "sitecustomize.py").write_text("import sys\nsys.modules['wandb'] = None\n")
    pack = WrittenPack(tmp_path, 1, max_steps=5)
    with monkeypatch.context() as old:
        old.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path / "old"), os.environ.get("PYTHONPATH")])))
        with pack.job(cause="done") as said:
            pack.train(5)
        refused = launcher(tmp_path, "sync", f"root={tmp_path}")
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "W&B" in line]
    assert "the package wandb is missing" in line
    assert f"launcher sync {pack.sweep.path.name}" in line
    assert (said, pack.dir.mirror_log.read_text()) == ([], ""), "one worker, and no complaint of it"
    assert refused.returncode == 2
    assert "pip install wandb" in " ".join(refused.stderr.split())
    assert launcher(tmp_path, "sync", f"root={tmp_path}").returncode == 0
    assert_arrived(server, pack)


def test_w_and_b_learns_nothing_of_the_host(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither Slurm's variables nor the command line, the checkout, the host's name or the user's files; but how busy it is."""
    key_file = tmp_path / "key"
    key_file.touch(0o600)
    key_file.write_text(CANARY)
    monkeypatch.setenv("SLURM_JOB_ACCOUNT", "secret-account")
    monkeypatch.setenv("WANDB__STATS_SAMPLING_INTERVAL", "0.2")
    pack = WrittenPack(tmp_path, 1, max_steps=5)
    write_json(pack.dir.pack, read_json(pack.dir.pack) | {"tracking": {"mode": "online", "key_file": str(key_file)}})
    with pack.job(cause="done"):
        pack.train(5)
        wait_until(lambda: any(stored.events for stored in server.runs.values()))
    assert files_with(CANARY, [path for path in tmp_path.rglob("*") if path.is_file()]) == [key_file]
    (stored,) = server.runs.values()
    events = [json.loads(event) for event in stored.events]
    measured = {name for event in events for name in event if not name.startswith("_")}
    assert any(name.startswith("system.proc.") for name in measured), "the trainer's own processor and memory"
    assert all(name.startswith("system.") for name in measured)
    assert set(stored.files) <= {"wandb-summary.json", "config.yaml"}
    said = json.dumps([stored.fields, stored.summary, stored.rows, stored.events, server.uploads])
    for secret in ("secret-account", os.uname().nodename, str(tmp_path), sys.executable):
        assert secret not in said


def test_the_trainer_opens_no_connection(tmp_path: Path) -> None:
    """`train.job` knows nothing of W&B but how to start and end a process: no client, no socket, no HTTP."""
    script = "import train.job, sys; print(*sorted({'wandb', 'http.client', 'urllib.request', 'requests'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == ""
