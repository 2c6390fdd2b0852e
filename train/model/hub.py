"""Whether the Hugging Face hub can be reached from here, checked once and with a deadline.

Its own clients retry every file for half a minute and print so each time, and compute nodes often have no network at all.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_session

PROBE_SECONDS = 8.0


def hub_unreachable(seconds: float = PROBE_SECONDS) -> str | None:
    """Why the hub cannot be used from here, None if it gives any answer within `seconds`.

    None too where HF_HUB_OFFLINE is set: the clients handle that themselves.
    """
    if constants.is_offline_mode():
        return None
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    # In a thread, since looking up a host's name ignores time-outs.
    threading.Thread(target=lambda: answers.put(_ask(seconds)), daemon=True).start()
    try:
        reason = answers.get(timeout=seconds + 0.5)
    except queue.Empty:
        reason = f"no answer within {seconds:g} s"
    return None if reason is None else f"{constants.ENDPOINT} cannot be reached from this machine: {reason}"


@contextmanager
def offline() -> Iterator[None]:
    """Make the hub's clients use the user's own cache (HF_HOME) alone, without any request."""
    import datasets

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _ask(seconds: float) -> str | None:
    """One request by the client's own session, which knows proxies and certificates; any answer counts."""
    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    # Any exception: the client's HTTP library, and so its exceptions, change from version to version.
    except Exception as exc:
        return first_line(exc)
    return None


def first_line(exc: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
