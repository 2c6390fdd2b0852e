"""Bases quantized once: every job that reads one trains the very numbers of a job that quantized for itself."""

import dataclasses
import errno
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import packs
from train.config import ModelConfig, QuantConfig
from train.errors import StorageError
from train.model import base_cache
from train.model.base_cache import BaseCache, BaseSpec
from train.model.locking import locked
from train.model.quantized import QuantizedBase, hollow_model
from train.nn.base import load_base
from train.nn.packed_model import DeviceSetup, PackedModel, Residency, pack_model
from train.runtime.signals import StopFlag, Stopped
from train.store.layout import CacheDir
from train.store.storage import make_folder, read_json

MODEL = ModelConfig(name="tiny", source="builtin:tiny", fingerprint="tiny")
SINGLE = QuantConfig(load_in_4bit=True, bnb_4bit_use_double_quant=False)


def save(model: LlamaForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model in float32, with its head tied to its embedding or not."""
    return save(packs.tiny_llama(torch.float32, tied=request.param), tmp_path / "model")


def cache_in(folder: Path, stop: StopFlag | None = None) -> BaseCache:
    return BaseCache(CacheDir(folder), (stop or StopFlag()).check)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the cache logs."""
    caplog.set_level(logging.INFO, "lorapack")
    return caplog


def load(
    model_dir: Path,
    cache: BaseCache,
    quant: QuantConfig = packs.NF4,
    dtype: torch.dtype = torch.float32,
    residency: Residency = "nf4",
    device: torch.device = packs.CPU,
) -> PackedModel:
    return load_base(BaseSpec(model_dir, MODEL, quant, dtype, device), residency, 64, cache)


def numbers(base: PackedModel) -> dict[str, torch.Tensor]:
    """Everything that a base computes with."""
    found = {f"rest/{name}": tensor for name, tensor in base.model.named_parameters(remove_duplicate=False)}
    found |= {f"buffer/{name}": tensor for name, tensor in base.model.named_buffers()}
    for name, linear in base.linears.items():
        found[f"linear/{name}"] = linear.weight
        if linear.bias is not None:
            found[f"bias/{name}"] = linear.bias
    return found


def assert_same(a: PackedModel, b: PackedModel) -> None:
    mine, other = numbers(a), numbers(b)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) and mine[name].dtype == other[name].dtype for name in mine)
    assert {t.device.type for t in mine.values()} == {a.device.type}
    assert (a.parameters, a.shapes) == (b.parameters, b.shapes)


@pytest.mark.parametrize("device", packs.DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant", [packs.NF4, SINGLE], ids=["double", "single"])
def test_what_is_read_is_what_was_quantized(
    model_dir: Path,
    tmp_path: Path,
    quant: QuantConfig,
    dtype: torch.dtype,
    device: torch.device,
    logged: pytest.LogCaptureFixture,
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    expected = pack_model(loaded, DeviceSetup(quant, device, "nf4", 64))
    cache = cache_in(tmp_path / "cache")
    made = load(model_dir, cache, quant, dtype, device=device)
    (model_dir / "model.safetensors").unlink()
    read = load(model_dir, cache, quant, dtype, device=device)
    resident = load(model_dir, cache, quant, dtype, "resident", device)
    for base in (made, read, resident):
        assert_same(base, expected)
    assert len(logged.messages) == 1


@pytest.mark.parametrize("device", packs.DEVICES, ids=str)
def test_a_base_in_16_bits_is_that_of_its_files(model_dir: Path, tmp_path: Path, device: torch.device) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    base = load(model_dir, cache_in(tmp_path / "cache"), packs.SIXTEEN_BIT, torch.bfloat16, "resident", device)
    assert_same(base, pack_model(loaded, DeviceSetup(packs.SIXTEEN_BIT, device, "resident", 64)))
    assert not (tmp_path / "cache").exists()


def test_journals_do_not_tell_where_the_base_came_from(model_dir: Path, tmp_path: Path) -> None:
    cache, journals = cache_in(tmp_path / "cache"), []
    for name in ("made", "read"):
        packs.train(tmp_path / name, load(model_dir, cache), packs.DIVERSE[:3])
        journals.append([run.journal.read_bytes() for run in packs.run_dirs(tmp_path / name)])
    assert journals[0] == journals[1]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save(packs.tiny_llama(torch.float32), tmp_path / "model")


def test_of_two_jobs_that_start_at_once_one_quantizes(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand for processes: the lock belongs to an open file, so it keeps them apart alike."""
    made, opened = [], list[QuantizedBase]()
    both_began = threading.Barrier(2, timeout=30)
    quantize_files = base_cache.quantize_files
    wanted = BaseSpec(plain, MODEL, packs.NF4, torch.float32, packs.CPU)

    def counted(*arguments: object) -> object:
        made.append(arguments)
        return quantize_files(*arguments)  # type: ignore[arg-type]

    def work() -> None:
        both_began.wait()
        # No model: accelerate's empty weights are for one thread at a time.
        opened.append(cache_in(tmp_path / "cache").open(wanted))

    monkeypatch.setattr(base_cache, "quantize_files", counted)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    hollow = [hollow_model(plain, MODEL, torch.float32, quantized) for quantized in opened]
    assert_same(
        *(
            pack_model(model, DeviceSetup(packs.NF4, packs.CPU, "nf4", 64), quantized)
            for model, quantized in zip(hollow, opened, strict=True)
        )
    )


def test_a_job_that_waits_for_another_can_be_stopped(plain: Path, tmp_path: Path) -> None:
    stop = StopFlag()
    cache = cache_in(tmp_path / "cache", stop)
    wanted = BaseSpec(plain, MODEL, packs.NF4, torch.float32, packs.CPU)
    load(plain, cache)
    (kept,) = (path for path in (tmp_path / "cache" / "bases").iterdir() if path.is_dir())
    shutil.rmtree(kept)
    with locked(kept.with_suffix(".lock")):
        stop.signal_name = "SIGTERM"
        with pytest.raises(Stopped):
            cache.open(wanted)


@pytest.mark.parametrize("why", ["not a directory", "full"])
def test_a_cache_that_refuses_costs_nothing_but_time(
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    why: str,
    logged: pytest.LogCaptureFixture,
) -> None:
    cache, expected = cache_in(tmp_path / "cache"), load(plain, cache_in(tmp_path / "other"))
    if why == "full":
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        # Stands for the disk.
        monkeypatch.setattr(base_cache.shutil, "disk_usage", lambda path: usage)
    else:
        (tmp_path / "cache").touch()
    assert_same(load(plain, cache), expected)
    _kept_in_the_other, line = logged.messages
    assert "will quantize again" in line
    assert ("part of that path is a file" if why == "not a directory" else "0.0 GiB are free") in line
    assert not list(tmp_path.glob("cache/bases/*.tmp"))


@pytest.mark.parametrize("left", [0, 7, 5000])
def test_a_damaged_file_is_made_anew(plain: Path, tmp_path: Path, left: int) -> None:
    cache = cache_in(tmp_path / "cache")
    expected = load(plain, cache)
    (file,) = tmp_path.glob("cache/bases/*/base.safetensors")
    # `expected` reads from the file that is damaged now.
    shutil.copy(file, tmp_path / "whole")
    os.truncate(shutil.copy(file, tmp_path / "cut"), left)
    os.replace(tmp_path / "cut", file)
    assert_same(load(plain, cache), expected)
    assert file.read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_no_job_has_opened_for_a_month_makes_room(
    plain: Path, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    cache, used, idle = cache_in(tmp_path / "cache"), packs.NF4, SINGLE
    for quant in (used, idle):
        load(plain, cache, quant)
    abandoned = make_folder(tmp_path / "cache" / "bases" / ".0123.4567.tmp")
    bases = [path for path in (tmp_path / "cache" / "bases").iterdir() if path.is_dir()]
    month_ago = time.time() - (base_cache.IDLE_DAYS + 1) * 24 * 3600
    for path in bases:
        os.utime(path, (month_ago, month_ago))
    # Opening is using.
    load(plain, cache, used)
    assert all(path.exists() for path in bases), "only a job that adds a base removes any"
    load(plain, cache, used, torch.bfloat16)
    left = [read_json(path) for path in tmp_path.glob("cache/bases/*/about.json")]
    assert sorted((about["quant"] == used.model_dump(), about["dtype"]) for about in left) == [
        (True, "bfloat16"),
        (True, "float32"),
    ]
    assert not abandoned.exists()
    assert sum("no job has opened" in line for line in logged.messages) == 2


def variants() -> Iterator[BaseSpec]:
    """Bases that may differ in a bit from the first."""
    first = BaseSpec(Path(), MODEL, packs.NF4, torch.float32, packs.CPU)
    yield first
    yield dataclasses.replace(first, dtype=torch.bfloat16)
    yield dataclasses.replace(first, quant=SINGLE)
    yield dataclasses.replace(first, device=torch.device("cuda"))
    yield dataclasses.replace(first, model=MODEL.model_copy(update={"fingerprint": "other"}))


def test_bases_that_may_differ_are_kept_apart() -> None:
    abouts = [wanted.about() for wanted in variants()]
    assert all(a != b for i, a in enumerate(abouts) for b in abouts[:i])


def test_a_hubs_model_fetched_again_is_quantized_again(plain: Path) -> None:
    hub = MODEL.model_copy(update={"fingerprint": "hub:org/name@main"})
    wanted = BaseSpec(plain, hub, packs.NF4, torch.float32, packs.CPU)
    before = wanted.about()
    assert wanted.about() == before
    os.utime(plain / "model.safetensors", ns=(1, 1))
    assert wanted.about() != before


def test_a_file_system_without_locks_lets_everybody_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network file systems answer."""

    def refused(*_arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    with locked(tmp_path / "lock"), locked(tmp_path / "lock"):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_lock_keeps_others_out_until_it_is_released(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.lock"
    with locked(path), pytest.raises(Stopped), locked(path, packs.StopAfter(3).check):
        pytest.fail("two hold the same lock")
    assert logged.messages == ["another process is making model; waiting for it ..."]
    with locked(path, packs.StopAfter(1).check):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_lock_that_cannot_be_made_is_the_storages_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"), locked(tmp_path / "file" / "lock"):
        pytest.fail("there is no lock")
