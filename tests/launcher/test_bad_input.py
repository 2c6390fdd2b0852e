"""Every kind of bad input through the real program: one paragraph that names it, exit code 2, and no file made or changed."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import launcher
from architectures import ARCHITECTURES
from stand_in import Program
from train.config import ModelConfig
from train.store.layout import CacheDir

Tiny = tuple[ModelConfig, CacheDir, Path]

SOURCE = Path(launcher.__file__).parent.parent
ROW = {"instruction": "Say yes.", "input": "", "output": "yes"}
QUICK = ["model=tiny", "train.max_steps=1", "data.eval_rows=4"]
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


@pytest.fixture
def program(tmp_path: Path, tiny_model: Tiny) -> Program:
    """The program as it is, in a folder with a good file of rows, and with a cache elsewhere."""
    program = Program(SOURCE, tmp_path)
    # Other people's libraries warn.
    del program.environment["PYTHONWARNINGS"]
    program.environment["LORAPACK_CACHE"] = str(tiny_model[1].path)
    write_rows(tmp_path / "good.jsonl", [ROW] * 30)
    return program


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Tiny) -> Path:
    """A model folder of the test's own."""
    return Path(shutil.copytree(tiny_model[2], tmp_path / "my model"))


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Mode, size and time of change of everything below `folder`."""
    found = {str(path.relative_to(folder)): path.lstat() for path in [folder, *folder.rglob("*")]}
    return {name: (info.st_mode, info.st_size, info.st_mtime_ns) for name, info in found.items()}


def refuse(program: Program, arguments: list[str], *said: str) -> None:
    before = snapshot(program.cwd)
    refused = program(*arguments, timeout=240)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert refused.stdout == ""
    paragraph = " ".join(refused.stderr.partition("error:")[2].split())
    assert refused.stderr.count("error:") == 1
    assert "\n\n" not in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "Retrying" not in refused.stderr
    assert all(part in paragraph for part in said), paragraph
    assert snapshot(program.cwd) == before


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.rr=3", ["lora.rr", "lora_alpha"]),
        ("optimizer=adam", ["'optimizer'", "train"]),
        ("model=tinny", ["model=tinny", "did you mean model=tiny?"]),
        ("lora.r=0", ["lora.r=0", "from 1 to 4096"]),
        ("lora.lora_dropout=1.5", ["lora.lora_dropout=1.5", "< 1"]),
        ("lora.target_modules=[c_attn]", ["'c_attn'", "it has", "q_proj"]),
        ("sweep.grid={lora.rank:[1,2]}", ["'lora.rank'", "did you mean 'lora.r'"]),
        ("sweep.zip={lora.r:[1,2,3],lora.lora_alpha:[1,2]}", ["lora.r has 3", "lora.lora_alpha has 2"]),
        ("data.source=missing.jsonl", ["'missing.jsonl' does not exist", "looked at"]),
        ("model.source=./missing", ["missing", "config.json"]),
        ("sweep.name=a/b", ["sweep.name='a/b'"]),
        ("data.name=\x1b[2J", ["control character"]),
        ("data.source=b\udcffd.jsonl", ["not UTF-8"]),
        ("root=", ["root= is empty"]),
        ("cache=", ["cache= is empty"]),
        ("root=good.jsonl/x", ["good.jsonl is not a folder", "choose another root="]),
        ("cache=good.jsonl/x", ["good.jsonl is not a folder", "choose another cache="]),
        ("root=~nobody-has-this-name/runs", ["cannot be found"]),
        (f"lora.target_modules={'[' * 5000}", ["is not a key=value"]),
        (f"model.source=/{'x' * 300}", ["File name too long"]),
    ],
)
def test_a_wrong_word_on_the_command_line(program: Program, override: str, said: list[str]) -> None:
    chosen = [word for word in QUICK if not override.startswith("model")] or QUICK[1:]
    refuse(program, [*chosen, override], *said)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "rows.jsonl",
            b'{"instruction": "a", "output": "b"}\n{"instruction": "a"\n',
            ["rows.jsonl:2", "not valid JSON"],
        ),
        ("rows.jsonl", b'{"instruction": "a", "output": 7}\n', ["rows.jsonl:1", "output has to be text, not 7"]),
        ("rows.jsonl", b'{"instruction": "a", "input": 0, "output": "b"}\n', ["rows.jsonl:1", "input has to be text"]),
        ("rows.jsonl", b'{"instruction": "a", "output": "\\ud83d"}\n', ["rows.jsonl:1", "half of a character"]),
        ("rows.jsonl", b'\n{"instruction": "Z\xfcrich", "output": "b"}\n', ["rows.jsonl:2", "0xfc"]),
        ("rows.jsonl", b"[" * 100_000, ["rows.jsonl:1", "not valid JSON"]),
        ("rows.csv", b"instruction,output\na,b\na\n", ["rows.csv:3", "fields"]),
        ("rows.json", b"[]", ["has no rows"]),
        ("rows.jsonl", b"", ["has no rows"]),
        ("rows.txt", b"x", ["'.txt'", ".jsonl"]),
        ("rows.parquet", b"PAR1", ["cannot be read as a Parquet file"]),
    ],
)
def test_a_bad_data_file(program: Program, name: str, content: bytes, said: list[str]) -> None:
    (program.cwd / name).write_bytes(content)
    refuse(program, [*QUICK, f"data.source={name}"], *said)


def test_a_damaged_page_of_a_parquet_file(program: Program) -> None:
    path = program.cwd / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW] * 100), path, compression="gzip")
    content = path.read_bytes()
    path.write_bytes(content[:10] + bytes(50) + content[60:])
    refuse(program, [*QUICK, "data.source=rows.parquet"], "cannot be read as a Parquet file")


@pytest.mark.slow
def test_rows_of_which_nothing_is_learnt(program: Program) -> None:
    write_rows(program.cwd / "long.jsonl", [ROW | {"instruction": "word " * 100}] * 30)
    refuse(
        program,
        [*QUICK, "data.source=long.jsonl", "data.max_length=64"],
        "data.max_length=64 cuts off the whole answer",
    )


def damage(name: str, content: str | None) -> Callable[[Path], None]:
    """Replace a file of a model folder, or remove it."""

    def change(folder: Path) -> None:
        (folder / name).unlink() if content is None else (folder / name).write_text(content)

    return change


def configure(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def lose_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (damage("model.safetensors", None), ["no weights", "model.safetensors"]),
        (damage("model.safetensors", "version https://git-lfs"), ["not a safetensors file", "Git LFS"]),
        (damage("config.json", None), ["no config.json"]),
        (damage("config.json", "{"), ["config.json is not valid JSON"]),
        (damage("config.json", "[]"), ["must be a JSON object"]),
        (configure(hidden_size=None), ["cannot be loaded", "hidden_size"]),
        (damage("tokenizer.json", None), ["no tokenizer"]),
        (damage("tokenizer.json", "{"), ["the tokenizer in", "cannot be loaded"]),
        (configure(model_type="from_tomorrow"), ["model type `from_tomorrow`"]),
        (configure(num_hidden_layers=5), ["incomplete", "model.layers.4"]),
        (lose_a_weight, ["incomplete", "model.layers.3.mlp.up_proj.weight"]),
    ],
)
def test_a_bad_model_folder(program: Program, folder: Path, change: Callable[[Path], None], said: list[str]) -> None:
    change(folder)
    refuse(program, [*QUICK[1:], f"model.source={folder.name}/", "data.source=good.jsonl"], *said)


@pytest.mark.slow
@pytest.mark.parametrize(("hub", "wanted"), [("refuses", "model.source=org/name"), ("is silent", "data=alpaca")])
def test_a_hub_that_cannot_be_reached(program: Program, hub: str, wanted: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if hub == "refuses":
            server.close()
        home = {"HF_ENDPOINT": address, "HF_HOME": str(program.cwd.parent / "hf")}
        program.environment |= home | {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        refuse(program, [*QUICK[1:], "model=tiny", wanted], f"{address} cannot be reached", "launcher stage", "local f")


@pytest.mark.slow
def test_an_architecture_that_no_path_computes(program: Program, tiny_model: Tiny) -> None:
    config = ARCHITECTURES["doge-window"].config()
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(program.cwd / "odd")
    AutoTokenizer.from_pretrained(tiny_model[2]).save_pretrained(program.cwd / "odd")
    words = [*QUICK[1:], "model.source=./odd", "data.source=good.jsonl", "lora.target_modules=all-linear"]
    refuse(program, words, "'doge' is computed by no path as transformers computes it", "padded: ")


def without_privileges() -> None:
    """Let permissions count for root too; who is not root has nothing to give up."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def run_without_privileges(
    program: Program, closed: Path, mode: int, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """The program while the folder or file `closed` has the permissions `mode`."""
    closed.chmod(mode)
    try:
        return subprocess.run(
            [sys.executable, "-m", "launcher", *arguments],
            cwd=program.cwd,
            env=program.environment,
            preexec_fn=without_privileges,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        closed.chmod(0o700)


def refuse_without_privileges(program: Program, closed: Path, *arguments: str) -> None:
    done = run_without_privileges(program, closed, 0, *arguments)
    assert done.returncode == 2, done.stderr
    assert "cannot be read: Permission denied" in " ".join(done.stderr.split())
    assert not (program.cwd / "runs").exists()


@pytest.mark.parametrize("closed", ["good.jsonl", "my model", "my model/config.json", "my model/model.safetensors"])
def test_files_that_the_user_may_not_read(program: Program, folder: Path, closed: str) -> None:
    words = [*QUICK[1:], f"model.source={folder}", "data.source=good.jsonl"]
    refuse_without_privileges(program, program.cwd / closed, *words)


@pytest.mark.parametrize(
    "words", [["plan", *QUICK, "root=shut/x"], ["plan", *QUICK, "cache=shut/x"], ["status", "root=shut/x"]]
)
def test_folders_into_which_the_user_may_not_look(program: Program, words: list[str]) -> None:
    (program.cwd / "shut").mkdir()
    refuse_without_privileges(program, program.cwd / "shut", *words)


def test_a_root_that_the_user_may_not_write_is_refused_before_anything_is_fetched(program: Program) -> None:
    (program.cwd / "shut").mkdir()
    # In no cache yet.
    words = [*QUICK, "data.source=good.jsonl", "data.max_length=77", "root=shut/runs"]
    done = run_without_privileges(program, program.cwd / "shut", 0o500, *words)
    assert done.returncode == 2, done.stderr
    assert "shut is not writable for you" in " ".join(done.stderr.split())
    assert "rows to train on" not in done.stderr


def shared_by_acl(folder: Path) -> None:
    """Let user 12345 write, as ``setfacl -m u:12345:rwx`` does; the mode alone shows no more than rwxrwx---."""
    nobody = 0xFFFFFFFF
    entries = [(0x01, 7, nobody), (0x02, 7, 12345), (0x04, 0, nobody), (0x10, 7, nobody), (0x20, 0, nobody)]
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(folder, "system.posix_acl_access", packed)


@pytest.mark.parametrize(
    ("shared", "share", "said"),
    [
        ("runs", lambda folder: folder.chmod(0o777), "everybody"),
        ("runs", shared_by_acl, "user 12345"),
        ("runs/mine", lambda folder: folder.chmod(0o777), "everybody"),
        ("runs/mine/code/0123", lambda folder: folder.chmod(0o707), "everybody"),
    ],
)
def test_a_folder_that_others_can_write(
    program: Program, shared: str, share: Callable[[Path], None], said: str
) -> None:
    for folder in ("runs", "runs/mine", "runs/mine/code", "runs/mine/code/0123"):
        (program.cwd / folder).mkdir(mode=0o755)
    share(program.cwd / shared)
    refuse(program, [*QUICK, "sweep.name=mine"], f"{shared} can be written by others ({said})", "chmod -R go-w")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("grid:\n  lora.r: [4, 8] # größer".encode("latin-1"), ["odd.yaml is not UTF-8"]),
        (b"grid:\n  8: [4, 8]\n", ["axis '8'"]),
        (b"grid:\n  true: [4, 8]\n", ["axis 'True'"]),
        (b"grid: [lora.r]\n", ["sweep.grid"]),
        (b"- lora.r\n", ["sweep=['lora.r']", "dictionary"]),
        (b"grid: {\n", ["cannot be composed"]),
    ],
)
def test_a_bad_sweep_file(
    program: Program, tmp_path_factory: pytest.TempPathFactory, content: bytes, said: list[str]
) -> None:
    copy = tmp_path_factory.mktemp("copy")
    for name in ("launcher", "train", "conf"):
        shutil.copytree(SOURCE / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "conf" / "sweep" / "odd.yaml").write_bytes(content)
    program.environment["PYTHONPATH"] = str(copy)
    refuse(program, [*QUICK, "sweep=odd"], *said)


@pytest.mark.slow
def test_a_full_disk(program: Program) -> None:
    """A file system of 64 KiB, mounted for this process alone, so that its last act is to list what is left there."""
    (program.cwd / "small").mkdir()
    script = 'mount -t tmpfs -o size=64k,mode=700 none "$0"; "$@"; status=$?; echo "left:"; ls -A "$0"; exit $status'
    words = [sys.executable, "-m", "launcher", *QUICK, "data.source=good.jsonl", "root=small"]
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(program.cwd / "small"), *words],
        cwd=program.cwd,
        env=program.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in " ".join(done.stderr.split())
    assert done.stdout.partition("left:")[2].split() == []


@pytest.mark.slow
def test_a_tokenizer_without_a_pad_token_is_welcome(program: Program, folder: Path) -> None:
    """The stated policy: training never pads, so it needs none."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    done = program(*QUICK[1:], f"model.source={folder}", "data.source=good.jsonl", timeout=240)
    assert done.returncode == 0, done.stderr
    assert "trainable params: " in done.stdout
    assert len(list((program.cwd / "runs").glob("*/*/adapter/adapter_model.safetensors"))) == 1
