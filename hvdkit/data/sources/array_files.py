"""Images or features, with labels, from arrays that NumPy saved: a `.npz` file, or `.npy` files in one folder.

What can be mapped into memory is mapped: `.npy` files and `.npz` files without compression. A rank then reads only its
own part. Of a compressed `.npz` file, every rank holds all arrays in memory.
"""

import dataclasses
import logging
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data.sources import labels as label_kinds
from hvdkit.data.sources.arrays import ArraySource, hold_out
from hvdkit.data.sources.images import resize, to_8_bits, white_of
from hvdkit.data.sources.schema import CLASSIFICATION, MULTILABEL, REGRESSION
from hvdkit.data.sources.table_files import Column
from hvdkit.errors import UsageError

SUFFIXES = (".npz", ".npy")
_INPUTS = ("x", "images", "image", "inputs", "data", "features")
_LABELS = ("y", "labels", "label", "targets", "target")
_SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
_EXPECTED = "x_train, y_train, x_test and y_test, or x and y, or images and labels"
_LOOKED_AT = 100  # images that tell the range of pixels
_AT_ONCE = 1024  # examples that are read together
_LOCAL_HEADER = 30  # bytes of a member of a zip file before its name; its lengths are in the last four (APPNOTE 4.3.7)
_log = logging.getLogger(__name__)


class ArrayFileSource(ArraySource):
    """Examples in arrays that are perhaps mapped files; see `Source` for the attributes.

    Args:
        name: the name that the user gave.
        labels: how labels are encoded.
        splits: for each split, the array of inputs, the encoded labels, and the rows of the array that they belong to.
        image_size: height and width to resize images to.

    Raises:
        UsageError: the inputs are neither images nor vectors of numbers.
    """

    def __init__(
        self,
        name: str,
        labels: label_kinds.Labels,
        splits: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
        image_size: int | None,
    ) -> None:
        inputs = splits["train"][0]
        kind = _kind(name, inputs)
        width = int(np.prod(inputs.shape[1:]))
        features = [str(number) for number in range(width)] if kind == "features" else []
        pairs = {split: (array, encoded) for split, (array, encoded, _) in splits.items()}
        super().__init__(name, kind, labels.names, pairs, task=labels.task, feature_names=features)
        self._rows = {split: rows for split, (_, _, rows) in splits.items()}
        self._pixels = _Pixels.of(name, inputs) if kind == "image" else None
        self._resize = image_size
        if kind == "features":
            self.shape = (width,)
        else:
            height, width, channels = (*inputs.shape[1:], 1)[:3]
            self.shape = (image_size or height, image_size or width, channels)

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Examples `start` to `stop` of a split, read in chunks."""
        inputs, labels = self._splits[split]
        rows = self._rows[split]
        dtype = np.dtype(self._pixels.dtype if self._pixels else np.float32)

        def chunk(first: np.ndarray) -> np.ndarray:
            return np.asarray(inputs[rows[first : min(first + _AT_ONCE, stop)]]).astype(dtype)

        firsts = tf.data.Dataset.range(start, stop, _AT_ONCE)
        examples = firsts.map(lambda first: tf.numpy_function(chunk, [first], dtype)).unbatch()
        shaped = examples.map(lambda example: tf.ensure_shape(example, inputs.shape[1:]))
        label_dtype = np.int64 if self.task == CLASSIFICATION else np.float32
        targets = tf.data.Dataset.from_tensor_slices(labels[start:stop].astype(label_dtype))
        cardinality = tf.data.experimental.assert_cardinality(stop - start)
        return tf.data.Dataset.zip(shaped, targets).apply(cardinality)

    def decode(self, encoded: Any) -> tf.Tensor:
        """Scales an image to 0 to 255; flattens features."""
        if self._pixels is None:
            return tf.reshape(encoded, self.shape)
        image = self._pixels.decode(encoded)
        image = image[..., tf.newaxis] if image.shape.rank == 2 else image
        return tf.ensure_shape(resize(image, self._resize) if self._resize else image, self.shape)


def _kind(name: str, inputs: np.ndarray) -> str:
    if inputs.dtype.kind not in "biuf":
        raise UsageError(f"{name}: the inputs have dtype {inputs.dtype}, but must be numbers. Save them as numbers.")
    if inputs.ndim in (1, 2):
        return "features"
    if inputs.ndim not in (3, 4):
        raise UsageError(
            f"{name}: the inputs have shape {inputs.shape}. Save images as [examples, height, width] or [examples, "
            f"height, width, channels], or vectors as [examples, features]."
        )
    if inputs.ndim == 4 and inputs.shape[1] in (1, 3) and inputs.shape[3] > 4:
        raise UsageError(
            f"{name}: the inputs have shape {inputs.shape}, with channels before height and width. Save them behind: "
            f"x.transpose(0, 2, 3, 1)."
        )
    return "image"


@dataclasses.dataclass(frozen=True)
class _Pixels:
    """How pixels become 0 to 255.

    Attributes:
        dtype: the dtype to read them with.
        white: the value that becomes 255.
    """

    dtype: str
    white: float

    @classmethod
    def of(cls, name: str, images: np.ndarray) -> "_Pixels":
        """Decides by the dtype, and where that leaves it open by the first images.

        Raises:
            UsageError: their pixels are neither from 0 to 1 nor from 0 to 255.
        """
        first = np.asarray(images[:_LOOKED_AT])
        if first.dtype == np.uint8:
            return cls("uint8", 255)
        if first.dtype.kind == "u" and first.dtype.itemsize == 2:
            return cls("uint16", white_of(first))
        if first.dtype.kind == "b":
            return cls("float32", 1)
        low, high = float(first.min()), float(first.max())
        if not (low >= 0 and high <= 255):  # also NaN
            raise UsageError(
                f"{name}: the images have {first.dtype} pixels from {low:g} to {high:g}, but they must be from 0 to "
                f"255 or, as floating-point numbers, from 0 to 1. Save them so, best as uint8."
            )
        return cls("float32", 1 if first.dtype.kind == "f" and high <= 1 else 255)

    def decode(self, image: tf.Tensor) -> tf.Tensor:
        """Graph function from an image as it was read to one from 0 to 255."""
        if self.dtype == "uint8":
            return image
        if self.dtype == "uint16":
            return to_8_bits(image, int(self.white))
        message = f"The image has pixels that are not from 0 to {self.white:g}, as those of the first images are."
        low = tf.debugging.assert_greater_equal(tf.reduce_min(image), 0.0, message)
        high = tf.debugging.assert_less_equal(tf.reduce_max(image), float(self.white), message)
        with tf.control_dependencies([low, high]):
            return image * (255 / self.white)


def has_arrays(folder: Path) -> bool:
    """Returns whether a folder has `.npy` files whose names say that they are inputs."""
    return any((found := _meaning(file.stem)) and found[1] == "inputs" for file in folder.glob("*.npy"))


def load_arrays(path: Path, task: str, image_size: int | None) -> ArrayFileSource:
    """Opens a `.npz` file, a `.npy` file with others beside it, or a folder of `.npy` files.

    Names say what arrays are: `x_train` or `train_images`, `y_train` or `train_labels`, and likewise for `test` and
    `validation`; or `x` and `y`, `images` and `labels`. Without a test split, a fifth of the examples is held out, the
    same ones in every run.

    Inputs with three or four dimensions are images; with one or two, vectors of features. Labels may be numbers or
    names of classes, one-hot, 0 or 1 for each of several labels, or measured values if the task is `regression`.

    Args:
        path: the file or folder.
        task: see `Schema`.
        image_size: height and width to resize images to.

    Raises:
        UsageError: an array is missing, cannot be read, or does not fit the others or the task.
    """
    arrays = _open_archive(path) if path.suffix.lower() == ".npz" else _open_folder(path)
    inputs, targets = _by_split(path, arrays)
    column, encoder = _learn(path, task, targets["train"])
    encoded = {"train": encoder.encode(path, column, _places(column))}
    for split in targets.keys() - {"train"}:
        column = _column(path, encoder.task, targets[split])
        encoded[split] = encoder.encode(path, column, _places(column))
    if "test" in inputs:
        splits = {split: (inputs[split], encoded[split], np.arange(len(encoded[split]))) for split in inputs}
    else:
        held_out = hold_out(np.arange(len(encoded["train"])), encoded["train"])
        splits = {split: (inputs["train"], labels, rows) for split, (rows, labels) in held_out.items()}
    return ArrayFileSource(path.name, encoder, splits, image_size)


# -------------------------------------------------------------------------------------------------------------- Files


def _open_folder(path: Path) -> dict[str, np.ndarray]:
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise UsageError(f"The data set {path} does not exist. Give the path of a .npy file, with others beside it.")
    found = {}
    for file in sorted(folder.glob("*.npy")):
        if _meaning(file.stem) or file == path:
            found[file.stem] = _load(
                file, file.name, lambda file=file: np.load(file, mmap_mode="r", allow_pickle=False)
            )
    return found


def _open_archive(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UsageError(f"The data set {path} does not exist. Give the path of a .npz file.")
    try:
        members = {info.filename.removesuffix(".npy"): info for info in zipfile.ZipFile(path).infolist()}
    except zipfile.BadZipFile as error:
        raise UsageError(f"{path} cannot be read as .npz ({error}). Is it complete? Save it again.") from None
    with np.load(path, allow_pickle=False) as archive:
        names = [name for name in archive.files if _meaning(name)] or archive.files
        others = [name for name in archive.files if name not in names]
        if others:
            _log.warning("%s: arrays %s are left out; their names are none of %s", path, ", ".join(others), _EXPECTED)
        return {name: _load(path, name, lambda name=name: _member(path, members[name], archive)) for name in names}


def _member(path: Path, info: zipfile.ZipInfo, archive: Any) -> np.ndarray:
    """Returns an array of an archive: mapped if it is not compressed, otherwise read."""
    if info.compress_type != zipfile.ZIP_STORED:
        return archive[info.filename.removesuffix(".npy")]
    with path.open("rb") as file:
        file.seek(info.header_offset + _LOCAL_HEADER - 4)
        file.seek(sum(struct.unpack("<HH", file.read(4))), 1)  # the member's name and further fields
        is_first = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
        if dtype.hasobject or 0 in shape:
            return archive[info.filename.removesuffix(".npy")]  # says what is wrong, or is empty
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if is_fortran else "C")


def _load(path: Path, name: str, read: Any) -> np.ndarray:
    try:
        return read()
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "object" in str(error).lower():
            raise UsageError(
                f"{path}: {name} has Python objects, which could run code when they are loaded. Save an array of "
                f"numbers, such as np.asarray(list_of_images, 'uint8'), with images of one size."
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"{path}: {name} cannot be read ({reason}). Is it complete? Save it again.") from None


# -------------------------------------------------------------------------------------------------------------- Names


def _meaning(name: str) -> tuple[str, str] | None:
    """Returns the split and the role of an array, `inputs` or `labels`; None if its name says neither."""
    words = re.split(r"[_\-. ]", name.lower())
    roles = ["inputs" if word in _INPUTS else "labels" for word in words if word in _INPUTS + _LABELS]
    splits = [_SPLITS[word] for word in words if word in _SPLITS]
    if len(roles) != 1 or len(splits) > 1 or len(roles) + len(splits) != len(words):
        return None
    return (splits or ["train"])[0], roles[0]


def _by_split(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the inputs and the labels of each split. A validation split that is alone is the test split."""
    found: dict[str, dict[str, str]] = {"inputs": {}, "labels": {}}
    for name in arrays:
        meaning = _meaning(name)
        if meaning is None:
            continue
        split, role = meaning
        if split in found[role]:
            raise UsageError(
                f"{path} has two arrays of {split} {role}, {found[role][split]} and {name}. Leave one out."
            )
        found[role][split] = name
    inputs, labels = found["inputs"], found["labels"]
    for split in inputs.keys() ^ labels.keys() or {"train"} - inputs.keys():
        present = inputs.get(split) or labels.get(split)
        what = f"labels for {present}" if split in inputs else f"inputs for {present}" if present else "training data"
        raise UsageError(f"{path} has no {what}: its arrays are {', '.join(arrays) or 'none'}. Name them {_EXPECTED}.")
    for split, name in inputs.items():
        _check_pair(path, name, arrays[name], labels[split], arrays[labels[split]])
        _check_like(path, name, arrays[name], inputs["train"], arrays[inputs["train"]])
    if "validation" in inputs and "test" not in inputs:
        inputs["test"], labels["test"] = inputs.pop("validation"), labels.pop("validation")
    return {s: arrays[name] for s, name in inputs.items()}, {s: arrays[name] for s, name in labels.items()}


def _check_pair(path: Path, name: str, inputs: np.ndarray, label_name: str, labels: np.ndarray) -> None:
    sizes = [array.shape[0] if array.ndim else 0 for array in (inputs, labels)]
    if sizes[0] != sizes[1] or not sizes[0]:
        raise UsageError(
            f"{path}: {name} has {sizes[0]} examples and {label_name} {sizes[1]}. Save one label for each example."
        )


def _check_like(path: Path, name: str, inputs: np.ndarray, other_name: str, other: np.ndarray) -> None:
    if inputs.shape[1:] != other.shape[1:] or inputs.dtype != other.dtype:
        raise UsageError(
            f"{path}: an example of {name} is {inputs.dtype} {list(inputs.shape[1:])}, and one of {other_name} is "
            f"{other.dtype} {list(other.shape[1:])}. Save them alike."
        )


# ------------------------------------------------------------------------------------------------------------- Labels


def _learn(path: Path, task: str, labels: np.ndarray) -> tuple[Column, label_kinds.Labels]:
    """Returns the labels of the training split as a column, and their encoding."""
    if _is_matrix(labels):
        names = [str(number) for number in range(labels.shape[1])]
        if task == REGRESSION:
            return labels, _Matrix(REGRESSION, names)
        is_binary = labels.dtype.kind in "biuf" and bool(np.isin(labels, (0, 1)).all())
        is_one_hot = is_binary and bool((np.sum(labels, axis=1) == 1).all())
        if is_one_hot and task in ("auto", CLASSIFICATION):
            return labels, _Matrix(CLASSIFICATION, names)
        if is_binary and task in ("auto", MULTILABEL):
            return labels, _Matrix(MULTILABEL, names)
        raise UsageError(
            f"{path}: the labels have shape {labels.shape}, which does not fit --task={task}. Save one class for each "
            f"example, 0 or 1 for each label, or train on measured values with --task=regression."
        )
    column = _column(path, task, labels)
    return column, label_kinds.learn(task, path, "y", column, _places(column))


def _is_matrix(labels: np.ndarray) -> bool:
    return labels.ndim > 1 and labels.shape[1:] != (1,)


def _column(path: Path, task: str, labels: np.ndarray) -> Column:
    """Returns the labels of a split as a column of numbers or texts, or as the matrix that they are."""
    if labels.ndim > 2:
        raise UsageError(f"{path}: the labels have shape {labels.shape}. Save one label, or one row, for each example.")
    if _is_matrix(labels):
        return np.asarray(labels)
    labels = np.asarray(labels).reshape(-1)
    if labels.dtype.kind == "S":
        return np.char.decode(labels, "utf-8").tolist()
    if labels.dtype.kind == "U":
        return labels.tolist()
    if labels.dtype.kind not in "biuf":
        raise UsageError(f"{path}: the labels have dtype {labels.dtype}. Save numbers, or names of classes.")
    is_whole = labels.dtype.kind == "f" and bool((np.isfinite(labels) & (labels == np.round(labels))).all())
    return labels.astype(np.int64) if is_whole and task != REGRESSION else labels


def _places(column: Column) -> list[str]:
    return [f"example {number}" for number in range(len(column))]


@dataclasses.dataclass
class _Matrix:
    """Labels that are encoded already: one-hot, 0 or 1 for each label, or several measured values."""

    task: str
    names: list[str]

    def encode(self, path: Path, column: Column, places: Any) -> np.ndarray:
        """Returns the numbers of classes, int64 [examples], or the labels, float32 [examples, labels]."""
        labels = np.asarray(column)
        if labels.ndim != 2 or labels.shape[1] != len(self.names):
            raise UsageError(
                f"{path}: a row of the training labels has {len(self.names)} numbers, but labels of another split have "
                f"shape {labels.shape}. Save them alike."
            )
        if self.task == CLASSIFICATION:
            return labels.argmax(axis=1).astype(np.int64)
        return labels.astype(np.float32)
