"""Uses a finished run as a model: merges it into an ordinary model folder, or answers prompts on the CPU.

    python -m train.export merge RUN CACHE [--json]
    python -m train.export chat RUN CACHE [PROMPT] [--json]

The adapter is merged into the base as it was downloaded, in 16 or 32 bit, even if it was trained over NF4: 4 bits cannot hold the sum
of weight and adapter, and rounding would lose the adapter. Since such an adapter was fitted to the quantized base, the merged model's
logits differ slightly from those in training.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from train.config import LoraConfig, RunConfig, read_run_config
from train.data.rendering import closing_tokens, render, special_tokens
from train.data.rows import AlpacaRow
from train.errors import BadInput, LorapackError
from train.log import log_to
from train.lora.peft_files import read_adapter
from train.lora.peft_forms import Adapter
from train.lora.targets import adapted_modules
from train.model.folder import save_model
from train.model.linears import frozen_linears
from train.model.loading import load_tokenizer
from train.model.modalities import auto_class
from train.model.source import model_fingerprint
from train.model.staging import stage_model
from train.store.layout import CacheDir, RunDir
from train.store.storage import storage_errors, write_folder, write_text

ANSWER_TOKENS = 128
GENERATION_CONFIG = "generation_config.json"
# How a model that also sees or hears prepares its inputs.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def merge_run(run: RunDir, cache: CacheDir) -> Path:
    """Write the tuned model, in the base's own dtype, and its tokenizer to the run's ``merged`` folder.

    It keeps the base's settings of generation, but stops at every token that training taught to close an answer.

    Raises:
        BadInput: the run has no adapter, or its base has changed since it was trained.
        StorageError: the disk is full or read-only.
    """
    model, tokenizer = tuned_model(run, cache, dtype="auto")
    base = stage_model(read_run_config(run.config).model, cache)
    with write_folder(run.merged) as folder:
        save_merged(model, tokenizer, base, folder)
    return run.merged


def save_merged(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path) -> None:
    """Write a tuned model of the folder `base` into an existing `folder`.

    Raises:
        StorageError: the disk is full or read-only.
    """
    given = model.generation_config.eos_token_id
    ends = closing_tokens(tokenizer).union([given] if isinstance(given, int) else given or [])
    settings = base / GENERATION_CONFIG
    # transformers reads settings that it would not write, such as a temperature without sampling.
    kept = (
        json.loads(settings.read_text(encoding="utf-8"))
        if settings.is_file()
        else model.generation_config.to_diff_dict()
    )
    model.generation_config = GenerationConfig()
    save_model(model, tokenizer, folder)
    write_text(folder / GENERATION_CONFIG, json.dumps(kept | {"eos_token_id": sorted(ends)}, indent=2) + "\n")
    with storage_errors(folder):
        for name in PROCESSOR_FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)


def tuned_model(
    run: RunDir, cache: CacheDir, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base in `dtype` (``auto`` is that of its files) with the run's adapter merged in, and its tokenizer.

    Raises:
        BadInput: see `merge_run`.
    """
    adapter = read_adapter(run.adapter)
    config = read_run_config(run.config)
    _refuse_another_base(config)
    folder, code = stage_model(config.model, cache), config.model.trust_remote_code
    kind = auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=code))
    model: PreTrainedModel = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=code)
    merge_adapter(model, adapter, config.lora)
    return model.eval(), load_tokenizer(folder, config.model)


def merge_adapter(model: PreTrainedModel, adapter: Adapter, lora: LoraConfig) -> None:
    """Add the adapter that `lora` trained to the weights of `model`."""
    targets = adapted_modules(lora, list(adapter))
    linears = frozen_linears(model)
    for name, (a, b) in adapter.items():
        add_product(linears[name].weight, a, b, targets[name].scaling)


@torch.no_grad()
def add_product(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    """weight [out, in] += scaling * b [out, r] @ a [r, in], in float32, rounded once to the weight's dtype.

    One weight at a time: PEFT's `merge_and_unload` would need the whole base in float32 for that.
    """
    weight.copy_(weight.float() + scaling * (b @ a))


def _refuse_another_base(config: RunConfig) -> None:
    now = model_fingerprint(config.model)
    if now != config.model.fingerprint:
        raise BadInput(
            f"the base {config.model.source!r} has changed since the adapter was trained (its fingerprint was "
            f"{config.model.fingerprint} and is now {now}); restore the old files."
        )


class Chat:
    """Answers instructions one at a time, each rendered as in training. Decoding is greedy, so an answer is always the same."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        ends = closing_tokens(tokenizer)
        # A single prompt needs no padding, but `generate` warns without a pad token.
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
        model.generation_config = GenerationConfig(
            max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=sorted(ends), pad_token_id=padding
        )

    def answer(self, prompt: str, stream: bool) -> str:
        """The model's answer. With `stream` it is also printed, token by token as it is generated."""
        inputs = self.tokenizer(
            prompt_text(prompt, self.tokenizer), return_tensors="pt", **special_tokens(self.tokenizer)
        )
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, streamer=streamer)
        text: str = self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text.strip()


def prompt_text(instruction: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text before the answer in training: what `train.data.rendering` writes up to where the answer begins."""
    rendered = render(AlpacaRow(instruction, "", "answer"), tokenizer)
    return rendered.text[: rendered.answers[0][0]]


def chat(run: RunDir, cache: CacheDir, prompt: str | None, as_json: bool) -> None:
    """Print the answer to `prompt`, or to every line of stdin. As JSON it is one document, printed after the end of the input.

    Raises:
        BadInput: see `merge_run`.
    """
    model = Chat(*tuned_model(run, cache, dtype=torch.float32))
    # A generator, so that with a terminal each line is answered before the next one is read.
    prompts = _lines() if prompt is None else iter([prompt])
    if not as_json:
        for line in prompts:
            model.answer(line, stream=True)
        return
    answers = [{"prompt": line, "answer": model.answer(line, stream=False)} for line in prompts]
    print(json.dumps({"answers": answers} if prompt is None else answers[0], ensure_ascii=False))


def _lines() -> Iterator[str]:
    """The lines that are typed or piped, without empty ones, until the end of the input."""
    if sys.stdin.isatty():
        print("Each line is one prompt. Ctrl-D ends the chat.", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def main(arguments: list[str]) -> None:
    """Run one action. Its result goes to stdout, everything else to stderr."""
    chosen = _parser().parse_args(arguments)
    log_to(sys.stderr)
    run = RunDir(chosen.run)
    cache = CacheDir(chosen.cache)
    if chosen.action == "chat":
        chat(run, cache, chosen.prompt, chosen.json)
        return
    folder = merge_run(run, cache)
    print(json.dumps({"merged": str(folder)}) if chosen.json else f"merged model: {folder}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train.export", description="Use a finished run as a model.")
    actions = parser.add_subparsers(dest="action", required=True)
    merge = actions.add_parser("merge", help="write the tuned model as an ordinary folder")
    talk = actions.add_parser("chat", help="answer a prompt, or every line of stdin")
    for action in (merge, talk):
        action.add_argument("run", type=Path, help="run folder")
        action.add_argument("cache", type=Path, help="cache folder")
        action.add_argument("--json", action="store_true", help="print JSON and nothing else on stdout")
    talk.add_argument("prompt", nargs="?", help="what to answer")
    return parser


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LorapackError as exc:
        print(exc, file=sys.stderr)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
