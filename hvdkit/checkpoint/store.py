"""Checkpoints on disk: a folder each, which is whole or not there.

    checkpoints/000007-step-1200/      number of the checkpoint, steps trained
        arrays.npz                     weights, slots, metrics, ...
        state.json                     everything else
        manifest.json                  size and SHA-256 of both, and of itself

A folder is written under a name that no reader looks at, forced to the disk, and renamed: a kill at any instant leaves
the older ones as they were. A reader trusts a folder only if all checksums are right. Nothing is ever unpickled.
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
_UNREADABLE = ".partial-", ".removed-"  # how the names begin of folders that no reader looks at
_BLOCK = 8 << 20  # bytes hashed at once


class Damaged(Exception):  # noqa: N818 - says what it is
    """A checkpoint whose content is not what was written; the message says where."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was read from a folder: `state` is plain JSON, `arrays` are by name."""

    path: Path
    state: dict[str, Any]
    arrays: dict[str, np.ndarray]


def folders(directory: Path) -> list[Path]:
    """The published checkpoints of a directory, oldest first; whether they are intact is not looked at."""
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
    """Publishes a checkpoint, and reads it back.

    Args:
        directory: where checkpoints lie; made if it is not there.
        step: steps trained, for the name.
        state: plain JSON.
        arrays: of any dtype but object.
        metrics: by which the best checkpoints are kept.

    Returns:
        The new folder.

    Raises:
        OSError: the disk is full, or the like; nothing is left then, and older checkpoints are as they were.
        Damaged: what was read back is not what was written; the folder is removed.
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
    """Reads a checkpoint whose checksums are right.

    Raises:
        Damaged: they are not, or something is missing.
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
    """Compares a checkpoint's files with its manifest, and returns that.

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
    """The newest intact checkpoint of a directory; damaged ones are passed over, with a warning."""
    for path in reversed(folders(directory)):
        try:
            return read(path)
        except Damaged as error:
            _log.warning("The checkpoint %s is damaged (%s): an older one is used.", path, error)
    return None


def find(where: Path) -> Checkpoint:
    """The checkpoint that a user named: its folder, the directory of several, or a run's workdir.

    Raises:
        UsageError: there is none, or the named one is damaged.
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
    """Removes all checkpoints but the newest `keep` and the `best` best, if the newest is intact.

    Args:
        directory: where checkpoints lie.
        keep: how many of the newest stay, at least 1.
        best: how many of the best stay besides.
        monitor: the metric that tells which are best; checkpoints without it are not among these.
        mode: "min" or "max".

    Returns:
        What was removed.
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
    """Removes a checkpoint: first its name, so that nobody reads half of it."""
    aside = path.with_name(f"{_UNREADABLE[1]}{path.name}")
    try:
        path.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        _log.warning("The checkpoint %s could not be removed (%s).", path, error.strerror)


def sweep(directory: Path) -> None:
    """Removes what an earlier run had begun to write, or to remove, when it was killed."""
    if directory.is_dir():
        for path in directory.iterdir():
            if path.name.startswith(_UNREADABLE):
                shutil.rmtree(path, ignore_errors=True)


def _best(there: list[Path], best: int, monitor: str, mode: str) -> list[Path]:
    judged = []
    for path in there:
        try:
            value = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["metrics"][monitor]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if value == value:  # NaN is not
            judged.append((-value if mode == "max" else value, path))
    return [path for _, path in sorted(judged)[:best]]


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _read_back(path: Path) -> None:
    """Reads all arrays, and compares them with the CRC-32 that was taken of them in memory."""
    with zipfile.ZipFile(path) as stored:
        broken = stored.testzip()
    if broken:
        raise Damaged(f"{broken} came back from the disk as something else")


def _storable(array: np.ndarray) -> np.ndarray:
    """NumPy writes dtypes that it does not know (bfloat16, float8) as raw bytes, and forgets which they were."""
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
