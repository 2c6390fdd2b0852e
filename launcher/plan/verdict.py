"""What to do with a run, judged by its folder alone."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.records import Verdict
from train.lease import read_lease
from train.rundir import Record, RunDir, read_json, read_lines

# Ends that the same run would come to again; after all others it simply goes on.
HOPELESS = {"diverged", "bad_input", "out_of_memory", "crash"}
USER_STOPS = {"SIGINT", "cancelled"}  # details and causes that say that somebody wanted the run to stop


@dataclass(frozen=True)
class Judgement:
    """A verdict, why, and after which optimizer step the run would go on."""

    verdict: Verdict
    reason: str
    step: int = 0


def judge(run: RunDir | None, *, retry_failed: bool) -> Judgement:
    """The verdict on a run with this folder, None for one that has no folder yet."""
    if run is None:
        return Judgement(Verdict.NEW, "never trained")
    result = read_json(run.result)
    if result is not None:
        return Judgement(Verdict.DONE, _done_reason(result))
    lease = read_lease(run)
    if lease is not None and lease.alive():
        return Judgement(Verdict.RUNNING, f"process {lease.pid} on {lease.host} trains it (attempt {lease.attempt})")
    attempts = read_lines(run.attempts)
    failure = _failure(attempts)
    if failure is None:
        return _unfinished(run, attempts)
    if retry_failed:
        again = _unfinished(run, attempts)
        return Judgement(again.verdict, f"tried again: {failure}", again.step)
    return Judgement(Verdict.FAILED, f"{failure}; 'python -m launcher resume' tries it again")


def _done_reason(result: Record) -> str:
    loss = result.get("eval_loss")
    return f"finished {result['steps']} steps" + ("" if loss is None else f", eval loss {loss:.4f}")


def _failure(attempts: list[Record]) -> str | None:
    """Why another attempt would end like the ones before, None if it would not."""
    if not attempts:
        return None
    last = attempts[-1]
    if last["cause"] in HOPELESS:
        detail = f": {last['detail']}" if last["detail"] else ""
        return f"ended with {last['cause']} at step {last['last_step']}{detail}"
    stuck = [line for line in attempts[-2:] if not USER_STOPS & {line["cause"], line["detail"]}]
    if len(stuck) == 2 and stuck[0]["last_step"] == stuck[1]["last_step"]:
        return f"two attempts in a row ended at step {last['last_step']}, the last by {last['cause']}"
    return None


def _unfinished(run: RunDir, attempts: list[Record]) -> Judgement:
    """Go on from the newest checkpoint, or start."""
    steps = run.checkpoint_steps()
    if steps and steps[-1] > 0:
        return Judgement(Verdict.RESUMABLE, f"from step {steps[-1]}{_after(attempts)}", steps[-1])
    return Judgement(Verdict.NEW, f"nothing saved yet{_after(attempts)}")


def _after(attempts: list[Record]) -> str:
    return f", after {attempts[-1]['cause']}" if attempts else ""
