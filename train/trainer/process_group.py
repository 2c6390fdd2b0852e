"""One pack on several GPUs: each process holds the base and all adapters and computes its share of every step.

    deal the step's sequences -> forward and backward of the share -> add up gradients and losses -> the same optimizer step everywhere

Process 0 is the main one: it alone reads and writes run folders. What the others cannot know by computing alike (signals, requests to
cancel, the clock, checkpoints) is told or agreed on by messages between the hosts, which do not wait for the GPUs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch import distributed
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from train.data.sampling import TokenSequence, split_by_tokens
from train.errors import PeerLost
from train.runtime.rendezvous import ProcessInfo, publish_rendezvous, wait_for_rendezvous
from train.runtime.signals import STOP_SIGNALS, StopFlag, Stopped
from train.store.causes import Cause
from train.store.layout import PackDir

HOST = "127.0.0.1"
SILENCE = timedelta(minutes=30)  # the leader may save, or quantize a base, while the others wait


class SingleProcess:
    """The only process of its job: it has every sequence, and its word counts."""

    is_main = True
    size = 1

    def micro_batches(
        self, sequences: Sequence[TokenSequence], max_tokens: int, stop: StopFlag
    ) -> Iterator[list[TokenSequence]]:
        """This process's share of `sequences` in micro-batches of at most `max_tokens` tokens; `stop` is looked at before each.

        Raises:
            Stopped: a process of the job was asked to stop; all of them learn it before the same micro-batch.
        """
        for chunk in split_by_tokens(list(sequences), max_tokens):
            stop.check()
            yield chunk

    def all_reduce(self, *partial: torch.Tensor) -> None:
        """Turn each process's part of these sums into the whole, in place."""

    def broadcast_flags(self, flags: list[bool]) -> list[bool]:
        """The leader's `flags`: for what depends on its clock, or on files that only it looks at."""
        return flags

    def broadcast_bytes(self, content: bytes) -> bytes:
        """The leader's `content`; what the others bring is not looked at."""
        return content

    def report_failure(self, cause: str, detail: str) -> None:
        """Leave word why this process ends, for the leader to write down."""


SINGLE_PROCESS = SingleProcess()


class ProcessGroup(SingleProcess):
    """One of several processes. All must make the same calls in the same order."""

    def __init__(self, place: ProcessInfo, store: Store) -> None:
        self.rank, self.size, self.is_main = place.rank, place.size, place.rank == 0
        self._store = store

    def micro_batches(
        self, sequences: Sequence[TokenSequence], max_tokens: int, stop: StopFlag
    ) -> Iterator[list[TokenSequence]]:
        """See `SingleProcess`; every process looks as often as the one with the most micro-batches."""
        shares = [list(split_by_tokens(share, max_tokens)) for share in deal(sequences, self.size)]
        mine = shares[self.rank]
        for turn in range(max(map(len, shares))):
            self._check(stop)
            if turn < len(mine):
                yield mine[turn]

    def all_reduce(self, *partial: torch.Tensor) -> None:
        """See `SingleProcess`. Every process gets the same bits, so they stay in step."""
        with self._heard():
            for tensor in partial:
                distributed.all_reduce(tensor)

    def broadcast_flags(self, flags: list[bool]) -> list[bool]:
        """See `SingleProcess`."""
        told = torch.tensor(flags, dtype=torch.uint8)
        with self._heard():
            distributed.broadcast(told, 0)
        return [bool(flag) for flag in told.tolist()]

    def broadcast_bytes(self, content: bytes) -> bytes:
        """See `SingleProcess`."""
        length = torch.tensor([len(content)])
        with self._heard():
            distributed.broadcast(length, 0)
            told = torch.frombuffer(bytearray(content), dtype=torch.uint8) if self.is_main else _bytes(int(length))
            if len(told):
                distributed.broadcast(told, 0)
        return told.numpy().tobytes()

    def report_failure(self, cause: str, detail: str) -> None:
        """See `SingleProcess`."""
        with suppress(RuntimeError):  # the leader is gone too
            self._store.set(f"ended/{self.rank}", json.dumps([cause, detail]))

    def _check(self, stop: StopFlag) -> None:
        """`StopFlag.check` of all processes at once: each raises `Stopped`, or none."""
        with suppress(Stopped):
            stop.check()
        names = [None, *(number.name for number in STOP_SIGNALS)]
        asked = torch.tensor([names.index(stop.signal_name)])
        with self._heard():
            distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        if int(asked):  # a signal that came since this process was counted is for the next time
            stop.signal_name = stop.signal_name or names[int(asked)]
            stop.check()

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """Translate torch's errors of a connection that broke: a process of the job is gone."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as exc:
            raise self._loss() from exc

    def _loss(self) -> PeerLost:
        with suppress(RuntimeError):
            for rank in range(1, self.size):
                if self._store.check([f"ended/{rank}"]):
                    cause, detail = json.loads(self._store.get(f"ended/{rank}"))
                    return PeerLost(Cause(cause), f"process {rank} of this job ended: {detail}")
        return PeerLost(Cause.NODE_FAIL, "a process of this job was killed; see its log")


def deal(sequences: Sequence[TokenSequence], size: int) -> list[list[TokenSequence]]:
    """Deal sequences to `size` hands of about as many tokens each: the longest first, each to the lightest hand.

    A function of the sequences alone, so that every process deals alike (Graham's LPT rule: at most 4/3 of the best).
    """
    hands: list[list[TokenSequence]] = [[] for _ in range(size)]
    tokens = [0] * size
    for sequence in sorted(sequences, key=lambda s: (-len(s.tokens), s.run_index, s.index)):
        lightest = tokens.index(min(tokens))
        hands[lightest].append(sequence)
        tokens[lightest] += len(sequence.tokens)
    return hands


@contextmanager
def open_process_group(place: ProcessInfo, pack: PackDir, stop: StopFlag) -> Iterator[SingleProcess]:
    """The processes of this job, all come together.

    Messages go by gloo, GPU tensors by NCCL. Where this ends by an error nobody waits for the others.

    Raises:
        NothingToDo: the leader has nothing to do.
        LorapackError: the leader does not come.
        Stopped: this process was asked to stop while it waited.
    """
    if place.size == 1:
        yield SINGLE_PROCESS
        return
    port = 0 if place.rank == 0 else wait_for_rendezvous(pack, stop.check)
    store = TCPStore(HOST, port, place.size, is_master=place.rank == 0, timeout=SILENCE, wait_for_workers=False)
    if place.rank == 0:
        publish_rendezvous(pack, store.port)
    backend = "gloo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name may lead anywhere
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(
        backend, store=PrefixStore("team", store), rank=place.rank, world_size=place.size, timeout=SILENCE
    )
    yield ProcessGroup(place, store)
    distributed.destroy_process_group()


def _bytes(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8)
