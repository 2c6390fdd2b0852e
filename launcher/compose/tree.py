"""The configuration tree as plain dictionaries: the one place that talks to Hydra's compose API.

Hydra composes once per combination of swept groups; swept values are set on plain dictionaries, so that a grid of a
thousand runs takes a second.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launcher.compose.axes import RUN_GROUPS, Point, flatten
from launcher.compose.overrides import ParsedOverrides, own_options
from launcher.config import SweepConfig
from launcher.installation import Groups
from train.errors import BadInput
from train.section import parse_section

Values = dict[str, Any]

PRIMARY = "lorapack-config"


class Composer:
    """Composes the configuration of any point of the sweep; Hydra is asked once per combination of groups."""

    def __init__(self, parsed: ParsedOverrides, folders: tuple[Path, ...], groups: Groups) -> None:
        self._parsed = parsed
        self._groups = groups
        self._lines = parsed.lines + own_options(parsed.given, parsed, groups)
        self._folders = folders
        self._composed: dict[tuple[str, ...], tuple[Values, Values]] = {}

    def axes(self) -> SweepConfig:
        """The axes of the sweep file and of ``sweep.grid``, ``sweep.zip`` and ``key=a,b`` on the command line."""
        sweep = self._compose({})[0].get("sweep", {})
        for kind in ("grid", "zip"):
            if isinstance(sweep, dict) and isinstance(sweep.get(kind), dict):
                sweep = sweep | {kind: flatten(sweep[kind])}
        axes = parse_section(SweepConfig, sweep, "sweep")
        self._lines = self._parsed.lines + own_options(
            self._parsed.given | axes.grid.keys() | axes.zip.keys(), self._parsed, self._groups
        )
        return axes.model_copy(update={"grid": axes.grid | self._parsed.axes})

    def sweep_file(self) -> str:
        """The chosen option of the group `sweep`."""
        return str(self._compose({})[1].get("sweep", "none"))

    def values(self, point: Point) -> Values:
        """The whole configuration tree at `point`, with interpolations not yet resolved."""
        values = copy.deepcopy(self._compose(point)[0])
        for key, value in point.items():
            section, _, name = key.partition(".")
            if name:
                values.setdefault(section, {})[name] = value
        return values

    def _compose(self, point: Point) -> tuple[Values, Values]:
        """Hydra's tree and its chosen options for the groups that `point` names."""
        lines = (*self._lines, *(f"{key}={option}" for key, option in point.items() if key in RUN_GROUPS))
        if lines not in self._composed:
            self._composed[lines] = _ask_hydra(list(lines), self._folders)
        return self._composed[lines]


def resolved(values: Values) -> Values:
    """`values` with every interpolation replaced by what it stands for."""
    try:
        return cast(Values, OmegaConf.to_container(OmegaConf.create(values), resolve=True))
    except OmegaConfBaseException as exc:
        raise BadInput(_one_sentence(exc)) from exc


def _ask_hydra(lines: list[str], folders: tuple[Path, ...]) -> tuple[Values, Values]:
    """Compose `lines` over the shipped ``config.yaml``: the tree as plain values, and the option chosen of each group.

    An option is the first file of its name in `folders`.
    """
    first, *others = folders
    try:
        # Hydra would take config.yaml from the user's folder, where another program's may lie; one that is stored under a name of our
        # own is found in no folder.
        primary = OmegaConf.load(folders[-1] / "config.yaml")
        searchpath = {"hydra": {"searchpath": [f"file://{folder}" for folder in others]}}
        ConfigStore.instance().store(PRIMARY, OmegaConf.merge(primary, searchpath))
        with initialize_config_dir(str(first), version_base="1.3"):
            config = hydra_compose(PRIMARY, lines, return_hydra_config=True)
        values = cast(Values, OmegaConf.to_container(config, resolve=False))
    except UnicodeDecodeError as exc:
        raise BadInput(f"{_not_utf8(folders)} is not UTF-8 text ({exc}); save it as UTF-8.") from exc
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, RecursionError) as exc:
        raise BadInput(_one_sentence(exc)) from exc
    return {key: value for key, value in values.items() if key != "hydra"}, values["hydra"]["runtime"]["choices"]


def _not_utf8(folders: tuple[Path, ...]) -> str:
    """The YAML files that are not UTF-8; Hydra does not say which one it read."""
    wrong = []
    for path in sorted(path for folder in folders for path in folder.rglob("*.yaml")):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            wrong.append(str(path))
    return ", ".join(wrong)


def _one_sentence(error: Exception) -> str:
    """The part of Hydra's, OmegaConf's or YAML's message that speaks of the configuration, in one line."""
    absent = re.search(r"Could not delete from config\. '(.+)' does not exist", str(error))
    if absent:
        key = absent[1]
        return f"'~{key}' removes what a file of conf/ sets, and none sets {key}; leave it out, or write {key}=<value>."
    noise = ("object_type", "See https", "Set the environment", "Config search path", "provider=", "To append")
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines()]
    kept = [
        line.removesuffix(".").replace("override ++", "override ")
        for line in lines
        if line and not line.startswith(noise)
    ]
    return f"The configuration cannot be composed: {'; '.join(kept)}. Correct that override or YAML file."
