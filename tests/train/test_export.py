"""Merging and chatting: the tuned model is base plus adapter, prompts are those of training."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from test_peft_files import TOKENS, Tensors, write_random_adapter
from test_peft_forms import decoder_linears, stock_peft
from test_targets import lora
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

import architectures
from train.config import ModelConfig, RunConfig, parse_run_config
from train.data.rendering import alpaca_prompt
from train.errors import BadInput
from train.export import Chat, chat, main, merge_run, prompt_text
from train.lora.peft_files import write_adapter
from train.lora.targets import adapted_modules
from train.model.source import model_fingerprint
from train.model.staging import stage_model
from train.store.layout import CacheDir, RunDir
from train.store.storage import make_folder, write_folder, write_text

Tiny = tuple[ModelConfig, CacheDir, Path]

LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}}


def run_config(model: ModelConfig) -> RunConfig:
    return parse_run_config(
        {
            "model": model.model_dump(),
            "data": {"name": "d", "source": "builtin:tasks", "fingerprint": "d"},
            "lora": LORA,
            "quant": {"load_in_4bit": True},
            "train": {"learning_rate": 1e-3, "batch_size": 1},
        }
    )


def finished_run(path: Path, model: ModelConfig, model_dir: Path) -> RunDir:
    """A run folder with a frozen configuration and an adapter that changes much."""
    run, config = RunDir(make_folder(path)), run_config(model)
    write_text(run.config, yaml.safe_dump(config.model_dump()))
    with write_folder(run.adapter) as folder:
        write_random_adapter(folder, config.lora, model, model_dir)
    return run


@pytest.fixture
def run(tiny_model: Tiny, tmp_path: Path) -> RunDir:
    return finished_run(tmp_path / "run-1", tiny_model[0], tiny_model[2])


@torch.no_grad()
def test_the_merged_folder_is_the_tuned_model(run: RunDir, tiny_model: Tiny) -> None:
    _, cache, base_dir = tiny_model
    merged_dir = merge_run(run, cache)
    assert merged_dir == run.merged
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), run.adapter)(TOKENS).logits
    merged = AutoModelForCausalLM.from_pretrained(merged_dir)
    torch.testing.assert_close(merged(TOKENS).logits, tuned, atol=1e-5, rtol=1e-5)
    words = AutoTokenizer.from_pretrained(merged_dir)
    assert words.chat_template == AutoTokenizer.from_pretrained(base_dir).chat_template
    assert not (merged_dir / "adapter_config.json").exists()


def test_a_16_bit_base_stays_16_bit_and_is_rounded_once(tiny_model: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    base = AutoModelForCausalLM.from_pretrained(tiny_model[2], dtype=torch.bfloat16)
    base.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model[2]).save_pretrained(folder)
    model = ModelConfig(name="own", source=str(folder))
    model = model.model_copy(update={"fingerprint": model_fingerprint(model)})
    run = finished_run(tmp_path / "run-1", model, folder)
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = PeftModel.from_pretrained(wide, run.adapter).merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(merge_run(run, CacheDir(tmp_path / "cache"))).state_dict()
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert all(torch.equal(merged[name], expected[name].bfloat16()) for name in expected)


def test_merging_again_replaces_the_folder(run: RunDir, tiny_model: Tiny) -> None:
    merge_run(run, tiny_model[1])
    (run.merged / "config.json").write_text("broken")
    merge_run(run, tiny_model[1])
    assert json.loads((run.merged / "config.json").read_text())["model_type"] == "llama"


def test_a_run_without_adapter_is_refused(run: RunDir, tiny_model: Tiny) -> None:
    shutil.rmtree(run.adapter)
    with pytest.raises(BadInput, match="no adapter"):
        merge_run(run, tiny_model[1])
    assert not run.merged.exists()


def test_a_base_that_changed_since_training_is_refused(tiny_model: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model[2], tmp_path / "base"))
    model = ModelConfig(name="own", source=str(folder))
    model = model.model_copy(update={"fingerprint": model_fingerprint(model)})
    run = finished_run(tmp_path / "run-1", model, folder)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    with pytest.raises(BadInput, match="has changed since the adapter was trained"):
        merge_run(run, tiny_model[1])


@pytest.fixture
def tokenizer(tiny_model: Tiny) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model[2])


def test_prompts_are_written_as_in_training(tokenizer: PreTrainedTokenizerBase) -> None:
    assert prompt_text("Add 2 and 3.", tokenizer) == "<|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = None
    assert prompt_text("Add 2 and 3.", tokenizer) == alpaca_prompt("Add 2 and 3.", "")


def test_an_answer_ends_with_the_token_that_training_teaches(tiny_model: Tiny) -> None:
    """Base models often have another end-of-text token than the one that closes a turn of their chat template."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model[2])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model[2], eos_token="<|pad|>")
    talk = Chat(model, tokenizer)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|pad|>"])
    assert talk.model.generation_config.eos_token_id == sorted(ends)


def taught_to_say(word: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make `model` say the letters of `word`, each once and in their order, then close: a chain from token to token."""
    chain = [*tokenizer("\n").input_ids, *tokenizer(word).input_ids, tokenizer.eos_token_id]
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    for token, following in itertools.pairwise(chain):
        model.lm_head.weight.data[following] = 9 * model.model.embed_tokens.weight.data[token]


def own_base(folder: Path, base: Any, tokenizer: PreTrainedTokenizerBase) -> ModelConfig:
    """A base of its own, saved to `folder`."""
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = ModelConfig(name="own", source=str(folder))
    return model.model_copy(update={"fingerprint": model_fingerprint(model)})


def run_with(adapter: Tensors, path: Path, model: ModelConfig, base: Any) -> RunDir:
    """A run folder with that adapter over `base`, of rank 4 and scaling 1."""
    run, config = RunDir(make_folder(path)), run_config(model)
    config = config.model_copy(
        update={"lora": lora(sorted({name.rpartition(".")[2] for name in adapter}), r=4, lora_alpha=4.0)}
    )
    write_text(run.config, yaml.safe_dump(config.model_dump()))
    with write_folder(run.adapter) as folder:
        write_adapter(
            folder,
            stock_peft(base.config).config(config.lora, adapted_modules(config.lora, list(adapter)), adapter),
            adapter,
        )
    return run


def test_a_merged_model_stops_where_training_taught_it_to(tiny_model: Tiny, tmp_path: Path) -> None:
    """A chat template may end turns with another token than the base's end of text; its other settings stay."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model[2])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model[2])
    taught_to_say("42 km", base, tokenizer)
    turn_end, text_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|pad|>"])
    # After the turn's end the model would go on for ever.
    base.lm_head.weight.data[tokenizer("x").input_ids[0]] = 9 * base.model.embed_tokens.weight.data[turn_end]
    tokenizer.eos_token = "<|pad|>"
    base.config.eos_token_id = text_end
    base.generation_config = GenerationConfig(eos_token_id=text_end, pad_token_id=text_end)
    model = own_base(tmp_path / "base", base, tokenizer)
    # Read as it is, though transformers itself would not write a temperature without sampling.
    settings = {
        "eos_token_id": text_end,
        "pad_token_id": text_end,
        "repetition_penalty": 1.0,
        "do_sample": False,
        "temperature": 0.7,
    }
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    model = model.model_copy(update={"fingerprint": model_fingerprint(model)})
    nothing = {"model.layers.0.self_attn.q_proj": (torch.ones(4, 64), torch.zeros(64, 4))}
    run = run_with(nothing, tmp_path / "run-1", model, base)
    merged_dir = merge_run(run, CacheDir(tmp_path / "cache"))
    written = json.loads((merged_dir / "generation_config.json").read_text())
    assert written == settings | {"eos_token_id": sorted([turn_end, text_end])}
    prompt = tokenizer(prompt_text("How far?", tokenizer), return_tensors="pt", add_special_tokens=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = AutoModelForCausalLM.from_pretrained(merged_dir).generate(**prompt, max_new_tokens=20)
    assert tokenizer.decode(answer[0, prompt.input_ids.shape[1] :]) == "42 km<|im_end|>"


@pytest.mark.parametrize("architecture", ["gemma3", "gpt2", "llama-tied", "deepseek-v3", "qwen3-moe"])
@torch.no_grad()
def test_every_kind_of_base_is_merged(architecture: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Beside a vision tower, with transposed weights, with a tied head, with experts."""
    base = architectures.tiny_model(architecture)
    model = own_base(tmp_path / "base", base, tokenizer)
    shapes = decoder_linears(base)
    adapter = {name: (0.1 * torch.randn(4, shape[1]), 0.1 * torch.randn(shape[0], 4)) for name, shape in shapes.items()}
    run = run_with(adapter, tmp_path / "run-1", model, base)
    bare = base(TOKENS).logits
    merged = AutoModelForCausalLM.from_pretrained(merge_run(run, CacheDir(tmp_path / "cache")))
    tuned = PeftModel.from_pretrained(base, run.adapter)(TOKENS).logits
    assert (tuned - bare).abs().max() > 0.05
    torch.testing.assert_close(merged(TOKENS).logits, tuned, atol=1e-4, rtol=1e-4)


def test_the_answer_is_streamed_and_stops(tiny_model: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model[2])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model[2])
    taught_to_say("42 km", model, tokenizer)
    assert Chat(model, tokenizer).answer("How far?", stream=True) == "42 km"
    assert capsys.readouterr().out == "42 km\n"


def test_every_line_of_stdin_is_a_prompt(
    run: RunDir, tiny_model: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.export.ANSWER_TOKENS", 4)
    monkeypatch.setattr("sys.stdin", io.StringIO("One?\n\n  Two?"))
    chat(run, tiny_model[1], None, as_json=True)
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["prompt"] for answer in answers] == ["One?", "Two?"]
    assert all(answer.keys() == {"prompt", "answer"} for answer in answers)


def test_the_command_prints_one_json_document(
    run: RunDir, tiny_model: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.export.ANSWER_TOKENS", 4)
    main(["chat", str(run.path), str(tiny_model[1].path), "-2 + 3 = ?", "--json"])
    assert json.loads(capsys.readouterr().out)["prompt"] == "-2 + 3 = ?"
    main(["merge", str(run.path), str(tiny_model[1].path), "--json"])
    assert json.loads(capsys.readouterr().out) == {"merged": str(run.merged)}


def test_a_missing_base_is_made_again(run: RunDir, tmp_path: Path, tiny_model: Tiny) -> None:
    cache = CacheDir(tmp_path / "other")
    merge_run(run, cache)
    assert stage_model(tiny_model[0], cache).is_relative_to(tmp_path / "other")
