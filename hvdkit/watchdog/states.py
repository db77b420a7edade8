"""The data of the watchdog: the job, each rank's state, and the failure that ends the job."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from hvdkit.watchdog.progress import BUSY, Signature


@dataclasses.dataclass(frozen=True)
class Job:
    """What all watchdogs of a job have in common.

    Attributes:
        token: the secret with which every connection authenticates.
        hosts: the ranks' host names.
        doors: the addresses and ports on which the ranks listen.
        limit: seconds without progress after which a rank stalls; 0 for no limit.
        aborts: whether a stall ends the job.
        elastic: whether the job continues without a lost rank.
    """

    token: bytes
    hosts: Sequence[str]
    doors: Sequence[tuple[str, int]]
    limit: float
    aborts: bool
    elastic: bool


@dataclasses.dataclass(frozen=True)
class RankState:
    """The state of one rank, as it reported it, or as far as it is known.

    Attributes:
        rank: its number.
        host: its host's name.
        status: "living", "dead" (its connection broke), "frozen" (it does not respond), or "left" (it exited with a
            goodbye).
        phase: "between", "interrupted" (out of `fit` by an exception), or one of `progress.BUSY`.
        epoch: number of its epoch from 0.
        step: number of its step in the epoch from 0.
        collective: name of the collective that it is in.
        detail: shapes and dtypes of its tensors there.
        last: name of the last collective that it finished.
        last_detail: shapes and dtypes that it brought there.
        still: seconds since it last moved on.
        line: the innermost of the user's own lines in its main thread.
        reading: the line of Python code that feeds its data set now.
        stack: its main thread's stack, as `stacks.readable` gives it.
        threads: the stacks of other threads that run the user's code, by name.
        traced: signatures of its exchanges, by name.
        inside: name of the collective for all ranks that its main thread is in.
        calls: how often it has entered the collectives for all ranks that some rank is in, by name.
    """

    rank: int
    host: str
    status: str = "living"
    phase: str = "between"
    epoch: int | None = None
    step: int | None = None
    collective: str | None = None
    detail: str = ""
    last: str | None = None
    last_detail: str = ""
    still: float = 0.0
    line: str | None = None
    reading: str | None = None
    stack: list[str] = dataclasses.field(default_factory=list)
    threads: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    traced: dict[str, list[Signature]] = dataclasses.field(default_factory=dict)
    inside: str | None = None
    calls: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def in_step(self) -> bool:
        """Whether it is inside a compiled step, where Python cannot see in which collective it waits."""
        return self.phase in BUSY and self.collective is None

    @property
    def busy(self) -> bool:
        """Whether it may wait for the other ranks, or they for it."""
        return self.phase in BUSY or self.collective is not None

    @property
    def place(self) -> str:
        """`step 3 of epoch 1`, counted from 1 as Keras shows epochs."""
        if self.step is None or self.epoch is None:
            return "no step yet"
        return f"step {self.step + 1} of epoch {self.epoch + 1}"


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why the job ends; the same on all ranks.

    Attributes:
        rank: the rank that failed; None if it is not the fault of one rank.
        host: its host's name.
        kind: "error" (an exception), "death", "left", "stall" or "mismatch".
        message: what happened, as a sentence without the rank.
        code: exit code of all ranks.
    """

    rank: int | None
    host: str | None
    kind: str
    message: str
    code: int

    def __str__(self) -> str:
        who = "" if self.rank is None else f"rank {self.rank} on host {self.host} "
        return f"{who}{self.message}"


def from_message(fields: dict[str, Any], **changes: Any) -> RankState:
    """Builds a state from a message. Unknown fields, from another version of hvdkit, are ignored."""
    known = {field.name for field in dataclasses.fields(RankState)}
    return RankState(**{k: v for k, v in fields.items() if k in known} | changes)
