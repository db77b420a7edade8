"""Images in class folders: `train/CLASS/*.png`, and `test/CLASS/*.png` if there is a test split."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data.sources.arrays import ArraySource, hold_out
from hvdkit.errors import UsageError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif"}
_LOOKED_AT = 100  # number of images per split whose sizes are compared when the folder is opened


class FolderSource(ArraySource):
    """Image files in the layout of TFDS' `ImageFolder`; see `Source` for the attributes.

    A rank reads a file when it needs it. The files are shuffled once with a fixed seed: in the order of the folders,
    each rank's shard would hold only one class or a few.

    Args:
        path: the folder that contains `train`.
        image_size: height and width to resize to; required if the images differ in size.

    Raises:
        UsageError: it has no images, an empty class, a test class that `train` lacks, or images that differ in size.
    """

    def __init__(self, path: Path, image_size: int | None) -> None:
        names = sorted(d.name for d in (path / "train").iterdir() if d.is_dir())
        train = _files(path / "train", names)
        splits = (
            {"train": train, "test": _files(path / "test", names)} if (path / "test").is_dir() else hold_out(*train)
        )
        super().__init__(path.name, "file", names, splits)
        self.kind = "image"
        self._resize = image_size
        self.shape = (image_size, image_size, 3) if image_size else _common_shape(path, splits)

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Examples `start` to `stop` of a split, images as the bytes of their files."""
        paths = super().read(split, start, stop)
        return paths.map(lambda path, label: (tf.io.read_file(path), label), num_parallel_calls=tf.data.AUTOTUNE)

    def decode(self, encoded: Any) -> tf.Tensor:
        """Decodes an image into uint8, with three channels."""
        image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        if self._resize:
            image = resize(image, self._resize)
        return tf.ensure_shape(image, self.shape)


def resize(image: tf.Tensor, size: int) -> tf.Tensor:
    """Resizes a uint8 image to `size` by `size` pixels, bilinearly and with antialiasing."""
    resized = tf.image.resize(image, [size, size], antialias=True)
    return tf.cast(tf.round(tf.clip_by_value(resized, 0, 255)), tf.uint8)


def _files(folder: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    strange = sorted({d.name for d in folder.iterdir() if d.is_dir()} - set(names))
    if strange:
        raise UsageError(f"{folder} has classes that train lacks: {', '.join(strange)}.")
    found = {n: sorted(p for p in _content(folder / n) if p.suffix.lower() in _SUFFIXES) for n in names}
    empty = [n for n in names if not found[n]]
    if empty or not names:
        where = f"in {', '.join(empty)}" if empty else "in class folders"
        raise UsageError(
            f"{folder}: no images {where} ({', '.join(sorted(_SUFFIXES))}). Fill the folder, or remove an empty class."
        )
    paths = np.asarray([str(p) for n in names for p in found[n]], object)
    labels = np.repeat(np.arange(len(names)), [len(found[n]) for n in names])
    order = np.random.default_rng(0).permutation(len(labels))
    return paths[order], labels[order]


def _content(folder: Path) -> Iterator[Path]:
    """Yields what is in a folder, none if it is missing. A glob would read a class named `[ab]` as a pattern."""
    return folder.iterdir() if folder.is_dir() else iter(())


def _common_shape(path: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> tuple[int, int, int]:
    from PIL import Image  # reads only a file's header

    files = [file for paths, _ in splits.values() for file in paths[:_LOOKED_AT]]
    sizes = {Image.open(file).size for file in files}
    if len(sizes) > 1:
        raise UsageError(
            f"The images of {path} differ in size, but a batch needs one size: set it, for example --image-size=224."
        )
    width, height = sizes.pop()
    return height, width, 3
