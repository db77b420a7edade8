"""Which checkpoint a run resumes from: rank 0 looks for it and broadcasts the result."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdkit import collectives, world
from hvdkit.checkpoint import lock, store
from hvdkit.checkpoint.store import Checkpoint
from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)


def occupy(directory: Path) -> None:
    """Locks the directory for this job, and removes what an earlier one left unfinished in it. A collective call.

    Raises:
        UsageError: another job uses the directory; raised on all ranks.
    """
    mistake = None
    if world.rank() == 0:
        try:
            lock.take(directory)
            store.sweep(directory)
        except UsageError as error:
            mistake = str(error)
    if mistake := collectives.broadcast_object(mistake, name="checkpoint.directory"):
        raise UsageError(mistake)


def open_checkpoint(directory: Path, resume: str) -> Checkpoint | None:
    """Opens the checkpoint to resume from. A collective call.

    Only rank 0 reads, so other hosts need no access to its disk. The other ranks receive everything except variables.

    Args:
        directory: where this run's checkpoints are stored.
        resume: "auto" for the newest intact checkpoint in `directory`, if there is one; "never"; or the path of a
            checkpoint, or of a run that has some.

    Raises:
        UsageError: there is no intact checkpoint at the path; raised on all ranks.
    """
    found, mistake = None, None
    if world.rank() == 0:
        try:
            found = _find(directory, resume)
        except UsageError as error:
            mistake = str(error)
    small = {n: a for n, a in found.arrays.items() if not n.startswith(("variable/", "own/"))} if found else {}
    content = (mistake, str(found.path), found.state, small) if found else (mistake, "", None, {})
    mistake, path, state, small = collectives.broadcast_object(content, name="checkpoint")
    if mistake:
        raise UsageError(mistake)
    if state is None:
        return None
    return found or Checkpoint(Path(path), state, small)


def refuse_another_job(found: Checkpoint, job: Mapping[str, Any]) -> None:
    """Raises a `UsageError` if a checkpoint has another value than `job` for one of the names in it."""
    theirs = found.state["job"]
    differing = [name for name in job if name in theirs and theirs[name] != job[name]]
    if differing:
        there = ", ".join(f"{name} {theirs[name]}" for name in differing)
        here = ", ".join(f"{name} {job[name]}" for name in differing)
        raise UsageError(
            f"The checkpoint {found.path} is of another job: {there} there, and {here} here. Give this run a directory "
            f"of its own, or start from the beginning with resume='never'."
        )


def refuse_another_model(found: Checkpoint, difference: str | None) -> None:
    """Raises a `UsageError` if a checkpoint's variables are not the model's."""
    if difference:
        raise UsageError(
            f"The checkpoint {found.path} is of another model or optimizer: {difference}. Give this run a directory "
            f"of its own, start from the beginning with resume='never', or build the model that was saved."
        )


def _find(directory: Path, resume: str) -> Checkpoint | None:
    if resume == "never":
        return None
    return store.newest(directory) if resume == "auto" else store.find(Path(resume).expanduser())
