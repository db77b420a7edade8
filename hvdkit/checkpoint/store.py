"""Checkpoints on disk: one folder each, published atomically.

    checkpoints/000007-step-1200/      number of the checkpoint, steps trained
        arrays.npz                     weights, slots, metrics, ...
        state.json                     everything else
        manifest.json                  size and SHA-256 of both, and of itself

A folder is written under a name that readers ignore, flushed to disk (fsync), and renamed. A kill at any instant leaves
older checkpoints unchanged. A reader uses a folder only if all checksums match. Nothing is ever unpickled.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)

FORMAT = 1
_NAME = re.compile(r"(\d{6,})-step-(\d+)")
_UNREADABLE = ".partial-", ".removed-"  # prefixes of folders that readers ignore
_BLOCK = 8 << 20  # bytes hashed at once


class Damaged(Exception):  # noqa: N818 - says what it is
    """A checkpoint's content differs from what was written; the message says where."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint's folder: `state` is plain JSON, `arrays` are NumPy arrays by name."""

    path: Path
    state: dict[str, Any]
    arrays: dict[str, np.ndarray]


def folders(directory: Path) -> list[Path]:
    """The published checkpoints of a directory, oldest first. Does not check whether they are intact."""
    if not directory.is_dir():
        return []
    found = [(match, path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found)]


def write(
    directory: Path,
    step: int,
    state: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    metrics: Mapping[str, float],
) -> Path:
    """Writes a checkpoint, reads it back, and publishes it.

    Args:
        directory: where checkpoints are stored; created if missing.
        step: steps trained, for the name.
        state: plain JSON.
        arrays: arrays by name, of any dtype except object.
        metrics: metrics by which the best checkpoints are kept.

    Returns:
        The new folder.

    Raises:
        OSError: writing failed, for example on a full disk. Nothing is left, and older checkpoints are unchanged.
        Damaged: the data read back differs from the data written. The folder is removed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    there = folders(directory)
    number = 1 + (_number(there[-1]) if there else 0)
    path = directory / f"{number:06d}-step-{step}"
    aside = directory / f"{_UNREADABLE[0]}{path.name}-{os.getpid()}"
    try:
        aside.mkdir()
        with (aside / "arrays.npz").open("wb") as file:
            storable: dict[str, Any] = {name: _storable(array) for name, array in arrays.items()}
            np.savez(file, **storable)
            _force(file)
        _read_back(aside / "arrays.npz")
        dtypes = {name: array.dtype.name for name, array in arrays.items()}
        _write_json(aside / "state.json", {**state, "dtypes": dtypes})
        files = {name: _describe(aside / name) for name in ("arrays.npz", "state.json")}
        manifest = {"format": FORMAT, "step": step, "metrics": dict(metrics), "files": files}
        _write_json(aside / "manifest.json", {**manifest, "sha256": _hash_json(manifest)})
        _force_directory(aside)
        aside.rename(path)
        _force_directory(directory)
        return path
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint after checking its checksums.

    Raises:
        Damaged: a checksum does not match, or something is missing.
    """
    manifest = check(path)
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        with np.load(path / "arrays.npz", allow_pickle=False) as stored:
            arrays = {name: _restored(stored[name], state["dtypes"][name]) for name in stored.files}
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error
    if state.get("step") != manifest["step"]:
        raise Damaged("its manifest is of another step")
    return Checkpoint(path, state, arrays)


def check(path: Path) -> dict[str, Any]:
    """Compares a checkpoint's files with its manifest, and returns the manifest.

    Raises:
        Damaged: they differ, or something is missing.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        promised = manifest.pop("sha256")
        if promised != _hash_json(manifest):
            raise Damaged("manifest.json is not as it was written")
        if manifest["format"] != FORMAT:
            raise Damaged(f"it has format {manifest['format']}, and this hvdkit reads {FORMAT}")
        for name, description in manifest["files"].items():
            if _describe(path / name) != description:
                raise Damaged(f"{name} is not as it was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error
    return manifest


def newest(directory: Path) -> Checkpoint | None:
    """The newest intact checkpoint of a directory; damaged ones are skipped with a warning."""
    for path in reversed(folders(directory)):
        try:
            return read(path)
        except Damaged as error:
            _log.warning("The checkpoint %s is damaged (%s): an older one is used.", path, error)
    return None


def find(where: Path) -> Checkpoint:
    """The checkpoint at a path that a user gave: its folder, a directory of several, or a run's workdir.

    Raises:
        UsageError: there is none, or the one given is damaged.
    """
    if (where / "manifest.json").is_file():
        try:
            return read(where)
        except Damaged as error:
            raise UsageError(
                f"The checkpoint {where} is damaged ({error}). Give another, or its parent {where.parent}: then the "
                f"newest intact one is used."
            ) from None
    for directory in (where, where / "checkpoints"):
        found = newest(directory)
        if found:
            return found
    there = f"{where} is there, but has" if where.exists() else f"{where} is not there, so there is"
    raise UsageError(f"{there} no intact checkpoint. Give the folder of one, or of a run that wrote some.")


def retain(directory: Path, keep: int, best: int, monitor: str, mode: str) -> list[Path]:
    """Removes all checkpoints except the newest `keep` and the `best` best, if the newest is intact.

    Args:
        directory: where checkpoints are stored.
        keep: how many of the newest to keep, at least 1.
        best: how many of the best to keep in addition.
        monitor: the metric that decides which are best; checkpoints without it do not count.
        mode: "min" or "max".

    Returns:
        The removed folders.
    """
    there = folders(directory)
    try:
        check(there[-1])
    except (IndexError, Damaged) as error:
        _log.warning("No checkpoint is removed, because the newest is not intact: %s", error)
        return []
    staying = set(there[-max(1, keep) :]) | set(_best(there, best, monitor, mode))
    removed = [path for path in there if path not in staying]
    for path in removed:
        remove(path)
    return removed


def remove(path: Path) -> None:
    """Renames a checkpoint, so that readers ignore it, and removes it."""
    aside = path.with_name(f"{_UNREADABLE[1]}{path.name}")
    try:
        path.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        _log.warning("The checkpoint %s could not be removed (%s).", path, error.strerror)


def sweep(directory: Path) -> None:
    """Removes folders that an earlier run was writing or removing when it was killed."""
    if directory.is_dir():
        for path in directory.iterdir():
            if path.name.startswith(_UNREADABLE):
                shutil.rmtree(path, ignore_errors=True)


def metrics(directory: Path) -> list[dict[str, float]]:
    """Returns the metrics of all checkpoints in a directory that have some."""
    return [found for path in folders(directory) if (found := _metrics(path))]


def _metrics(path: Path) -> dict[str, float]:
    try:
        return dict(json.loads((path / "manifest.json").read_text(encoding="utf-8"))["metrics"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _best(there: list[Path], best: int, monitor: str, mode: str) -> list[Path]:
    judged = [(value, path) for path in there if isinstance(value := _metrics(path).get(monitor), (int, float))]
    judged = [(-value if mode == "max" else value, path) for value, path in judged if value == value]  # NaN is not
    return [path for _, path in sorted(judged)[:best]]


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _read_back(path: Path) -> None:
    """Reads all arrays, and compares them with their CRC-32, which was computed in memory."""
    with zipfile.ZipFile(path) as stored:
        broken = stored.testzip()
    if broken:
        raise Damaged(f"{broken} came back from the disk as something else")


def _storable(array: np.ndarray) -> np.ndarray:
    """Views dtypes unknown to NumPy (bfloat16, float8) as integers: NumPy would store raw bytes without the dtype."""
    if array.dtype.hasobject:
        raise TypeError(f"An array of Python objects cannot be stored without pickle: {array!r:.100}")
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array


def _restored(array: np.ndarray, dtype: str) -> np.ndarray:
    if array.dtype.name == dtype or array.dtype.kind in "US":
        return array
    import ml_dtypes  # comes with TensorFlow

    return array.view(getattr(ml_dtypes, dtype))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        _force(file)


def _describe(path: Path) -> dict[str, Any]:
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha.update(block)
            size += len(block)
    return {"bytes": size, "sha256": sha.hexdigest()}


def _hash_json(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _force(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _force_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
