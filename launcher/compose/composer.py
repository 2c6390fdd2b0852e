"""Hydra overrides -> `Sweep`: every run typed, range-checked, named and identified. Nothing is written."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from launcher.compose.axes import RUN_GROUPS, Point, span
from launcher.compose.naming import run_name, source_name, sweep_name
from launcher.compose.overrides import ParsedOverrides, read_overrides
from launcher.compose.tree import Composer, Values, resolved
from launcher.config import ClusterConfig, FolderConfig
from launcher.installation import conf_folders, find_groups, replaced_files
from launcher.records import Run, Sweep
from train.config import RunConfig, TrackingConfig, parse_run_config
from train.data.source import data_fingerprint
from train.errors import BadInput
from train.model.source import is_there, model_fingerprint
from train.section import check_name, parse_section
from train.store.layout import CacheDir, SweepDir
from train.store.permissions import refuse_shared
from train.store.storage import local_path, named_folder


def compose(overrides: list[str]) -> Sweep:
    """The sweep that `overrides` ask for, in Hydra's override grammar, checked to the last run.

    Raises:
        BadInput: a mistake in keys, options, values, axes, names, files or the root, in one paragraph.
    """
    folders = conf_folders()
    try:
        return _compose(overrides, folders)
    except BadInput as exc:
        replaced = ", ".join(map(str, replaced_files(folders)))
        if not replaced:
            raise
        raise BadInput(
            f"{exc} These files of yours are used instead of shipped ones of the same name: {replaced}."
        ) from exc


def _compose(overrides: list[str], folders: tuple[Path, ...]) -> Sweep:
    groups = find_groups(folders)
    parsed = read_overrides(overrides, groups)
    composer = Composer(parsed, folders, groups)
    axes = composer.axes()
    points = span(axes.grid, axes.zip, groups)
    _refuse_fixed_axes(parsed, points[0])
    runs = _distinct_runs(points, composer)
    settings = resolved(composer.values(points[0]))
    places = parse_section(FolderConfig, {key: settings[key] for key in FolderConfig.model_fields if key in settings})
    name = _sweep_name(settings.get("sweep", {}).get("name"), composer.sweep_file(), runs)
    root = named_folder("root", places.root)
    refuse_shared(SweepDir(root / name))
    return Sweep(
        name=name,
        root=root,
        cache=_readable_cache(places.cache),
        runs=tuple(runs),
        cluster=parse_section(ClusterConfig, settings.get("cluster", {}), "cluster"),
        tracking=parse_section(TrackingConfig, settings.get("tracking", {}), "tracking"),
        command=f"python -m launcher {shlex.join(overrides)}".rstrip(),
    )


def _distinct_runs(points: list[Point], composer: Composer) -> list[Run]:
    """A run per point; points that come to the same configuration are one run, under the first one's name."""
    model_fingerprint_of, data_fingerprint_of = cache(model_fingerprint), cache(data_fingerprint)
    runs: dict[str, Run] = {}
    for point in points:
        config = _run_config(composer.values(point))
        model = config.model.model_copy(update={"fingerprint": model_fingerprint_of(config.model)})
        data = config.data.model_copy(update={"fingerprint": data_fingerprint_of(config.data)})
        config = config.model_copy(update={"model": model, "data": data})
        run = Run(config, config.run_id(), run_name(point), point)
        runs.setdefault(run.id, run)
    return list(runs.values())


def _run_config(values: Values) -> RunConfig:
    """The typed part of a tree that describes a run."""
    sections = {key: values[key] for key in RUN_GROUPS if key in values}
    for key in _missing_keys(sections):
        raise BadInput(f"{key} has no value yet; give it one: {key}=...")
    if "${" in repr(sections):
        whole = resolved(values)
        sections = {key: whole[key] for key in sections}
    for key in ("model", "data"):
        if "source" in sections.get(key, {}):
            sections[key] = {"name": source_name(str(sections[key]["source"]))} | sections[key]
    config = parse_run_config(sections)
    check_name(config.model.name, "model.name")
    check_name(config.data.name, "data.name")
    return _located(config)


def _located(config: RunConfig) -> RunConfig:
    """`config` with absolute paths for its files, since jobs run from another folder."""
    model = config.model.model_copy(update={"source": _absolute_source("model.source", config.model.source)})
    files = {"source": _absolute_source("data.source", config.data.source)}
    if config.data.eval_source is not None:
        files["eval_source"] = _absolute_source("data.eval_source", config.data.eval_source)
    return config.model_copy(update={"model": model, "data": config.data.model_copy(update=files)})


def _absolute_source(key: str, source: str) -> str:
    """A path made absolute; ``kind:…`` sources and hub ids as they are."""
    if not source.strip():
        raise BadInput(f"{key}= is empty; give it a value, or leave it out.")
    path = local_path(source)
    return str(path) if source.startswith((".", "~")) or is_there(path) else source


def _missing_keys(values: Values, prefix: str = "") -> Iterator[str]:
    """The full keys that a YAML leaves to the user as ``???``."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _missing_keys(value, f"{prefix}{key}.")
        elif value == "???":
            yield prefix + key


def _refuse_fixed_axes(parsed: ParsedOverrides, point: Point) -> None:
    """Refuse one value for a key that the sweep varies: one of the two would have no effect."""
    both = sorted(parsed.keys & point.keys())
    if both:
        (value,) = (line.partition("=")[2] for line in parsed.lines if line.partition("=")[0].lstrip("+") == both[0])
        axis = shlex.quote(f"sweep.grid={{{both[0]}:[{value}]}}")
        raise BadInput(
            f"{both[0]} is given one value, and it is an axis of the sweep; leave the value out, "
            f"or make it the only one of the axis: {axis}."
        )


def _sweep_name(given: str | None, sweep_file: str, runs: list[Run]) -> str:
    """The user's name, or the default one."""
    if given is not None:
        return check_name(given, "sweep.name")
    models, data = {run.config.model.name for run in runs}, {run.config.data.name for run in runs}
    return sweep_name(sweep_file, list(runs[0].axes), models, data)


def _readable_cache(text: str) -> Path:
    """The absolute cache folder, if the user may look into it."""
    cache = named_folder("cache", text)
    is_there(CacheDir(cache).model("any"))
    return cache
