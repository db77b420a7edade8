"""Files of the splits of a data set, found by their names: `train-00000-of-00010.tfrecord`, `test/0001.parquet`."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from hvdkit.data.sources.table_files import listed
from hvdkit.errors import UsageError

_SPLIT = re.compile(r"(?:^|[-_.])(train|test|validation|valid|val|dev)(?![a-z])", re.IGNORECASE)


def split_of(path: Path) -> str:
    """Returns the split that a file's or folder's name tells: `train`, `test` or `validation`; otherwise empty."""
    match = _SPLIT.search(path.name)
    name = match.group(1).lower() if match else ""
    return name if name in ("", "train", "test") else "validation"


def files_in(folder: Path, is_file: Callable[[Path], bool]) -> list[Path]:
    """Returns the files of one kind in a folder, or else in its folders that are named like splits."""
    there = sorted(folder.iterdir())
    inside = [file for path in there if path.is_dir() and split_of(path) for file in sorted(path.iterdir())]
    return [file for file in there if is_file(file)] or [file for file in inside if is_file(file)]


def by_split(path: Path, files: Iterable[Path]) -> dict[str, list[Path]]:
    """Divides files into splits.

    Args:
        path: what the user gave, for messages.
        files: files of which each is named like its split, or lies in a folder that is; or none is.

    Returns:
        The files of each split, `train` first. If there is one other split, it is the test split.

    Raises:
        UsageError: it is not clear to which split a file belongs.
    """
    found: dict[str, list[Path]] = {}
    for file in files:
        split = split_of(file) or (split_of(file.parent) if file.parent not in (path, path.parent) else "")
        found.setdefault(split, []).append(file)
    if set(found) == {""}:
        return {"train": found[""]}
    if "" in found or "train" not in found:
        names = listed([file.name for file in found.get("", [file for part in found.values() for file in part])])
        raise UsageError(
            f"{path}: it is not clear to which split {names} belong(s). Write train, test or validation into the name."
        )
    others = [found[split] for split in ("test", "validation") if split in found]
    return {"train": found["train"], **dict(zip(("test", "validation"), others, strict=False))}
