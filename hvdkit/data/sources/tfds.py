"""Sources that TensorFlow Datasets reads: catalogue names and prepared directories."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data.sources.images import resize, to_8_bits, white_of
from hvdkit.data.sources.schema import AS_COMPILED, CLASSIFICATION
from hvdkit.data.sources.tokens import TokenSource, join
from hvdkit.errors import UsageError

_LOOKED_AT = 100  # number of images of 16 bits that tell their value of white
_NAMES = ("train", "test", "validation")
_MOST_BOXES = 100  # around the objects of an image; further ones are left out
_HELD_OUT = 0.2  # fraction of `train` to use as the test split if a data set has none


class TfdsSource:
    """A prepared TFDS data set; see `Source` for the attributes.

    Images stay encoded when they are read: a shuffle buffer or a cache holds compressed bytes.

    Args:
        name: the name that the user gave.
        builder: a `tfds.core.DatasetBuilder` whose data are on disk.
        image_size: height and width to resize to; required if the images differ in size.

    Raises:
        UsageError: it has no train split, no label, or neither an image nor a text.
    """

    task = CLASSIFICATION

    def __init__(self, name: str, builder: Any, image_size: int | None) -> None:
        self.name = name
        self._builder = builder
        self._ranges = _ranges(name, builder)
        self.splits = tuple(self._ranges)
        self._input, self._label = self._keys()
        feature = builder.info.features[self._input]
        self.kind = "image" if "Image" in type(feature).__name__ else "text"
        self.label_names = self._class_names()
        self.feature_names: list[str] = []
        self._resize = image_size
        self._feature = feature
        self.shape: tuple[int, ...] | None = self._image_shape(feature) if self.kind == "image" else None
        is_deep = self.kind == "image" and tf.as_dtype(feature.np_dtype) == tf.uint16
        self._white = white_of(self._first_images()) if is_deep else None

    def size(self, split: str) -> int:
        """Number of examples in a split."""
        _, start, stop = self._ranges[split]
        return stop - start

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Examples `start` to `stop` of a split, images as encoded bytes."""
        import tensorflow_datasets as tfds

        decoders = {self._input: tfds.decode.SkipDecoding()} if self.kind != "text" else None
        of, offset, _ = self._ranges[split]
        dataset = self._builder.as_dataset(
            split=f"{of}[{offset + start}:{offset + stop}]",
            decoders=decoders,
            shuffle_files=False,  # hvdkit determines the order, from the seed, the epoch and the shard
        )
        return dataset.map(lambda example: (example[self._input], self._labels(example)))

    def locate(self, split: str, index: int) -> str:
        """The index of an example."""
        return f"example {index}"

    def decode(self, encoded: Any) -> tf.Tensor:
        """Decodes an image into uint8; text is not encoded."""
        if self.kind == "text":
            return encoded
        image = self._feature.decode_example(encoded)
        if self._white:
            image = to_8_bits(image, self._white)
        if self._resize:
            image = resize(image, self._resize)
        return tf.ensure_shape(image, self.shape)

    def _keys(self) -> tuple[str, str]:
        return _keys(self.name, self._builder)

    def _class_names(self) -> list[str]:
        return list(self._builder.info.features[self._label].names)

    def _labels(self, example: Any) -> tf.Tensor:
        return example[self._label]

    def _first_images(self) -> Iterator[np.ndarray]:
        first = self.read("train", 0, min(_LOOKED_AT, self.size("train")))
        return first.map(lambda encoded, _: self._feature.decode_example(encoded)).as_numpy_iterator()

    def _image_shape(self, feature: Any) -> tuple[int, int, int]:
        height, width, channels = feature.shape
        if self._resize:
            height = width = self._resize
        if height is None or width is None:
            raise UsageError(
                f"The images of {self.name} differ in size, but a batch needs one size: set it, for example "
                f"--image-size=224."
            )
        return height, width, channels or 3


class TfdsBoxSource(TfdsSource):
    """A prepared TFDS data set with boxes around objects, such as `coco` and `voc`; see `hvdkit.data.sources.boxes`.

    Of each image it has a feature `image`, and of each object `bbox` and `label` in a sequence `objects`. Crowds are
    left out.

    Args: see `TfdsSource`.
    """

    task = AS_COMPILED

    def __init__(self, name: str, builder: Any, image_size: int | None) -> None:
        super().__init__(name, builder, image_size)
        self.kind = "boxes"

    def _keys(self) -> tuple[str, str]:
        return "image", "objects"

    def _class_names(self) -> list[str]:
        return list(self._builder.info.features["objects"]["label"].names)

    def _labels(self, example: Any) -> tf.Tensor:
        objects = example["objects"]
        height, width, _ = self.shape or ()
        upper, left, lower, right = tf.unstack(objects["bbox"], axis=1)
        sides = [left * width, upper * height, right * width, lower * height]
        found = tf.stack([*sides, tf.cast(objects["label"], tf.float32)], axis=1)
        if "is_crowd" in objects:
            found = tf.boolean_mask(found, ~objects["is_crowd"])
        found = found[:_MOST_BOXES]
        return tf.ensure_shape(
            tf.pad(found, [[0, _MOST_BOXES - tf.shape(found)[0]], [0, 0]], constant_values=-1.0), [_MOST_BOXES, 5]
        )


def _open(name: str, builder: Any, image_size: int | None) -> TfdsSource:
    features = builder.info.features
    objects: Any = features["objects"] if {"image", "objects"} <= set(features) else {}
    has_boxes = hasattr(objects, "keys") and {"bbox", "label"} <= set(objects.keys())
    return (TfdsBoxSource if has_boxes else TfdsSource)(name, builder, image_size)


def open_prepared(path: Path, image_size: int | None) -> TfdsSource:
    """Opens a prepared TFDS directory: the one that contains `dataset_info.json`."""
    import tensorflow_datasets as tfds

    return _open(path.parent.name, tfds.builder_from_directory(str(path)), image_size)


def open_named(name: str, data_dir: str | None, *, download: bool, image_size: int | None) -> TfdsSource:
    """Opens a data set by its TFDS name, optionally with config and version (`name/config:1.0.0`).

    Reads the newest version in `data_dir`. If there is none and `download` is true, downloads it.
    """
    return _open(name.partition(":")[0], _find(name, data_dir, download=download), image_size)


def open_texts(name: str, data_dir: str | None, *, download: bool) -> TokenSource:
    """Opens the concatenated texts of a data set as bytes to predict; ignores labels.

    Args:
        name: a TFDS name as for `open_named`, or the path of a prepared directory.
        data_dir: as for `open_named`.
        download: as for `open_named`.

    Raises:
        UsageError: there is no such data set, or it has no text.
    """
    import tensorflow_datasets as tfds

    path = Path(name).expanduser()
    if (path / "dataset_info.json").is_file():
        builder, short = tfds.builder_from_directory(str(path)), path.parent.name
    else:
        builder, short = _find(name, data_dir, download=download), name.partition(":")[0]
    features = builder.info.features
    key = next((k for k in features if type(features[k]).__name__ == "Text"), None)
    if key is None:
        raise UsageError(
            f"The data set {short!r} has no text to predict; its features are: {', '.join(sorted(features))}. Give "
            f"another, or omit `text:` to train a classifier on it."
        )
    return TokenSource(short, {split: _texts(builder, key, where) for split, where in _ranges(short, builder).items()})


def _texts(builder: Any, key: str, where: tuple[str, int, int]) -> bytes:
    of, start, stop = where
    examples = builder.as_dataset(split=f"{of}[{start}:{stop}]", shuffle_files=False)
    return join(examples.map(lambda example: example[key]).as_numpy_iterator())


def _find(name: str, data_dir: str | None, *, download: bool) -> Any:
    """Returns the builder of a data set in `data_dir`, downloading it if allowed."""
    import tensorflow_datasets as tfds

    root = Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    directory = _find_prepared(root, name)
    if directory is None and not download:
        there = sorted({p.relative_to(root).parts[0] for p in root.glob("*/**/dataset_info.json")}) or ["none"]
        raise UsageError(
            f"The data set {name!r} is not in {root} (found: {', '.join(there)}). Give its folder with "
            f"--data-dir=DIR, download it with --download, or use --dataset=digits, which needs no download."
        )
    return tfds.builder_from_directory(str(directory)) if directory else _download(name, root)


def _find_prepared(root: Path, name: str) -> Path | None:
    from packaging.version import Version

    base, _, version = name.partition(":")
    found = [p.parent for p in (root / base).glob("**/dataset_info.json") if version in ("", p.parent.name)]
    configs = sorted({str(p.parent.relative_to(root)) for p in found})
    if len(configs) > 1:
        raise UsageError(f"{root} has several configurations of {base}: choose one of {', '.join(configs)}.")
    return max(found, key=lambda p: Version(p.name), default=None)


def _download(name: str, root: Path) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=str(root))
        builder.download_and_prepare()
    except tfds.core.registered.DatasetNotFoundError:
        raise UsageError(f"TFDS {tfds.__version__} knows no data set {name!r}; see `tfds.list_builders()`.") from None
    except Exception as error:  # whatever a builder's own code, the network or the disk raises
        reason = (str(error).splitlines() or ["no message"])[0][:200]
        raise UsageError(
            f"TFDS could not download and prepare {name!r} in {root} ({type(error).__name__}: {reason}). Check the "
            f"network and the disk space, or prepare it elsewhere and give its directory with --data-dir."
        ) from error
    return builder


def _ranges(name: str, builder: Any) -> dict[str, tuple[str, int, int]]:
    """Returns for `train`, `test`, and `validation` if there is one, the TFDS split and the range in it."""
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    if "train" not in sizes:
        raise UsageError(f"The data set {name!r} has no split named train, only: {', '.join(sizes) or 'none'}.")
    others = [split for split in ("test", "validation") if sizes.get(split)]
    if others:  # the first is the test split, whatever its name
        return {name: (split, 0, sizes[split]) for name, split in zip(_NAMES, ("train", *others), strict=False)}
    cut = round(sizes["train"] * (1 - _HELD_OUT))
    return {"train": ("train", 0, cut), "test": ("train", cut, sizes["train"])}


def _keys(name: str, builder: Any) -> tuple[str, str]:
    """Returns the names of the input and the label feature: the supervised pair, or the only candidates."""
    features = builder.info.features
    if builder.info.supervised_keys and len(builder.info.supervised_keys) == 2:
        keys = builder.info.supervised_keys
    else:
        inputs = [k for k in ("image", "text", "sentence") if k in features]
        labels = [k for k in features if type(features[k]).__name__ == "ClassLabel"]
        keys = (inputs[0] if inputs else "", labels[0] if labels else "")
    wrong = not all(k in features for k in keys) or type(features[keys[1]]).__name__ != "ClassLabel"
    if wrong or not any(kind in type(features[keys[0]]).__name__ for kind in ("Image", "Text")):
        raise UsageError(
            f"The data set {name!r} needs an image or text feature and a class label, but its features are: "
            f"{', '.join(features)}."
        )
    return keys[0], keys[1]
