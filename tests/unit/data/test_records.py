"""TFRecord and ArrayRecord files, as the libraries that people use write them."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from hvdkit.data import pipeline
from hvdkit.data.sources import Schema, open_source
from hvdkit.errors import UsageError


def example(**features):
    """A serialized `tf.train.Example` of lists of numbers, strings or bytes."""
    found = {}
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        name = name.replace("__", "/")
        if isinstance(values[0], (bytes, str)):
            encoded = [v.encode() if isinstance(v, str) else v for v in values]
            found[name] = tf.train.Feature(bytes_list=tf.train.BytesList(value=encoded))
        elif isinstance(values[0], float):
            found[name] = tf.train.Feature(float_list=tf.train.FloatList(value=values))
        else:
            found[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=values))
    return tf.train.Example(features=tf.train.Features(feature=found)).SerializeToString()


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    if "array_record" in path.name:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
    else:
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in records:
                writer.write(record)
    return path


def read(source, split):
    return [(source.decode(x).numpy(), y.numpy()) for x, y in source.read(split, 0, source.size(split))]


def png(value, size=(5, 4)):
    content = io.BytesIO()
    Image.fromarray(np.full([*size, 3], value, np.uint8)).save(content, "png")
    return content.getvalue()


@pytest.mark.parametrize("suffix", ["tfrecord", "array_record"])
def test_images_in_shards_are_read_by_any_range(tmp_path, suffix):
    images = [example(image__encoded=png(n), image__class__label=n % 3) for n in range(24)]
    for shard, (start, stop) in enumerate(((0, 7), (7, 8), (8, 20))):
        write(tmp_path / f"train-0000{shard}-of-00003.{suffix}", images[start:stop])
    write(tmp_path / f"validation-00000-of-00001.{suffix}", images[20:])
    source = open_source(str(tmp_path))
    assert (source.kind, source.task, source.shape, source.label_names) == (
        "image",
        "classification",
        (5, 4, 3),
        ["0", "1", "2"],
    )
    assert (source.splits, source.size("train"), source.size("test")) == (("train", "test"), 20, 4)
    for start, stop in ((0, 20), (3, 9), (7, 8), (19, 20), (5, 5)):
        found = [(int(source.decode(x)[0, 0, 0]), int(y)) for x, y in source.read("train", start, stop)]
        assert found == [(n, n % 3) for n in range(start, stop)]
    assert source.locate("train", 8).endswith(f"train-00002-of-00003.{suffix}, record 0")
    shares = [pipeline.read_share(source, "train", share, 3, cache_bytes=1e9) for share in range(3)]
    assert np.concatenate([share.inputs[:, 0, 0, 0] for share in shares]).tolist() == list(range(20))


def test_pixels_without_an_encoding(tmp_path):
    pixels = [np.full([3, 2, 1], n, np.uint8) for n in range(10)]
    rows = [example(image_raw=p.tobytes(), height=3, width=2, depth=1, label=n % 2) for n, p in enumerate(pixels)]
    source = open_source(str(write(tmp_path / "digits.tfrecord", rows)))
    assert (source.kind, source.shape) == ("image", (3, 2, 1))
    assert (source.size("train"), source.size("test")) == (8, 2)
    again = open_source(str(tmp_path / "digits.tfrecord"))
    for split in ("train", "test"):
        values = [int(image[0, 0, 0]) for image, _ in read(source, split)]
        assert values == [int(image[0, 0, 0]) for image, _ in read(again, split)], "the same examples in every run"
        assert [label for _, label in read(source, split)] == [value % 2 for value in values]


def test_texts_numbers_values_and_several_labels(tmp_path):
    texts = [example(sentence=f"film {n}", label=["good", "bad"][n % 2]) for n in range(10)]
    source = open_source(str(write(tmp_path / "texts.tfrecord", texts)))
    assert (source.kind, source.label_names) == ("text", ["bad", "good"])
    assert read(source, "train")[0][0].startswith(b"film ")

    rows = [example(size=float(n), ages=[n, 2 * n], price=n / 2, kind=n % 2) for n in range(10)]
    path = str(write(tmp_path / "rows.tfrecord", rows))
    source = open_source(path, schema=Schema(label_column="kind", feature_columns=("size", "ages")))
    assert (source.kind, source.feature_names, source.shape) == ("features", ["size", "ages[0]", "ages[1]"], (3,))
    assert all(x.tolist() == [x[0], x[0], 2 * x[0]] and y == x[0] % 2 for x, y in read(source, "train"))
    source = open_source(path, schema=Schema("regression", label_column="price"))
    assert (source.task, source.feature_names) == ("regression", ["ages[0]", "ages[1]", "kind", "size"])
    assert all(y.tolist() == [x[3] / 2] for x, y in read(source, "test"))
    with pytest.raises(UsageError, match="measured values, such as 0.0"):
        open_source(path, schema=Schema(label_column="price"))

    tagged = [example(text=f"t{n}", tags=["even", "low"] if n % 2 == 0 else ["low"]) for n in range(10)]
    source = open_source(str(write(tmp_path / "tags.tfrecord", tagged)), schema=Schema("multilabel"))
    assert (source.task, source.label_names) == ("multilabel", ["even", "low"])
    assert {tuple(y) for _, y in read(source, "train")} == {(0, 1), (1, 1)}


def test_what_cannot_be_read_is_a_sentence(tmp_path):
    good = [example(text=f"t{n}", label=n % 2) for n in range(10)]
    broken = write(tmp_path / "broken.tfrecord", good)
    broken.write_bytes(broken.read_bytes()[:-5])
    changed = write(tmp_path / "changed.tfrecord", good)
    content = bytearray(changed.read_bytes())
    content[-10] ^= 1
    changed.write_bytes(content)
    (tmp_path / "text.tfrecord").write_text("text,label\n")
    (tmp_path / "empty.tfrecord").write_bytes(b"")
    (tmp_path / "a.array_record").write_bytes(b"nothing")
    write(tmp_path / "numbers.tfrecord", [b"\x01\x02"] * 4)
    write(tmp_path / "unlabelled.tfrecord", [example(text="a", size=1)] * 4)
    write(tmp_path / "mixed.tfrecord", [*good, example(text="a", label="b")])
    write(tmp_path / "single.tfrecord", [example(text="a", label=1.0)])
    write(tmp_path / "both" / "train.tfrecord", good)
    write(tmp_path / "both" / "more.tfrecord", good)
    for name, message in {
        "broken.tfrecord": "record 9 is not complete",
        "changed.tfrecord": r"changed.tfrecord, record 9 cannot be read .*damaged",
        "text.tfrecord": "no TFRecord file: record 0 is not complete",
        "empty.tfrecord": "has no record to train on",
        "a.array_record": "cannot be read as ArrayRecord",
        "numbers.tfrecord": r"record 0 is no tf.train.Example .*hvd.data.shard",
        "unlabelled.tfrecord": r"no feature for the label \(label, .*\); its features are: size, text",
        "mixed.tfrecord": "record 10 cannot be read .* of another kind than the first record's",
        "both": r"not clear to which split more.tfrecord",
        "nowhere.tfrecord": "nowhere.tfrecord does not exist",
        "nowhere/train.tfrecord": "train.tfrecord does not exist",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_source(str(tmp_path / name))
    with pytest.raises(UsageError, match="1 record.s., too few for a train and a test part"):
        open_source(str(tmp_path / "single.tfrecord"), schema=Schema("regression"))


def test_images_that_differ_or_are_damaged(tmp_path):
    sizes = write(tmp_path / "sizes.tfrecord", [example(image=png(n, (4 + n, 4)), label=n % 2) for n in range(10)])
    with pytest.raises(UsageError, match="differ in size.*--image-size=224"):
        open_source(str(sizes))
    source = open_source(str(sizes), image_size=3)
    assert {image.shape for image, _ in read(source, "train")} == {(3, 3, 3)}
    records = [example(image=png(n)[: 40 if n == 5 else None], label=n % 2) for n in range(10)]
    with pytest.raises(UsageError, match=r"damaged.tfrecord, record 5: its image cannot be read"):
        open_source(str(write(tmp_path / "damaged.tfrecord", records)))
    records[5] = example(label=1)
    with pytest.raises(UsageError, match=r"lacking.tfrecord, record 5: its image cannot be read"):
        open_source(str(write(tmp_path / "lacking.tfrecord", records)))


def test_files_that_tfds_wrote_are_read_without_its_description(shared_data, tmp_path):
    for file in (shared_data / "mnist").rglob("*.tfrecord*"):
        (tmp_path / file.name).symlink_to(file)
    source = open_source(str(tmp_path))
    assert (source.size("train"), source.size("test"), len(source.label_names)) == (60_000, 10_000, 10)
    described = open_source("mnist", str(shared_data))
    for ours, theirs in zip(read_some(source), read_some(described), strict=True):
        assert ours[1] == theirs[1]
        np.testing.assert_array_equal(ours[0][..., :1], theirs[0])


def read_some(source):
    return [(source.decode(x).numpy(), int(y)) for x, y in source.read("train", 59_990, 60_000)]
