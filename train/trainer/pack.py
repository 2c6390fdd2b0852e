"""From run folders to a running loop: load data and base, seat the runs, restore them at a common step, train."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoConfig

from train.config import RunConfig, read_run_config
from train.data.loading import load_tokenized
from train.data.source import data_fingerprint, tokens_key
from train.data.token_table import TokenizedData
from train.errors import BadInput
from train.lora.targets import adapted_modules, parameter_line, trainable_parameters
from train.model.base_cache import BaseCache, BaseSpec
from train.model.source import model_fingerprint
from train.model.staging import stage_model
from train.nn.backends import choose_kernels, fit_pack, missing_compiler, resolve_dtype
from train.nn.packed_model import PackedModel, load_base
from train.runtime.activity import Activity
from train.runtime.attempts import cause_of
from train.runtime.rendezvous import NothingToDo, ProcessInfo
from train.runtime.signals import StopFlag, Stopped
from train.sizing import Fit
from train.store.causes import Cause
from train.store.layout import CacheDir, PackDir, RunDir
from train.store.lease import Lease
from train.store.storage import Record, read_json
from train.trainer.checkpoint import Checkpoint, common_step, from_bytes, sound_checkpoints, to_bytes
from train.trainer.loop import PackLoop, build_pack_state
from train.trainer.process_group import SINGLE_PROCESS, SingleProcess, open_process_group
from train.trainer.samples import AnswerDecoder, Sampler, load_answer_decoder
from train.trainer.session import FollowerSession, RunSession

VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "lorapack")

Say = Callable[[str], None]


def train_pack(
    leases: list[tuple[RunDir, Lease]],
    cache: Path,
    stop: StopFlag,
    say: Say,
    activity: Activity,
    team: SingleProcess = SINGLE_PROCESS,
) -> None:
    """Train the runs whose leases this job holds, to their ends, together with the other processes of `team`.

    Raises:
        Stopped: the job was asked to stop; everything is saved.
        BadInput, StorageError: see the messages.
    """
    started = time.monotonic()
    activity.begin("loading")
    configs = [read_run_config(run.config) for run, _ in leases]
    for config in configs:
        refuse_changed_sources(config, CacheDir(cache))
    model_dir = stage_model(configs[0].model, CacheDir(cache))
    data = tokenized_data(configs, model_dir, CacheDir(cache), stop)
    stop.check()
    longest = longest_row(data)
    fit = fit_to_device(configs[0], model_dir, longest)
    base = open_base(configs[0], model_dir, fit, longest, BaseCache(CacheDir(cache), say, stop.check, activity))
    stop.check()
    say(f"ready after {time.monotonic() - started:.1f} s")
    sessions = [
        (RunSession if team.is_main else FollowerSession)(
            run, config, table, adapted_modules(config.lora, list(base.shapes)), lease
        )
        for (run, lease), config, table in zip(leases, configs, data, strict=True)
    ]
    samples_wanted = team.is_main and any(config.train.sample_prompts for config in configs)
    words = load_answer_decoder(configs[0].model, model_dir) if samples_wanted else None
    loop = seat(base, sessions, stop, fit.micro_batch_tokens, say, words, team, activity)
    try:
        loop.run()
    except Exception as exc:
        for session in loop.sessions:
            session.end(*cause_of(exc))
        raise


def tokenized_data(configs: list[RunConfig], model_dir: Path, cache: CacheDir, stop: StopFlag) -> list[TokenizedData]:
    """The data of each run; runs with the same data share one object.

    Raises:
        Stopped: the job was asked to stop.
        BadInput, StorageError: see `load_tokenized`.
    """
    tables: dict[str, TokenizedData] = {}
    keys = [tokens_key(config.data, config.model) for config in configs]
    for config, key in zip(configs, keys, strict=True):
        if key not in tables:
            tables[key] = load_tokenized(config.data, config.model, model_dir, cache, stop.check)
    return [tables[key] for key in keys]


def refuse_changed_sources(config: RunConfig, cache: CacheDir) -> None:
    """A run's id promises what it learns from: refuse a model or data that changed on the disk since the run was planned.

    Raises:
        BadInput: naming what changed.
    """
    changed = (
        [f"model.source={config.model.source}"] if model_fingerprint(config.model) != config.model.fingerprint else []
    )
    tokenized = cache.tokens(tokens_key(config.data, config.model)).exists()  # what was read then is still there
    if not tokenized and data_fingerprint(config.data) != config.data.fingerprint:
        changed.append(f"data.source={config.data.source}")
    if changed:
        raise BadInput(
            f"{' and '.join(changed)} changed since this run was planned; run the same command again to plan anew."
        )


def seat(
    base: PackedModel,
    sessions: Sequence[RunSession],
    stop: StopFlag,
    micro_batch_tokens: int,
    say: Say,
    words: AnswerDecoder | None = None,
    team: SingleProcess = SINGLE_PROCESS,
    activity: Activity | None = None,
) -> PackLoop:
    """Put every session where its checkpoints left it, or at its beginning, and return the loop that trains them.

    Without `words` no run gives sample answers.
    """
    states = _newest_states(sessions, say) if team.is_main else []
    if team.size > 1:
        states = from_bytes(team.broadcast_bytes(to_bytes(states)))
    for session, state in zip(sessions, states, strict=True):
        _start(session, state, base, say)
    seats = build_pack_state(base, sessions, states)
    # The leader answers alone: stopped there, it would leave the others waiting, who agree with it between micro-batches.
    heard, activity = stop if team.size == 1 else StopFlag(), activity or Activity()
    sampler = None if words is None else Sampler(words, micro_batch_tokens, heard, activity)
    return PackLoop(base, seats, sessions, stop, micro_batch_tokens, facts(base), sampler, team, activity)


def _newest_states(sessions: Sequence[RunSession], say: Say) -> list[Checkpoint | None]:
    """The newest state that all sessions have, or of each its own newest."""
    found = [sound_checkpoints(session.dir, say) for session in sessions]
    common = common_step([set(checkpoints) for checkpoints in found])
    return [_newest(checkpoints, common) for checkpoints in found]


def _newest(checkpoints: dict[int, Checkpoint], common: int | None) -> Checkpoint | None:
    step = common if common is not None else max(checkpoints, default=None)
    return None if step is None else checkpoints[step]


def facts(base: PackedModel) -> Record:
    """What a result says about where it was computed."""
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a copy of the source
            continue
    return {"device": device_name(base.device), "dtype": str(base.dtype).removeprefix("torch."), "versions": versions}


def device_name(device: torch.device) -> str:
    """The name of the GPU, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def fit_to_device(config: RunConfig, model_dir: Path, longest: int) -> Fit:
    """How packs over the base of `config` use this device, for rows of at most `longest` tokens."""
    device = _device()
    architecture = AutoConfig.from_pretrained(model_dir, trust_remote_code=config.model.trust_remote_code)
    return fit_pack(config, architecture, model_dir, resolve_dtype(config.train, device), device, longest)


def open_base(config: RunConfig, model_dir: Path, fit: Fit, longest: int, bases: BaseCache) -> PackedModel:
    """The base of `config` on this device, as `fit` wants it."""
    device = _device()
    dtype = resolve_dtype(config.train, device)
    bases.say(f"loading {config.model.source} on {device_name(device)} in {str(dtype).removeprefix('torch.')}: {fit}")
    missing = missing_compiler(device, config.train)
    if missing is not None:
        bases.say(f"kernels are not compiled, which is slower: {missing}")
    compiles = config.train.compile is not False and missing is None
    kernels = choose_kernels(device, dtype, compiles=compiles, graphs=fit.graphs)
    spec = BaseSpec(model_dir, config.model, config.quant, dtype, device)
    base = load_base(spec, fit.residency, longest, bases, kernels)
    if fit.checkpoint_activations:
        base.checkpoint_activations()
    return base


def longest_row(data: list[TokenizedData]) -> int:
    """Tokens of the longest row that is learnt or evaluated."""
    return max(int(table.lengths().max()) for tables in data for table in (tables.train, tables.eval))


def _device() -> torch.device:
    """This process's own: with its number, since libraries take a plain ``cuda`` for the first GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _start(session: RunSession, state: Checkpoint | None, base: PackedModel, say: Say) -> None:
    """Set a run's journal and counters to its state, and say what it trains."""
    trainable = trainable_parameters(session.config.lora, base.shapes)
    say(f"{session.dir.path.name}: {parameter_line(trainable, base.parameters)}")
    if state is not None:
        session.rewind(state)
        say(f"{session.dir.path.name}: goes on after step {session.step} of {session.total_steps}")
        return
    session.begin(
        {
            "step": 0,
            "max_steps": session.total_steps,
            "train_rows": len(session.data.train),
            "eval_rows": len(session.data.eval),
            "trainable_parameters": trainable,
            "total_parameters": base.parameters + trainable,
        }
    )


Leases = list[tuple[RunDir, Lease]]


def lead(
    leases: Leases,
    pack: PackDir,
    cache: Path,
    stop: StopFlag,
    say: Callable[[str], None],
    activity: Activity,
    place: ProcessInfo,
) -> None:
    """Train the runs whose leases this process holds, together with the other processes of its job.

    Raises:
        Stopped, LorapackError: see `train_pack`; the others end too.
    """
    with open_process_group(place, pack, stop) as team:
        team.broadcast_bytes(_announcement(leases))
        train_pack(leases, cache, stop, say, activity, team)


def follow(pack: PackDir, stop: StopFlag, place: ProcessInfo) -> str:
    """Train along with the leader; the cause of the end is for the log, what counts is what the leader writes."""
    team = SINGLE_PROCESS
    try:
        with open_process_group(place, pack, stop) as team:
            facts = read_json(pack.pack)
            leases = _announced(team.broadcast_bytes(b""), Path(facts["sweep_dir"]))
            train_pack(leases, Path(facts["cache"]), stop, _silent, Activity(), team)
    except NothingToDo:
        return "nothing to train"
    except Exception as exc:
        if not isinstance(exc, Stopped):
            traceback.print_exception(exc, file=sys.stderr)
        cause, detail = cause_of(exc)
        team.report_failure(cause, detail)
        return f"{cause}: {detail}"
    return Cause.DONE


def _silent(_text: str) -> None:
    """What the leader says is enough."""


def _announcement(leases: Leases) -> bytes:
    return json.dumps([[run.path.name, asdict(lease)] for run, lease in leases]).encode()


def _announced(message: bytes, sweep: Path) -> Leases:
    return [(RunDir(sweep / name), Lease(**lease)) for name, lease in json.loads(message)]
