"""Which features of serialized `tf.train.Example` messages are a model's input and its label, and how they are read."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data.sources import images
from hvdkit.data.sources.record_files import RecordFiles
from hvdkit.data.sources.schema import Schema
from hvdkit.data.sources.table import LABEL_NAMES, TEXT_NAMES
from hvdkit.errors import UsageError

_LABEL_NAMES = ("label", "image/class/label", "image/class/text", *LABEL_NAMES)
_RAW_SHAPE = (("height", "image/height"), ("width", "image/width"), ("depth", "channels", "image/channels"))
_LOOKED_AT = 100  # number of images whose sizes are compared


@dataclasses.dataclass(frozen=True)
class Feature:
    """A feature of the first record: the kind of its values (`bytes`, `float` or `int64`), and the values."""

    kind: str
    values: list[Any]


def features_of(path: Path, files: RecordFiles) -> dict[str, Feature]:
    """Returns the features of the first record, by name.

    Args:
        path: what messages call the data set.
        files: the training split.

    Raises:
        UsageError: there is no record, or it is no `tf.train.Example`.
    """
    first = next(files.read(0, 1).as_numpy_iterator(), None)
    if first is None:
        raise UsageError(f"{path} has no record to train on. Is its writer closed?")
    try:
        message = tf.train.Example.FromString(first)
    except Exception as error:  # protobuf's own class, of which there are several
        raise UsageError(
            f"{files.locate(0)} is no tf.train.Example ({images.first_line(error)}). Records of other forms are read "
            f"by a script of your own: hvd.data.shard(tf.data.TFRecordDataset(files).map(parse))."
        ) from None
    found = {}
    for name, feature in sorted(message.features.feature.items()):
        kind = feature.WhichOneof("kind")
        if kind:
            found[name] = Feature(kind.removesuffix("_list"), list(getattr(feature, kind).value))
    return found


def label_of(path: Path, features: Mapping[str, Feature], schema: Schema) -> str:
    """Returns the name of the feature that is the label: the one that the schema names, or one with a usual name.

    Raises:
        UsageError: there is none.
    """
    wanted = [schema.label_column] if schema.label_column else _LABEL_NAMES
    label = next((name for name in wanted if name in features), None)
    if label is None:
        missing = schema.label_column or ", ".join(_LABEL_NAMES[:4])
        raise UsageError(
            f"{path} has no feature for the label ({missing}); its features are: {', '.join(features) or 'none'}. Name "
            f"it with --label-column=NAME."
        )
    return label


@dataclasses.dataclass(frozen=True)
class Input:
    """How a record's input is read.

    Attributes:
        kind: as in `Source`.
        shape: as in `Source`.
        parse: graph function from a serialized record to the encoded input.
        decode: graph function from the encoded input to what `Source.decode` returns.
        names: names of the numbers of a vector.
    """

    kind: str
    shape: tuple[int, ...] | None
    parse: Callable[[tf.Tensor], tf.Tensor]
    decode: Callable[[tf.Tensor], tf.Tensor]
    names: Sequence[str] = ()


def input_of(
    path: Path,
    features: Mapping[str, Feature],
    label: str,
    schema: Schema,
    image_size: int | None,
    files: RecordFiles,
) -> Input:
    """Decides which features are the input.

    Unless the schema names them, that is an encoded image, or else pixels beside features that say how many, or else a
    text, or else all numbers.

    Args:
        path: what messages call the data set.
        features: the features of the first record.
        label: name of the one that is the label.
        schema: the features that the user named.
        image_size: height and width to resize images to; None to keep theirs.
        files: the training split, of which the first images are looked at.

    Raises:
        UsageError: there is no input, it is of the wrong kind, or images cannot be read or differ in size.
    """
    others = {name: feature for name, feature in features.items() if name != label}
    unknown = [name for name in (schema.text_column, *schema.feature_columns) if name and name not in others]
    if unknown:
        raise UsageError(
            f"{path} has no feature {unknown[0]!r} to learn from; its features are: {', '.join(features)}."
        )
    if schema.feature_columns:
        return _vector(path, {name: others[name] for name in schema.feature_columns})
    if schema.text_column:
        return _text(schema.text_column)
    pictures = [name for name, feature in others.items() if _is_picture(feature)]
    if pictures:
        return _picture(path, pictures[0], image_size, files)
    raw = _raw_shape(others)
    if raw:
        return _raw_picture(*raw)
    strings = [name for name, feature in others.items() if feature.kind == "bytes" and len(feature.values) == 1]
    texts = [name for name in TEXT_NAMES if name in strings] or (strings if len(strings) == 1 else [])
    if texts:
        return _text(texts[0])
    numeric = {name: feature for name, feature in others.items() if feature.kind != "bytes" and feature.values}
    if not numeric:
        raise UsageError(
            f"{path} has no feature that is an image, a text or numbers; its features are: {', '.join(features)}. Name "
            f"one with --text-column=NAME or --feature-columns=NAME,NAME."
        )
    return _vector(path, numeric)


def _text(name: str) -> Input:
    return Input("text", None, _field(name), lambda encoded: encoded)


def _field(name: str) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a graph function from a record to its one string of this name."""
    wanted = {name: tf.io.FixedLenFeature([], tf.string)}
    return lambda record: tf.io.parse_single_example(record, wanted)[name]


def _vector(path: Path, features: Mapping[str, Feature]) -> Input:
    texts = [name for name, feature in features.items() if feature.kind == "bytes"]
    if texts:
        raise UsageError(
            f"{path}: the feature {texts[0]!r} is bytes, and no numbers. Leave it out of --feature-columns."
        )
    wanted = {
        name: tf.io.FixedLenFeature([len(feature.values)], tf.int64 if feature.kind == "int64" else tf.float32)
        for name, feature in features.items()
    }
    names = [
        name if len(feature.values) == 1 else f"{name}[{place}]"
        for name, feature in features.items()
        for place in range(len(feature.values))
    ]

    def parse(record: tf.Tensor) -> tf.Tensor:
        found = tf.io.parse_single_example(record, wanted)
        vector = tf.concat([tf.cast(found[name], tf.float32) for name in wanted], axis=0)
        return tf.ensure_shape(vector, [len(names)])

    return Input("features", (len(names),), parse, lambda encoded: encoded, names)


def _is_picture(feature: Feature) -> bool:
    return feature.kind == "bytes" and len(feature.values) == 1 and images.is_encoded(feature.values[0])


def _picture(path: Path, name: str, image_size: int | None, files: RecordFiles) -> Input:
    parse, sizes, deep, index = _field(name), set(), [], 0
    try:
        for encoded in files.read(0, _LOOKED_AT).map(parse).as_numpy_iterator():
            size, pixels = images.look_at(encoded)
            sizes.add(size)
            deep += [pixels] if pixels is not None else []
            index += 1
    except (ValueError, tf.errors.OpError) as error:  # of the image, or of a record that has none
        reason = images.first_line(error)
        raise UsageError(f"{files.locate(index)}: its image cannot be read ({reason}). Repair or remove it.") from None
    if len(sizes) > 1 and not image_size:
        raise UsageError(
            f"The images of {path} differ in size, but a batch needs one size: set it, for example --image-size=224."
        )
    width, height = (image_size, image_size) if image_size else sizes.pop()
    white = images.white_of(deep)

    def decode(encoded: tf.Tensor) -> tf.Tensor:
        image = images.decode(encoded, white)
        image = images.resize(image, image_size) if image_size else image
        return tf.ensure_shape(image, [height, width, 3])

    return Input("image", (height, width, 3), parse, decode)


def _raw_shape(features: Mapping[str, Feature]) -> tuple[str, tuple[int, ...]] | None:
    """Returns the name and shape of pixels that are stored as they are, beside features that say how many."""
    shape = []
    for names in _RAW_SHAPE:
        found = next((features[name] for name in names if name in features), None)
        if found is None or found.kind != "int64" or len(found.values) != 1:
            return None
        shape.append(int(found.values[0]))
    for name, feature in features.items():
        if feature.kind == "bytes" and len(feature.values) == 1 and len(feature.values[0]) == np.prod(shape):
            return name, tuple(shape)
    return None


def _raw_picture(name: str, shape: tuple[int, ...]) -> Input:
    return Input("image", shape, _field(name), lambda encoded: tf.reshape(tf.io.decode_raw(encoded, tf.uint8), shape))
