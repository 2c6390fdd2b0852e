"""An adapter in PEFT's own files: ``PeftModel.from_pretrained`` loads the folder, and so does whatever else reads PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save

from train.config import LoraConfig, ModelConfig
from train.errors import BadInput
from train.lora.targets import ALL_LINEAR
from train.store.storage import storage_errors, write_bytes

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

Adapter = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def write_adapter(folder: Path, lora: LoraConfig, model: ModelConfig, tensors: Adapter) -> None:
    """Write ``adapter_model.safetensors`` (float32) and ``adapter_config.json`` into an existing folder.

    Args:
        folder: to write into; the caller makes it appear complete (`train.store.storage.write_folder`).
        lora: what was trained.
        model: the base, which the adapter names.
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
        peft_config(lora, model, list(tensors)).save_pretrained(str(folder))


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


def peft_config(lora: LoraConfig, model: ModelConfig, names: Sequence[str]) -> PeftLoraConfig:
    """`lora` over the modules `names`, as PEFT writes it; LoRA+ is part of training, so PEFT has no field for it."""
    # Here, since PEFT is slow to import and reading an adapter does not need it.
    from peft import LoraConfig as PeftLoraConfig

    config = PeftLoraConfig(
        base_model_name_or_path=model.source,
        revision=model.revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=_spelled_out(lora.target_modules, names),
        use_rslora=lora.use_rslora,
        layers_to_transform=lora.layers_to_transform,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        bias=lora.bias,
    )
    # PEFT writes a set in the order of its hashes, which differ from process to process.
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    return config


def _spelled_out(target_modules: list[str] | str, names: Sequence[str]) -> list[str] | str:
    """``all-linear`` by the last parts of module names, as PEFT saves it: other readers do not know ``all-linear``."""
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        return [name.rpartition(".")[2] for name in names]
    return target_modules
