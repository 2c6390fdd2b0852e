"""`python -m launcher keys`: docs/configuration.md is what it prints, every key has a meaning, and types come from the classes."""

import json
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.compose.key_reference import markdown
from launcher.compose.keys import Key, all_keys, is_key, key_fields
from launcher.installation import shipped_conf

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


@pytest.fixture(scope="module")
def keys() -> dict[str, Key]:
    return {key.name: key for key in all_keys((shipped_conf(),))}


def test_the_document_is_current() -> None:
    hint = "make it again: python -m launcher keys > docs/configuration.md"
    assert DOCUMENT.read_text() == markdown((shipped_conf(),)), hint


def test_every_key_has_a_meaning(keys: dict[str, Key]) -> None:
    assert keys.keys() == key_fields().keys()
    assert len(keys) > 75
    assert [name for name, key in keys.items() if not key.meaning.endswith(".")] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train.learning_rate", "number > 0, at most 1"),
        ("lora.r", "integer from 1 to 4096"),
        ("lora.lora_dropout", "number at least 0, < 1"),
        ("data.format", "one of auto, alpaca, chat"),
        ("quant.bnb_4bit_quant_type", "only nf4"),
        ("train.max_steps", "integer at least 1 or null"),
        ("train.compile", "true, false or auto"),
        ("train.micro_batch_tokens", "integer or auto"),
        ("quant.load_in_4bit", "true or false"),
        ("lora.target_modules", "list of strings or string"),
        ("lora.layers_to_transform", "list of integers or null"),
        ("lora.rank_pattern", "{name: integer}"),
        ("cluster.partitions.<name>.memory_gib", "number > 0 or null"),
    ],
)
def test_types_are_in_plain_words(keys: dict[str, Key], name: str, words: str) -> None:
    assert keys[name].type == words


def test_a_default_names_the_choice_that_gives_it(keys: dict[str, Key]) -> None:
    rate = keys["train.learning_rate"]
    assert (rate.default, rate.choice, rate.otherwise) == (1e-3, "train=default", {"train=epochs": 2e-4})
    steps = keys["train.max_steps"]
    assert (steps.default, steps.choice, steps.otherwise) == (60, "train=default", {"": None})
    assert (keys["train.seed"].default, keys["train.seed"].choice) == (0, None)
    text = DOCUMENT.read_text()
    assert "| `train.learning_rate` | number > 0, at most 1 | `1e-3` (`train=default`) |" in text
    assert "| `train.max_steps` | integer at least 1 or null | `60` (`train=default`), else `null` |" in text
    assert "| `cache` | string | `$LORAPACK_CACHE`, else `cache` |" in text


def test_the_users_own_files_count_in_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "train").mkdir(parents=True)
    (tmp_path / "conf" / "train" / "mine.yaml").write_text("learning_rate: 5e-4\nbatch_size: 2\n")
    monkeypatch.chdir(tmp_path)
    assert main(["keys", "train.learning_rate", "--json"]) == 0
    (rate,) = json.loads(capsys.readouterr().out)["keys"]
    assert rate["otherwise"] == {"train=epochs": 2e-4, "train=mine": 5e-4}
    assert main(["keys"]) == 0
    assert capsys.readouterr().out == DOCUMENT.read_text()


def test_a_section_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "lora"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "lora  The adapter. Keys are those of PEFT's `LoraConfig`, plus `loraplus_lr_ratio`."
    assert lines[2].split()[:6] == ["lora.r", "integer", "from", "1", "to", "4096"]
    assert "16 (lora=default)" in lines[2]
    assert {line.split()[0] for line in lines[2:] if line.startswith(" lora.")} == {
        name for name in key_fields() if name.startswith("lora.")
    }


def test_one_key_says_all_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "train.learning_rate"]) == 0
    told = capsys.readouterr().out
    assert "number > 0, at most 1" in told
    assert "1e-3 (train=default)" in told
    assert "2e-4 (train=epochs)" in told
    assert "lr, peak_lr" in told
    assert main(["keys", "cluster.partitions.a100.gpu", "--json"]) == 0
    (fact,) = json.loads(capsys.readouterr().out)["keys"]
    assert (fact["key"], fact["type"]) == ("cluster.partitions.<name>.gpu", "string or null")


@pytest.mark.parametrize(
    ("name", "said"), [("lorra", "'lora'"), ("lora.rank", "'lora.r'"), ("trian.lr", "'train.learning_rate'")]
)
def test_an_unknown_section_is_answered_with_a_close_one(
    name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", name]) == 2
    assert f"did you mean {said}?" in " ".join(capsys.readouterr().err.split())


def test_what_is_a_key() -> None:
    known = ["root", "lora", "lora.r", "cluster.partitions.a100.gpu", "lora.rank_pattern.q_proj", "sweep.grid.lora.r"]
    unknown = ["lora.rr", "lora.r.x", "cluster.partitions.a100.memory", "optimizer", "model/other"]
    assert [name for name in known + unknown if is_key(name)] == known
