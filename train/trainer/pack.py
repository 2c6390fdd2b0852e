"""From run folders to a running loop: load data and base, restore the runs at a common step, train.

The main process of a job and its workers come here with the same calls; only the main process has leases and writes.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from train.config import RunConfig, read_run_config
from train.data.loading import load_tokenized
from train.data.source import data_fingerprint, tokens_key
from train.data.token_table import TokenizedData
from train.errors import BadInput
from train.lora.peft_forms import StockPeft
from train.lora.targets import adapted_modules, parameter_line, trainable_parameters
from train.model.base_cache import BaseCache
from train.model.loading import stock_skeleton
from train.model.source import model_fingerprint
from train.model.staging import stage_model
from train.nn.facts import known_facts
from train.nn.packed_model import PackedModel
from train.runtime.activity import Activity
from train.runtime.attempts import cause_of
from train.runtime.rendezvous import NothingToDo, ProcessInfo
from train.runtime.signals import StopFlag, Stopped
from train.store.causes import Cause
from train.store.journal import JournalHeader
from train.store.layout import CacheDir, PackDir, RunDir
from train.store.lease import Lease
from train.store.records import read_pack
from train.trainer.base import fit_to_device, open_base
from train.trainer.checkpoint import Checkpoint, common_step, from_bytes, sound_checkpoints, to_bytes
from train.trainer.context import JobContext
from train.trainer.loop import PackLoop
from train.trainer.pack_state import build_pack_state
from train.trainer.process_group import SINGLE_PROCESS, open_process_group
from train.trainer.run_writer import NullRunWriter, RunWriter
from train.trainer.samples import AnswerDecoder, Sampler, load_answer_decoder
from train.trainer.session import RunSession

log = logging.getLogger("lorapack.trainer")

Leases = list[tuple[RunDir, Lease]]


def train_pack(leases: Leases, cache: CacheDir, job: JobContext) -> None:
    """Train the runs whose leases this job holds, to their ends, together with its other processes.

    Raises:
        Stopped: the job was asked to stop; everything is saved.
        BadInput, StorageError: see the messages.
    """
    started = time.monotonic()
    job.activity.begin("loading")
    configs = [read_run_config(run.config) for run, _ in leases]
    for config in configs:
        refuse_changed_sources(config, cache)
    model_dir = stage_model(configs[0].model, cache)
    data = tokenized_data(configs, model_dir, cache, job.stop)
    job.stop.check()
    longest = longest_row(data)
    # Judged even where the plan did it already, so that the same job always chooses alike.
    facts = known_facts(model_dir, configs[0].model, cache)
    fit = fit_to_device(configs[0], facts, longest)
    base = open_base(configs[0], model_dir, fit, longest, BaseCache(cache, job.stop.check, job.activity), facts)
    job.stop.check()
    log.info(f"ready after {time.monotonic() - started:.1f} s")
    writer = RunWriter if job.group.is_main else NullRunWriter
    peft = StockPeft(configs[0].model, partial(stock_skeleton, model_dir, configs[0].model))
    sessions = [
        RunSession(config, table, adapted_modules(config.lora, list(base.shapes)), writer(run, lease, peft))
        for (run, lease), config, table in zip(leases, configs, data, strict=True)
    ]
    samples_wanted = job.group.is_main and any(config.train.sample_prompts for config in configs)
    decoder = load_answer_decoder(configs[0].model, model_dir) if samples_wanted else None
    loop = build_loop(base, sessions, fit.micro_batch_tokens, decoder, job)
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
    changed = []
    if model_fingerprint(config.model) != config.model.fingerprint:
        changed.append(f"model.source={config.model.source}")
    # Tokens in the cache are those of the data as it was read then.
    tokenized = cache.tokens(tokens_key(config.data, config.model)).exists()
    if not tokenized and data_fingerprint(config.data) != config.data.fingerprint:
        changed.append(f"data.source={config.data.source}")
    if changed:
        raise BadInput(
            f"{' and '.join(changed)} changed since this run was planned; run the same command again to plan it again."
        )


def build_loop(
    base: PackedModel,
    sessions: Sequence[RunSession],
    micro_batch_tokens: int,
    decoder: AnswerDecoder | None,
    job: JobContext,
) -> PackLoop:
    """Put every session where its checkpoints left it, or at its beginning, and return the loop that trains them.

    Without a `decoder` no run gives sample answers.
    """
    states = _newest_states(sessions) if job.group.is_main else []
    if job.group.size > 1:
        states = from_bytes(job.group.broadcast_bytes(to_bytes(states)))
    for session, state in zip(sessions, states, strict=True):
        _start(session, state, base)
    sampler = None if decoder is None else Sampler(decoder, micro_batch_tokens, job)
    return PackLoop(base, build_pack_state(base, sessions, states), sessions, micro_batch_tokens, sampler, job)


def _newest_states(sessions: Sequence[RunSession]) -> list[Checkpoint | None]:
    """The newest state that all sessions have, or of each its own newest."""
    found = [sound_checkpoints(session.dir) for session in sessions]
    common = common_step([set(checkpoints) for checkpoints in found])
    steps = [max(checkpoints, default=None) if common is None else common for checkpoints in found]
    return [None if step is None else checkpoints[step] for step, checkpoints in zip(steps, found, strict=True)]


def longest_row(data: list[TokenizedData]) -> int:
    """Tokens of the longest row that is learnt or evaluated."""
    return max(int(table.lengths().max()) for tables in data for table in (tables.train, tables.eval))


def _start(session: RunSession, state: Checkpoint | None, base: PackedModel) -> None:
    """Set a run's journal and counters to its state, and say what it trains."""
    trainable = trainable_parameters(session.config.lora, base.shapes)
    log.info(f"{session.dir.path.name}: {parameter_line(trainable, base.parameters)}")
    if state is not None:
        session.rewind(state)
        log.info(f"{session.dir.path.name}: continues after step {session.step} of {session.total_steps}")
        return
    session.begin(
        JournalHeader(
            step=0,
            max_steps=session.total_steps,
            train_rows=len(session.data.train),
            eval_rows=len(session.data.eval),
            trainable_parameters=trainable,
            total_parameters=base.parameters + trainable,
        )
    )


def train_as_main_process(
    leases: Leases, pack: PackDir, cache: CacheDir, process: ProcessInfo, stop: StopFlag, activity: Activity
) -> None:
    """Train the runs whose leases this process holds, together with the other processes of its job, if there are any.

    Raises:
        Stopped, LorapackError: see `train_pack`; the others end too.
    """
    with open_process_group(process, pack, stop) as group:
        group.broadcast_bytes(_leases_to_bytes(leases))
        train_pack(leases, cache, JobContext(stop, activity, group))


def train_as_worker_process(pack: PackDir, stop: StopFlag, process: ProcessInfo) -> str:
    """Train along with the main process; the cause of the end is for the log, what counts is what the main process writes."""
    group = SINGLE_PROCESS
    try:
        with open_process_group(process, pack, stop) as group:
            record = read_pack(pack)
            leases = _leases_from_bytes(group.broadcast_bytes(b""), Path(record.sweep_dir))
            train_pack(leases, CacheDir(Path(record.cache)), JobContext(stop=stop, group=group))
    except NothingToDo:
        return "nothing to train"
    except Exception as exc:
        if not isinstance(exc, Stopped):
            traceback.print_exception(exc, file=sys.stderr)
        cause, detail = cause_of(exc)
        group.report_failure(cause, detail)
        return f"{cause}: {detail}"
    return Cause.DONE


def _leases_to_bytes(leases: Leases) -> bytes:
    return json.dumps([[run.path.name, lease.model_dump()] for run, lease in leases]).encode()


def _leases_from_bytes(message: bytes, sweep: Path) -> Leases:
    return [(RunDir(sweep / name), Lease(**lease)) for name, lease in json.loads(message)]
