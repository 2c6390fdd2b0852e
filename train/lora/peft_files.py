"""An adapter in PEFT's own files: ``PeftModel.from_pretrained`` loads the folder, and so does whatever else reads PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save

from train.errors import BadInput
from train.lora.peft_forms import PREFIX, Adapter
from train.store.storage import storage_errors, write_bytes

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig

WEIGHTS = "adapter_model.safetensors"


def write_adapter(folder: Path, config: PeftLoraConfig, tensors: Adapter) -> None:
    """Write ``adapter_model.safetensors`` (float32) and ``adapter_config.json`` into an existing folder.

    Args:
        folder: to write into; the caller makes it appear complete (`train.store.storage.write_folder`).
        config: what `StockPeft.config` found for these tensors.
        tensors: A [r, in] and B [out, r] by the module's full name in the base.

    Raises:
        StorageError: the disk is full or read-only.
    """
    named = {
        f"{PREFIX}{name}.lora_{letter}.weight": matrix.detach().to("cpu", torch.float32).contiguous()
        for name, pair in tensors.items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
    write_bytes(folder / WEIGHTS, save(named, metadata={"format": "pt"}))
    with storage_errors(folder):
        config.save_pretrained(str(folder))


def read_adapter(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A [r, in] and B [out, r], float32, by the module's full name.

    Raises:
        BadInput: the folder has no adapter.
    """
    if not (folder / WEIGHTS).is_file():
        raise BadInput(f"{folder} has no adapter (looked for {WEIGHTS}); it is written when the run is done.")
    named = load_file(folder / WEIGHTS)
    names = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in named if key.endswith(".lora_A.weight")]
    return {
        name: (named[f"{PREFIX}{name}.lora_A.weight"], named[f"{PREFIX}{name}.lora_B.weight"]) for name in sorted(names)
    }
