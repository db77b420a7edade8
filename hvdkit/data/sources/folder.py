"""Images in class folders: `train/CLASS/*.png`, and `test/CLASS/*.png` if there is a test split; or `CLASS/*.png`."""

import collections
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data.sources import images
from hvdkit.data.sources.arrays import ArraySource, hold_out
from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)
_VALIDATION_NAMES = ("validation", "val", "valid")
_LOOKED_AT = 100  # number of images per split whose sizes are compared when the folder is opened


class FolderSource(ArraySource):
    """Image files in the layout of TFDS' `ImageFolder`, or class folders alone; see `Source` for the attributes.

    The images of a class may lie in folders inside of its folder. Hidden files and folders are passed over, as macOS
    leaves them; other files that are no images are named in a warning.

    A rank reads a file when it needs it. The files are shuffled once with a fixed seed: in the order of the folders,
    each rank's shard would hold only one class or a few.

    Args:
        path: the folder that contains `train`, or the folders of the classes.
        image_size: height and width to resize to; required if the images differ in size.

    Raises:
        UsageError: it has no images, an image that belongs to no class, an empty class, a test class that `train`
            lacks, a file that cannot be read, or images that differ in size.
    """

    def __init__(self, path: Path, image_size: int | None) -> None:
        train = path / "train" if (path / "train").is_dir() else _without_splits(path)
        names = [folder.name for folder in _folders(train)]
        splits = {"train": _files(train, names)}
        others = _other_folders(path) if train != path else {}
        splits |= {split: _files(folder, names) for split, folder in others.items()}
        if not others:
            splits = hold_out(*splits["train"])
        super().__init__(path.name, "file", names, splits)
        self.kind = "image"
        self._resize = image_size
        sizes, self._white = _look_at_first(path, splits)
        if len(sizes) > 1 and not image_size:
            raise UsageError(
                f"The images of {path} differ in size, but a batch needs one size: set it, for example "
                f"--image-size=224."
            )
        width, height = (image_size, image_size) if image_size else sizes.pop()
        self.shape = (height, width, 3)

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Examples `start` to `stop` of a split, images as the bytes of their files."""
        paths = super().read(split, start, stop)
        return paths.map(lambda path, label: (tf.io.read_file(path), label), num_parallel_calls=tf.data.AUTOTUNE)

    def decode(self, encoded: Any) -> tf.Tensor:
        """Decodes an image into uint8, with three channels."""
        image = images.decode(encoded, self._white)
        if self._resize:
            image = images.resize(image, self._resize)
        return tf.ensure_shape(image, self.shape)

    def locate(self, split: str, index: int) -> str:
        """The path of an example's file."""
        return str(self._splits[split][0][index])


def has_class_folders(path: Path) -> bool:
    """Returns whether a folder has a folder `train`, or folders with images."""
    if (path / "train").is_dir():
        return True
    return any(_is_image(file) for folder in _folders(path) for file in _walk(folder))


def _without_splits(path: Path) -> Path:
    """Returns the path, if its folders are those of classes.

    Raises:
        UsageError: they are named like splits.
    """
    names = [folder.name for folder in _folders(path)]
    if names and all(re.match("train|test|val", name, re.IGNORECASE) for name in names):
        raise UsageError(
            f"{path} has the folders {', '.join(names)}, which look like splits and not like classes. Name the one to "
            f"train on train, and the other one test."
        )
    return path


def _other_folders(path: Path) -> dict[str, Path]:
    """Returns the folders of the test and the validation split; if there is only one, it is the test split."""
    there = [path / name for name in ("test", *_VALIDATION_NAMES) if (path / name).is_dir()]
    if there and there[0].name != "test":
        _log.info("%s: %s is the test split", path, there[0].name)
    for folder in there[2:]:
        _log.warning("%s: %s is the validation split, and %s is left out", path, there[1].name, folder.name)
    return dict(zip(("test", "validation"), there, strict=False))


def _files(folder: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the paths and labels of a split, shuffled."""
    strange = sorted({d.name for d in _folders(folder)} - set(names))
    if strange:
        raise UsageError(f"{folder} has classes that train lacks: {', '.join(strange)}.")
    alone = sorted(file for file in folder.iterdir() if _is_image(file) and not _is_hidden(file) and file.is_file())
    if alone:
        raise UsageError(
            f"{folder} has {len(alone)} image(s) in no class's folder, such as {alone[0].name}. Move them into the "
            f"folders of their classes, or out of {folder}."
        )
    content = {name: sorted(_walk(folder / name)) for name in names}
    found = {name: [file for file in files if _is_image(file)] for name, files in content.items()}
    _name_others(folder, [file for files in content.values() for file in files if not _is_image(file)])
    empty = [n for n in names if not found[n]]
    if empty or not names:
        where = f"in {', '.join(empty)}" if empty else "in class folders"
        raise UsageError(
            f"{folder}: no images {where} ({', '.join(images.SUFFIXES)}). Fill the folder, or remove an empty class."
        )
    paths = np.asarray([str(p) for n in names for p in found[n]], object)
    labels = np.repeat(np.arange(len(names)), [len(found[n]) for n in names])
    order = np.random.default_rng(0).permutation(len(labels))
    return paths[order], labels[order]


def _name_others(folder: Path, others: list[Path]) -> None:
    """Names the files that are left out, one of each kind."""
    kinds = collections.Counter(file.suffix.lower() for file in others)
    examples = {file.suffix.lower(): str(file.relative_to(folder)) for file in reversed(others)}
    if others:
        listed = "; ".join(
            f"{number} {kind or 'without a suffix'}, such as {examples[kind]}" for kind, number in kinds.items()
        )
        _log.warning("%s: %d file(s) are no images and left out: %s", folder, len(others), listed)


def _folders(path: Path) -> list[Path]:
    """Returns the folders in a folder that are not hidden, sorted; none if it is missing."""
    return sorted(d for d in path.iterdir() if d.is_dir() and not _is_hidden(d)) if path.is_dir() else []


def _walk(folder: Path) -> Iterator[Path]:
    """Yields the files in a folder and its folders, links followed once, without what is hidden."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        inode = Path(root).stat()
        folders[:] = [] if (inode.st_dev, inode.st_ino) in seen else [d for d in folders if not _is_hidden(Path(d))]
        if (inode.st_dev, inode.st_ino) not in seen:
            yield from (Path(root, file) for file in files if not _is_hidden(Path(file)))
        seen.add((inode.st_dev, inode.st_ino))


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__MACOSX"


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in images.SUFFIXES


def _look_at_first(path: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[set[tuple[int, int]], int]:
    """Returns the sizes, (width, height), of the first images of each split, and their value of white."""
    sizes, deep, broken = set(), [], {}
    for file in (file for paths, _ in splits.values() for file in paths[:_LOOKED_AT]):
        try:
            size, pixels = images.look_at(Path(file).read_bytes())
        except (OSError, ValueError) as error:
            broken[file] = error
            continue
        sizes.add(size)
        deep += [pixels] if pixels is not None else []
    if broken:
        listed = "; ".join(f"{file} ({reason})" for file, reason in broken.items())
        raise UsageError(f"{len(broken)} image(s) of {path} cannot be read: {listed}. Repair or remove them.")
    return sizes, images.white_of(deep)
