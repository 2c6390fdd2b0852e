"""The table of causes: complete, and the same in the code and in docs/cluster.md."""

from pathlib import Path

import pytest

import train
from launcher.records import State
from launcher.track.run_state import STATE_AFTER
from train.mirror.request import SHOWN_AFTER
from train.store.causes import CONSEQUENCES, NON_RETRYABLE, TERMINAL, Cause, Consequence, Next

DOCS = Path(train.__file__).parent.parent / "docs" / "cluster.md"


def documented(heading: str) -> dict[str, tuple[str, ...]]:
    """The rows of the first table below a heading, by the word in their first column."""
    lines = DOCS.read_text().partition(f"## {heading}\n")[2].splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| ---")) + 1
    rows = {}
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        word, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[word.strip("`")] = tuple(cells)
    return rows


def cells(consequence: Consequence) -> tuple[str, str]:
    advice = f": {consequence.advice}" if consequence.advice else ""
    return consequence.meaning, f"{consequence.next}{advice}"


def test_the_documented_causes_are_those_of_the_code() -> None:
    assert documented("Causes") == {cause.value: cells(CONSEQUENCES[cause]) for cause in Cause}


def test_every_state_is_documented() -> None:
    assert set(documented("States")) == {state.value for state in State}


def test_every_cause_leads_somewhere() -> None:
    assert set(CONSEQUENCES) == set(Cause)
    assert set(STATE_AFTER) == set(SHOWN_AFTER) == set(Next)


@pytest.mark.parametrize("cause", Cause)
def test_what_is_given_up_is_never_taken_up_again_by_its_job(cause: Cause) -> None:
    assert (cause in NON_RETRYABLE) == (CONSEQUENCES[cause].next is Next.GIVE_UP)
    assert NON_RETRYABLE < TERMINAL
    assert {Cause.CANCELLED} == TERMINAL - NON_RETRYABLE
