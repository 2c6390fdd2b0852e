"""A job's log: bare messages, each at once, and no error of the log ends the job."""

import logging
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest

from train.log import LOGGER, log_to

log = logging.getLogger(f"{LOGGER}.trainer")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Handlers that a test sets up would write into its captured output for the rest of the session."""
    logger = logging.getLogger(LOGGER)
    before = logger.handlers, logger.level
    yield
    logger.handlers, logger.level = before


def test_messages_are_written_as_they_are() -> None:
    stream = StringIO()
    log_to(stream)
    log.debug("not this")
    log.info("100 % of it")
    log.error("ended: storage")
    assert stream.getvalue() == "100 % of it\nended: storage\n"


def test_a_second_set_up_takes_the_place_of_the_first() -> None:
    first, second = StringIO(), StringIO()
    log_to(first)
    log_to(second, logging.WARNING)
    log.info("quiet")
    log.warning("once")
    assert (first.getvalue(), second.getvalue()) == ("", "once\n")


def test_a_log_whose_disk_is_full_ends_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Path("/dev/full").open("w") as stream:
        log_to(stream)
        log.info("lost")
        stream.buffer.raw.close()
        log.info("lost too")
    assert capfd.readouterr() == ("", "")
