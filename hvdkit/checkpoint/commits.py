"""Commits of an elastic script, saved on disk for the job's next start.

Horovod's elastic launcher keeps the surviving processes and their memory. hvdkit's launcher restarts all ranks.
Therefore a thread writes what rank 0 has committed to disk while training continues, like a checkpoint.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdkit.checkpoint import lock, store
from hvdkit.checkpoint.background import Writer
from hvdkit.checkpoint.plain import NotPlain, pack, unpack
from hvdkit.errors import UsageError

_KEPT = 2  # the newest, and the one before in case the newest is damaged


class Commits:
    """The commits of one job, which rank 0 alone reads and writes.

    Args:
        folder: where they are stored; on a disk that all hosts share, if rank 0 may move to another host.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer = Writer()
        self._number = 0
        lock.take(folder)
        store.sweep(folder)

    def newest(self, values: Sequence[np.ndarray]) -> tuple[list[np.ndarray], dict[str, Any]] | None:
        """The values and attributes of the newest intact commit; None if there is none.

        Args:
            values: the current values, which must have the same shapes.

        Raises:
            UsageError: the commit is of another model.
        """
        found = store.newest(self.folder)
        if found is None:
            return None
        self._number = found.state["step"]
        kept = [found.arrays[f"value/{number}"] for number in range(found.state["values"])]
        shapes, theirs = [v.shape for v in values], [v.shape for v in kept]
        if shapes != theirs:
            raise UsageError(
                f"{found.path} is a commit of another model: its {len(theirs)} variables have the shapes "
                f"{theirs!s:.80}..., and this one's {len(shapes)} have {shapes!s:.80}... Give the launcher another "
                f"--workdir."
            )
        return kept, unpack(found.state["attributes"], found.arrays)

    def keep(self, values: Sequence[np.ndarray], attributes: Mapping[str, Any], *, may_drop: bool) -> None:
        """Writes a commit in the background.

        Args:
            values: arrays that the caller no longer changes.
            attributes: numbers, strings, arrays, and lists, tuples and dicts of these.
            may_drop: skip this commit if the previous one is still being written.

        Raises:
            UsageError: an attribute is of another type.
        """
        if may_drop and self._writer.busy:
            return
        self._number += 1
        number, arrays = self._number, {f"value/{number}": value for number, value in enumerate(values)}
        try:
            packed = pack(dict(attributes), arrays, "attribute")
        except NotPlain as error:
            raise UsageError(
                f"An attribute of the elastic state holds a value of type {error}, which is not kept on disk without "
                f"pickle. Give KerasState numbers, texts, arrays, and lists, tuples and dicts of these."
            ) from None
        state = {"step": number, "values": len(values), "attributes": packed}
        self._writer.start(number, lambda: self._write(number, state, arrays))

    def wait(self) -> str:
        """Waits until nothing is being written. Returns why the last commit failed, or an empty string."""
        self._writer.wait()
        return str(self._writer.error or "")

    def close(self) -> None:
        """Waits until nothing is being written, and lets other jobs use the folder."""
        self._writer.wait()
        lock.free(self.folder)

    def forget(self) -> None:
        """Removes all commits, after the job has succeeded: the next one starts from the beginning."""
        self._writer.wait()
        for path in store.folders(self.folder):
            store.remove(path)
        lock.remove(self.folder)

    def _write(self, number: int, state: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
        path = store.write(self.folder, number, state, arrays, {})
        store.retain(self.folder, keep=_KEPT, best=0, monitor="", mode="min")
        return path
