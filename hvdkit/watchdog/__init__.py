"""A side channel between the ranks of a job, for what Horovod cannot say: who stands still, who failed first, and why.

Horovod's exchanges block: a rank that waits for another cannot speak through them. So each rank has a thread with a
connection of its own, on which the ranks (a) make one report when the job stands still, and (b) leave for a common
reason when one of them fails.

    watchdog.start(world)                                   after Horovod's start; nothing runs in a job of one rank
    with watchdog.waiting("metrics", "float32[3]"): ...     around an eager collective
    watchdog.in_phase("training"); watchdog.at_step(0, 17)  where this rank is
    watchdog.traced("gradients", [((3, 4), "float32", "dense/kernel")])   what an exchange in a graph sends
    watchdog.fail(error)                                    tells the others why this rank leaves
    watchdog.reason(5)                                      why another rank left
    watchdog.stop()

`HVDKIT_STALL_SECONDS` (600; 0 for no limit) is the time that a rank may be in one step or collective while no other
rank moves on either. A rank that is in neither may be busy where it cannot be seen to move, such as saving a model:
then the ranks that wait for it report after that time, and leave after three times as long.
`HVDKIT_STALL_ACTION=warn` reports and goes on waiting; by default the job ends, with exit code 75 on all ranks. 75 is
also that of ranks which leave because another died; when one fails with an exception, all take its exit code.
"""

import atexit
import logging
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from hvdkit import world as worlds
from hvdkit.errors import UsageError
from hvdkit.outcome import STALLED, USAGE
from hvdkit.watchdog.channel import listen, own_address
from hvdkit.watchdog.progress import Progress, Waiting
from hvdkit.watchdog.states import Failure, Job
from hvdkit.watchdog.watchman import Watchman
from hvdkit.world.introduction import introduce

__all__ = [
    "STALLED",
    "Failure",
    "at_step",
    "count_anew",
    "explain",
    "fail",
    "in_phase",
    "reason",
    "start",
    "stop",
    "traced",
    "waiting",
    "was_thrown_out",
]

_log = logging.getLogger(__name__)
_progress = Progress()
_watchman: Watchman | None = None
_hook: Any = None  # what sys.excepthook was before `start`


def start(world: worlds.World) -> None:
    """Starts this rank's watchdog; a collective call. Nothing runs in a world of one rank.

    The job's secret and the ranks' addresses travel through Horovod, so only its ranks know them.

    Args:
        world: as `world.init` returned it.
    """
    global _watchman, _hook
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
    _watchman = Watchman(world.rank, job, door, _progress)
    _watchman.start()
    _hook, sys.excepthook = sys.excepthook, _on_uncaught


def _open_door(world: worlds.World) -> tuple[socket.socket | None, str]:
    """Where the other ranks reach this one; or None, and why not: then all ranks must hear of it."""
    try:
        return listen(own_address(world)), ""
    except OSError as error:
        return None, str(error)


def stop() -> None:
    """Says goodbye to the other ranks and ends the watchdog; `start` may follow."""
    global _watchman, _hook
    if _watchman:
        _watchman.end(_pending())
        _watchman = None
    if _hook and sys.excepthook is _on_uncaught:
        sys.excepthook = _hook
    _hook = None


def waiting(name: str, detail: object = "", everyone: bool = False) -> Waiting:
    """A context for an eager collective: this rank waits for the others in it.

    Horovod matches what `collectives.wire` runs by its name. So ranks whose main threads are in different collectives
    that all ranks must enter wait for each other for ever, and Horovod only waits, too: the watchdog compares them.

    Args:
        name: the collective's name, the same on all ranks.
        detail: what this rank brings (shapes and dtypes); turned into text only for a report.
        everyone: all ranks must enter it. Where two stay in different ones, the job ends, within seconds; calls that
            have returned, whatever their order, and those of other threads than the main one are left alone.
    """
    return Waiting(_progress, name, detail, everyone)


def count_anew() -> None:
    """Forgets how often collectives were called: all ranks have returned from a join, before which some called less."""
    _progress.calls.clear()


def at_step(epoch: int, step: int) -> None:
    """Marks the begin of a step. In the phase "evaluating" only that it moves on: the training's step stays.

    Args:
        epoch: number of the epoch, from 0.
        step: number of the step in the epoch, from 0.
    """
    if _progress.phase != "evaluating":
        _progress.epoch = epoch
        _progress.step = step
    _progress.marks += 1


def in_phase(phase: str) -> None:
    """Says what this rank does from now on; the others hear of it at once.

    Args:
        phase: "training" or "evaluating", which may not last longer than the limit without a step, or "between",
            which may.
    """
    if phase != _progress.phase:
        _progress.phase = phase
        _progress.marks += 1
        if _watchman:
            _watchman.tell_phase()


def traced(name: str, signature: Sequence[tuple[Any, Any, str]]) -> None:
    """Notes what an exchange in a graph sends, when it is traced; ranks that differ end the job at once.

    The n-th different signature of a name is compared with the others' n-th: a rank may trace one more often. Horovod
    refuses tensors of different shape only outside of a group: `grouped_allreduce` returns uninitialised memory.

    Args:
        name: of the exchange, the same on all ranks.
        signature: (shape, dtype, variable path) of each tensor, in order. A dimension that may differ from rank to
            rank is None; so is a shape of unknown rank.
    """
    number = _progress.sign(name, signature)
    if number is not None and _watchman:
        _watchman.tell_signature(name, number)


def fail(error: BaseException, code: int | None = None, wait_seconds: float = 2.0) -> Failure | None:
    """Tells the other ranks that this one leaves, and why; they leave with the same exit code.

    Args:
        error: what this rank leaves with.
        code: its exit code; by default that which Python, or a job's main, gives to the error.
        wait_seconds: how long to wait until the others know.

    Returns:
        The reason that all ranks leave for: another rank's, if that failed first. None in a job of one rank, or if
        nobody answered in time.
    """
    if not _watchman:
        return None
    text = f"{type(error).__name__}: {error}".strip()
    where = "" if _progress.step is None or _progress.phase == "between" else f" {_place()}"
    failure = Failure(
        _watchman.rank, _watchman.host, "error", f"failed{where}: {text[:2000]}", _code(error) if code is None else code
    )
    _watchman.tell_failure(failure)
    _watchman.known.wait(wait_seconds)
    return _watchman.failure


def reason(wait_seconds: float = 5.0) -> Failure | None:
    """Why this rank was thrown out of an exchange: what another rank reported, or which one died or left.

    The reason has been shown already, once for the whole job, when this returns.

    Args:
        wait_seconds: how long to wait for it.

    Returns:
        None if no rank is known to have failed.
    """
    if not _watchman:
        return None
    if not _watchman.failure:
        _watchman.tell_thrown_out()
        _watchman.known.wait(wait_seconds)
    return _watchman.failure


def explain(error: BaseException, wait_seconds: float = 6.0) -> str | None:
    """Turns Horovod's "Mismatched ..." into a sentence that names the ranks, the tensor and both shapes.

    Args:
        error: as an exchange raised it, on all ranks.
        wait_seconds: how long to wait for the other ranks' answers.

    Returns:
        None if the error is of another kind, or the exchange was announced neither by `waiting` nor by `traced`.
    """
    if not _watchman or "Mismatched " not in str(error):
        return None
    ending = _watchman.ending
    if not ending.explanation:
        ending.explained.clear()
        _watchman.ask_to_explain()
        ending.explained.wait(wait_seconds)
    text, ending.explanation = ending.explanation, None
    return text


def was_thrown_out(error: BaseException) -> bool:
    """Whether an error only says that an exchange broke off, so that its cause must be sought on another rank."""
    if type(error).__name__ == "HorovodInternalError":
        return True
    text = str(error)
    return type(error).__name__ in ("UnknownError", "InternalError", "CancelledError", "AbortedError") and any(
        sign in text for sign in ("Horovod", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    )


def _on_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's last word on an exception: shown, after the others know; or, if it is a consequence, passed over."""
    show = _hook or sys.__excepthook__
    if not isinstance(error, Exception):
        show(kind, error, trace)
        return
    failure = reason() if was_thrown_out(error) else None
    text = explain(error)
    if text and _watchman:
        _watchman.tell_failure(Failure(None, None, "mismatch", text, 1))
        _watchman.known.wait(2)
        failure = _watchman.failure
    if failure:
        sys.exit(failure.code)
    fail(error)
    show(kind, error, trace)


def _pending() -> str:
    """The exception in whose `finally` this rank shuts down, if any: told in the goodbye, in case somebody asks why."""
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
    """Before Horovod's own end, which may hang if another rank has failed: then the thread lives on, to end it."""
    if _watchman and not _watchman.failure:
        stop()


def _in_child() -> None:
    """A forked child is no rank: it must not hold its parent's connections open, nor speak for it."""
    global _watchman
    if _watchman:
        _watchman.forget()
        _watchman = None


os.register_at_fork(after_in_child=_in_child)
