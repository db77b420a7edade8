"""A side channel between the ranks of a job. It reports which rank stalls or failed first, and why.

Horovod's collectives block, so a rank that waits in one cannot report through Horovod. Each rank therefore runs a
watchdog thread with its own TCP connection. Over it, the ranks (a) write one joint report when the job stalls, and
(b) exit with the same reason and exit code when one of them fails.

    watchdog.start(world)                                   after Horovod's start; nothing runs in a job of one rank
    with watchdog.waiting("metrics", "float32[3]"): ...     around an eager collective
    watchdog.in_phase("training"); watchdog.at_step(0, 17)  where this rank is
    watchdog.traced("gradients", [((3, 4), "float32", "dense/kernel")])   what a collective in a graph sends
    watchdog.fail(error)                                    tells the other ranks why this rank exits
    watchdog.reason(5)                                      why another rank exited
    watchdog.tell_to_leave()                                all ranks agree on when to leave the training
    watchdog.when_the_job_fails(call)                       cleans up before this process is ended
    watchdog.stop()

`HVDKIT_STALL_SECONDS` (600; 0 for no limit) is how long a rank may stay in one step or collective while no other rank
makes progress. A rank outside of both may be busy without visible progress, for example when it saves a model. Then
the waiting ranks report after that time, and exit after three times as long.
`HVDKIT_STALL_ACTION=warn` reports the stall and keeps waiting. By default the job ends, with exit code 75 on all ranks.
Ranks also exit with 75 when another rank dies. When a rank fails with an exception, all ranks use its exit code.
"""

import atexit
import contextlib
import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from hvdkit import world as worlds
from hvdkit.errors import UsageError
from hvdkit.outcome import STALLED, USAGE
from hvdkit.watchdog.channel import listen, own_address
from hvdkit.watchdog.progress import Progress, Waiting
from hvdkit.watchdog.states import Failure, Job
from hvdkit.watchdog.thread import WatchdogThread
from hvdkit.world.introduction import introduce

__all__ = [
    "STALLED",
    "Failure",
    "at_step",
    "count_anew",
    "explain",
    "fail",
    "forget_leaving",
    "in_phase",
    "is_there",
    "is_time_to_leave",
    "reason",
    "start",
    "stop",
    "tell_to_leave",
    "traced",
    "waiting",
    "was_thrown_out",
    "when_the_job_fails",
]

_log = logging.getLogger(__name__)
_progress = Progress()
_thread: WatchdogThread | None = None
_last_calls: list[Callable[[], None]] = []
_hook: Any = None  # what sys.excepthook was before `start`


def start(world: worlds.World) -> None:
    """Starts this rank's watchdog. A collective call. Does nothing in a world of one rank.

    The job's secret and the ranks' addresses are sent through Horovod, so only the job's ranks know them.

    Args:
        world: the return value of `world.init`.
    """
    global _thread, _hook
    stop()
    if world.size == 1:
        return
    _progress.begin()
    door, why = _open_door(world)
    mine = {"host": world.host, "door": door and door.getsockname()[:2], "token": secrets.token_hex(32), "why": why}
    everyone = introduce(mine, "watchdog")
    shut = next((rank for rank in everyone if rank["door"] is None), None)
    if door is None or shut:
        if door:
            door.close()
        if world.rank == 0 and shut:
            _log.warning("There is no watchdog: host %s could not open a port for it: %s", shut["host"], shut["why"])
        return
    job = Job(
        token=bytes.fromhex(everyone[0]["token"]),
        hosts=[rank["host"] for rank in everyone],
        doors=[(rank["door"][0], rank["door"][1]) for rank in everyone],
        limit=worlds.stall_limit(),
        aborts=worlds.stall_aborts(),
        elastic=os.environ.get("HOROVOD_ELASTIC") == "1",
    )
    _thread = WatchdogThread(world.rank, job, door, _progress, _end_process)
    _thread.start()
    _hook, sys.excepthook = sys.excepthook, _on_uncaught


def _open_door(world: worlds.World) -> tuple[socket.socket | None, str]:
    """Opens the port on which other ranks reach this one. On failure returns None and the reason, for all ranks."""
    try:
        return listen(own_address(world)), ""
    except OSError as error:
        return None, str(error)


def stop() -> None:
    """Tells the other ranks that this one exits, and ends the watchdog. `start` may be called again."""
    global _thread, _hook
    if _thread:
        _thread.end(_pending())
        _thread = None
    _last_calls.clear()
    if _hook and sys.excepthook is _on_uncaught:
        sys.excepthook = _hook
    _hook = None


def is_there() -> bool:
    """Returns whether this rank has a watchdog: all ranks of a job have one, or none."""
    return _thread is not None


def tell_to_leave() -> None:
    """Tells all ranks that this one was told to leave the training. They agree on when: see `is_time_to_leave`."""
    if _thread:
        _thread.tell_to_leave()


def is_time_to_leave(done: int) -> bool:
    """Returns whether all ranks leave the training now, after the same execution. Call it after each.

    Args:
        done: number of executions of this `fit` that this rank has done.
    """
    return _progress.meeting.is_now(done)


def forget_leaving() -> None:
    """Forgets what was agreed about leaving, when a training has ended."""
    _progress.meeting.clear()


def when_the_job_fails(call: Callable[[], None]) -> None:
    """Has a function called before this process ends because the job has failed; until `stop`."""
    _last_calls.append(call)


def waiting(name: str, detail: object = "", everyone: bool = False) -> Waiting:
    """A context manager around an eager collective, in which this rank waits for the others.

    Horovod matches the collectives of `collectives.wire` by name. Ranks whose main threads wait in different
    collectives would therefore deadlock without an error. The watchdog compares the collectives and detects this.

    Args:
        name: the collective's name, the same on all ranks.
        detail: shapes and dtypes of this rank's tensors; converted to text only for a report.
        everyone: whether all ranks must enter it. If two ranks stay in different such collectives, the job ends within
            seconds. Calls that have returned, and calls in other threads than the main one, are not compared.
    """
    return Waiting(_progress, name, detail, everyone)


def count_anew() -> None:
    """Resets the call counts of collectives, after a join: before it, some ranks have made fewer calls."""
    _progress.calls.clear()


def at_step(epoch: int, step: int) -> None:
    """Marks the start of a step. In the phase "evaluating" it marks progress and keeps the step of the training.

    Args:
        epoch: number of the epoch, from 0.
        step: number of the step in the epoch, from 0.
    """
    if _progress.phase != "evaluating":
        _progress.epoch = epoch
        _progress.step = step
    _progress.marks += 1


def in_phase(phase: str) -> None:
    """Sets what this rank does from now on, and tells the other ranks at once.

    Args:
        phase: "training" or "evaluating", in which the stall limit applies to each step; or "between", in which it
            does not.
    """
    if phase != _progress.phase:
        _progress.phase = phase
        _progress.marks += 1
        if _thread:
            _thread.tell_phase()


def traced(name: str, signature: Sequence[tuple[Any, Any, str]]) -> None:
    """Records what a collective in a graph sends, when it is traced. Ends the job at once if ranks differ.

    The n-th distinct signature of a name is compared with the n-th of the other ranks: a rank may trace one more
    often. The check is needed because Horovod rejects different shapes only outside of a group:
    `grouped_allreduce` returns uninitialized memory.

    Args:
        name: the collective's name, the same on all ranks.
        signature: (shape, dtype, variable path) of each tensor, in order. A dimension that may differ between ranks is
            None; so is a shape of unknown rank, and the dtype of a variable for which this rank sends nothing.
    """
    number = _progress.sign(name, signature)
    if number is not None and _thread:
        _thread.tell_signature(name, number)


def fail(error: BaseException, code: int | None = None, wait_seconds: float = 2.0) -> Failure | None:
    """Tells the other ranks that this one exits, and why. They exit with the same code.

    Args:
        error: the exception that ends this rank.
        code: the exit code; by default the one that Python, or a job's `main`, uses for the error.
        wait_seconds: how long to wait until the other ranks know.

    Returns:
        The failure for which all ranks exit: another rank's, if that failed first. None in a job of one rank, or if no
        rank answered in time.
    """
    if not _thread:
        return None
    text = f"{type(error).__name__}: {error}".strip()
    where = "" if _progress.step is None or _progress.phase == "between" else f" {_place()}"
    failure = Failure(
        _thread.rank, _thread.host, "error", f"failed{where}: {text[:2000]}", _code(error) if code is None else code
    )
    _thread.tell_failure(failure)
    _thread.known.wait(wait_seconds)
    return _thread.failure


def reason(wait_seconds: float = 5.0) -> Failure | None:
    """Returns why a collective failed on this rank: another rank's error, or which rank died or exited.

    When this returns, the reason has already been shown, once for the whole job.

    Args:
        wait_seconds: how long to wait for it.

    Returns:
        None if no rank is known to have failed.
    """
    if not _thread:
        return None
    if not _thread.failure:
        _thread.tell_thrown_out()
        _thread.known.wait(wait_seconds)
    return _thread.failure


def explain(error: BaseException, wait_seconds: float = 6.0) -> str | None:
    """Converts Horovod's "Mismatched ..." error to a sentence that names the ranks, the tensor and both shapes.

    Args:
        error: the error that a collective raised, on all ranks.
        wait_seconds: how long to wait for the other ranks' answers.

    Returns:
        None for another kind of error, or if the collective was registered neither by `waiting` nor by `traced`.
    """
    if not _thread or "Mismatched " not in str(error):
        return None
    ending = _thread.ending
    if not ending.explanation:
        ending.explained.clear()
        _thread.ask_to_explain()
        ending.explained.wait(wait_seconds)
    text, ending.explanation = ending.explanation, None
    return text


def was_thrown_out(error: BaseException) -> bool:
    """Whether an error only says that a collective was interrupted, so that the cause is on another rank."""
    if type(error).__name__ == "HorovodInternalError":
        return True
    text = str(error)
    return type(error).__name__ in ("UnknownError", "InternalError", "CancelledError", "AbortedError") and any(
        sign in text for sign in ("Horovod", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    )


def _on_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An exception hook: tells the other ranks, then shows the error. Hides an error that another rank caused."""
    show = _hook or sys.__excepthook__
    if not isinstance(error, Exception):
        show(kind, error, trace)
        return
    failure = reason() if was_thrown_out(error) else None
    text = explain(error)
    if text and _thread:
        _thread.tell_failure(Failure(None, None, "mismatch", text, 1))
        _thread.known.wait(2)
        failure = _thread.failure
    if failure:
        sys.exit(failure.code)
    fail(error)
    show(kind, error, trace)


def _pending() -> str:
    """The exception in whose `finally` this rank shuts down, if any; the goodbye message includes it."""
    error = sys.exc_info()[1]
    return (
        "" if not isinstance(error, Exception) or was_thrown_out(error) else f"{type(error).__name__}: {error}"[:2000]
    )


def _code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return USAGE if isinstance(error, UsageError) else 1


def _place() -> str:
    return f"in step {(_progress.step or 0) + 1} of epoch {(_progress.epoch or 0) + 1}"


@atexit.register
def _at_exit() -> None:
    """Stops the watchdog, unless a rank has failed: then Horovod's shutdown may hang, and the watchdog ends it."""
    if _thread and _thread.failure:
        _call_last()
    elif _thread:
        stop()


def _end_process(code: int) -> None:
    _call_last()
    os._exit(code)


def _call_last() -> None:
    for call in _last_calls.copy():
        with contextlib.suppress(Exception):  # the process must end
            call()


def _in_child() -> None:
    """Closes the watchdog in a forked child, which is not a rank and must not use its parent's connections."""
    global _thread
    if _thread:
        _thread.forget()
        _thread = None


os.register_at_fork(after_in_child=_in_child)
