"""Every YAML in conf/ composes into a typed run, and no default lives both there and in the classes."""

from pathlib import Path

import pytest
import yaml
from pydantic_core import PydanticUndefined

from launcher.compose.composer import compose
from launcher.config import ClusterConfig, SweepConfig
from launcher.installation import shipped_conf
from train.config import RunConfig, TrackingConfig

SECTIONS = {name: field.annotation for name, field in RunConfig.model_fields.items()} | {
    "cluster": ClusterConfig,
    "tracking": TrackingConfig,
    "sweep": SweepConfig,
}
OPTIONS = [(path.parent.name, path.stem) for path in sorted(shipped_conf().glob("*/*.yaml"))]
GIVEN_BY_USER = {("model", "own"): "model.source=acme/llama", ("data", "file"): "data.source={folder}/rows.jsonl"}
ROW = '{"instruction": "Say hello.", "output": "hello"}\n'


def lines_for(group: str, option: str, folder: Path) -> list[str]:
    (folder / "rows.jsonl").write_text(ROW * 10)
    given = GIVEN_BY_USER.get((group, option), "").format(folder=folder)
    return [line for line in (f"{group}={option}", given, f"root={folder}/runs") if line]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str, tmp_path: Path) -> None:
    sweep = compose(lines_for(group, option, tmp_path))
    assert len({run.id for run in sweep.runs}) == len(sweep.runs) >= 1
    assert (len(sweep.runs) > 1) == (group == "sweep" and option != "none")


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_no_option_repeats_a_default_of_its_class(group: str, option: str) -> None:
    values = yaml.safe_load((shipped_conf() / group / f"{option}.yaml").read_text())
    fields = SECTIONS[group].model_fields
    assert values.keys() <= fields.keys()
    for key, value in values.items():
        default = fields[key].get_default(call_default_factory=True)
        assert default is PydanticUndefined or default != value, f"{group}/{option}.yaml repeats {key}={value!r}"


def test_every_group_of_the_classes_has_options() -> None:
    assert {group for group, _ in OPTIONS} == SECTIONS.keys()


def test_the_shipped_sweeps_span_what_they_say(tmp_path: Path) -> None:
    def axes(name: str) -> list[dict[str, object]]:
        return [run.axes for run in compose([f"sweep={name}", f"root={tmp_path}"]).runs]

    assert [a["lora.r"] for a in axes("rank")] == [4, 8, 16, 32]
    assert [a["lora.lora_alpha"] / a["lora.r"] for a in axes("rank_alpha_tied")] == [2, 2, 2, 2]
    assert len(axes("rank_alpha")) == 9
    assert [type(a["lora.target_modules"]) for a in axes("target_modules")] == [list, list, list, str]


def test_the_cache_can_be_set_for_a_whole_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAPACK_CACHE", str(tmp_path / "shared"))
    assert compose([f"root={tmp_path}"]).cache == tmp_path / "shared"
