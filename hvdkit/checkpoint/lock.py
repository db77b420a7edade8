"""The lock of a checkpoint directory: two jobs in one directory would remove each other's files.

It is a POSIX record lock on a file in the directory. The kernel frees it when the process ends, however it ends, and it
also works on NFS. One process may take it several times, so a `fit` that ended with an exception is no obstacle.
"""

import contextlib
import fcntl
import logging
import os
import socket
from pathlib import Path

from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)

_NAME = ".lock"
_held: dict[Path, int] = {}  # descriptors: to close a second one of the same file would free the lock


def take(directory: Path) -> None:
    """Takes the lock of a directory, which is made if it is missing. Does nothing where files cannot be locked.

    In an elastic job, which may have lost the host that holds the lock, this only warns of another holder.

    Raises:
        UsageError: another process has the lock.
    """
    path = directory.resolve() / _NAME
    if path in _held:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:  # such as a full disk: what cannot be written is said when the first checkpoint is
        _log.debug("There is no lock of %s: %s", directory, error)
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(file)
        if isinstance(error, (BlockingIOError, PermissionError)):  # which of them depends on the system
            _refuse(directory, holder)
        return
    _held[path] = file
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)


def free(directory: Path) -> None:
    """Frees the lock of a directory, if this process has it."""
    file = _held.pop(directory.resolve() / _NAME, None)
    if file is not None:
        os.close(file)


def remove(directory: Path) -> None:
    """Frees the lock of a directory and removes its file, if this process has it and nobody else will look for it."""
    path = directory.resolve() / _NAME
    if path in _held:
        with contextlib.suppress(OSError):
            path.unlink()
        free(directory)


def _refuse(directory: Path, holder: str) -> None:
    text = f"Another job ({holder}) writes checkpoints in {directory}, and both would remove each other's."
    if os.environ.get("HVDKIT_ELASTIC"):
        _log.warning("%s This job goes on, because the holder may be its own rank on a host that was lost.", text)
        return
    raise UsageError(f"{text} Give each job a directory of its own, or wait until the other has ended.")
