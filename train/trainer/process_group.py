"""One pack on several GPUs: each process holds the base and all adapters and computes its share of every step.

    deal the step's sequences -> forward and backward of the share -> sum gradients and losses -> the same optimizer step everywhere

Process 0 is the main one: it alone reads and writes run folders. What the others cannot compute themselves (signals, requests to
cancel, the clock, checkpoints) they get by messages between the hosts, which do not wait for the GPUs.
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
# The main process may save, or quantize a base, while the others wait.
SILENCE = timedelta(minutes=30)


class SingleProcess:
    """The only process of its job: it computes every sequence and decides alone."""

    is_main = True
    size = 1

    def micro_batches(
        self, sequences: Sequence[TokenSequence], max_tokens: int, stop: StopFlag
    ) -> Iterator[list[TokenSequence]]:
        """This process's share of `sequences` in micro-batches of at most `max_tokens` tokens; `stop` is looked at before each.

        Raises:
            Stopped: a process of the job was asked to stop; all of them stop before the same micro-batch.
        """
        for chunk in split_by_tokens(list(sequences), max_tokens):
            stop.check()
            yield chunk

    def all_reduce(self, *partial: torch.Tensor) -> None:
        """Turn each process's part of these sums into the whole, in process."""

    def broadcast_flags(self, flags: list[bool]) -> list[bool]:
        """The main process's `flags`: for what depends on its clock, or on files that only it reads."""
        return flags

    def broadcast_bytes(self, content: bytes) -> bytes:
        """The main process's `content`; what the others pass is ignored."""
        return content

    def report_failure(self, cause: str, detail: str) -> None:
        """Tell the main process why this one ends, for the attempts of the runs."""


SINGLE_PROCESS = SingleProcess()


class ProcessGroup(SingleProcess):
    """One of several processes. All must make the same calls in the same order."""

    def __init__(self, process: ProcessInfo, store: Store) -> None:
        self.rank = process.rank
        self.size = process.size
        self.is_main = process.rank == 0
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
        with self._translated_errors():
            for tensor in partial:
                distributed.all_reduce(tensor)

    def broadcast_flags(self, flags: list[bool]) -> list[bool]:
        """See `SingleProcess`."""
        shared = torch.tensor(flags, dtype=torch.uint8)
        with self._translated_errors():
            distributed.broadcast(shared, 0)
        return [bool(flag) for flag in shared.tolist()]

    def broadcast_bytes(self, content: bytes) -> bytes:
        """See `SingleProcess`."""
        length = torch.tensor([len(content)])
        with self._translated_errors():
            distributed.broadcast(length, 0)
            shared = torch.empty(int(length), dtype=torch.uint8)
            if self.is_main and content:
                shared = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            if len(shared):
                distributed.broadcast(shared, 0)
        return shared.numpy().tobytes()

    def report_failure(self, cause: str, detail: str) -> None:
        """See `SingleProcess`."""
        # The main process may be gone too.
        with suppress(RuntimeError):
            self._store.set(f"ended/{self.rank}", json.dumps([cause, detail]))

    def _check(self, stop: StopFlag) -> None:
        """`StopFlag.check` of all processes at once: each raises `Stopped`, or none."""
        with suppress(Stopped):
            stop.check()
        names = [None, *(number.name for number in STOP_SIGNALS)]
        asked = torch.tensor([names.index(stop.signal_name)])
        with self._translated_errors():
            distributed.all_reduce(asked, distributed.ReduceOp.MAX)
        # A signal that came after this process was counted waits for the next call.
        if int(asked):
            stop.signal_name = stop.signal_name or names[int(asked)]
            stop.check()

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
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
def open_process_group(process: ProcessInfo, pack: PackDir, stop: StopFlag) -> Iterator[SingleProcess]:
    """The processes of this job, connected.

    Messages go by gloo, GPU tensors by NCCL. If this ends by an error, it does not wait for the others.

    Raises:
        NothingToDo: the main process has nothing to do.
        LorapackError: the main process does not come.
        Stopped: this process was asked to stop while it waited.
    """
    if process.size == 1:
        yield SINGLE_PROCESS
        return
    port = 0 if process.rank == 0 else wait_for_rendezvous(pack, stop.check)
    store = TCPStore(HOST, port, process.size, is_master=process.rank == 0, timeout=SILENCE, wait_for_workers=False)
    if process.rank == 0:
        publish_rendezvous(pack, store.port)
    backend = "gloo"
    # The host's own name may resolve to an address that is not reachable.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if torch.cuda.is_available():
        torch.cuda.set_device(process.local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(
        backend, store=PrefixStore("group", store), rank=process.rank, world_size=process.size, timeout=SILENCE
    )
    yield ProcessGroup(process, store)
    distributed.destroy_process_group()
