"""A run in the hands of a process that does not lead: it counts along with the leader's session and writes nothing."""

from __future__ import annotations

from train.checkpoint import Checkpoint
from train.packed_lora import AdapterTensors
from train.session import RunSession
from train.storage import Record


class Follower(RunSession):
    """`RunSession` without its files. What it would read there comes from the leader (`train.parallel`)."""

    def begin(self, header: Record) -> None:
        """Nothing to count."""

    def rewind(self, checkpoint: Checkpoint) -> None:
        """Count from where the leader's checkpoint stands."""
        self.take_up(checkpoint.progress)

    def note(self, lines: list[Record]) -> None:
        """The leader writes the journal."""

    def note_pace(self, line: Record) -> None:
        """The leader writes the pace."""

    def written_bytes(self) -> tuple[int, int]:
        """Numbers for checkpoints that are never saved."""
        return 0, 0

    def save(self, state: Checkpoint) -> None:  # noqa: ARG002
        """The leader saves."""
        self.saved_step = self.step

    def complete(self, adapter: AdapterTensors, facts: Record) -> None:
        """The leader writes adapter and result."""

    def end_diverged(self) -> None:
        """The leader ends the run."""

    def end(self, cause: str, detail: str | None) -> None:
        """The leader ends the run."""
