import json
from pathlib import Path

import keras
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import tensorflow as tf
from PIL import Image

from hvdkit.data import balance, checks, pipeline
from hvdkit.data.sources import Schema, folder, open_source
from hvdkit.data.sources.images import resize
from hvdkit.data.vocabulary import Vocabulary, learn_tokens, standardize
from hvdkit.errors import UnreadableExampleError, UsageError


def first(source, split="train"):
    encoded, label = next(iter(source.read(split, 0, 1)))
    return source.decode(encoded).numpy(), int(label)


def test_digits_are_real_and_split_the_same_way_each_time():
    source = open_source("digits")
    assert (source.kind, source.shape, source.size("train"), source.size("test")) == ("image", (8, 8, 1), 1437, 360)
    image, label = first(source)
    assert image.dtype == np.uint8
    assert image.max() == 255
    again, same = first(open_source("digits"))
    assert (image == again).all()
    assert label == same


def test_synthetic_has_any_shape():
    source = open_source("synthetic:6x5x3:7:50")
    assert (source.shape, len(source.label_names), source.size("train"), source.size("test")) == ((6, 5, 3), 7, 50, 10)
    assert first(source)[0].shape == (6, 5, 3)
    with pytest.raises(UsageError, match="not of the form synthetic:HEIGHTxWIDTHxCHANNELS"):
        open_source("synthetic:6by5")


def test_synthetic_images_have_zeros_and_can_be_told_apart():
    source = open_source("synthetic:12x12x1:3:1500")
    (train, test), (labels, wanted) = zip(
        *(
            source.read(split, 0, 300 if split == "test" else 1500).batch(1500).get_single_element()
            for split in ("train", "test")
        ),
        strict=True,
    )
    flat, asked = (tf.reshape(tf.cast(images, tf.float32), [len(images), -1]).numpy() for images in (train, test))
    assert 0.4 < (flat == 0).mean() < 0.7
    nearest = ((asked[:, np.newaxis] - flat) ** 2).sum(axis=-1).argmin(axis=1)
    assert 0.7 < (labels.numpy()[nearest] == wanted.numpy()).mean() < 0.97, "a tenth of the labels is random"


def write_images(root, split, classes, size=(4, 4), count=2):
    for name in classes:
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            image = tf.io.encode_png(np.full([*size, 3], 10 * i % 256, np.uint8))
            tf.io.write_file(str(root / split / name / f"{i}.png"), image)


def test_class_folders_named_like_patterns_are_what_they_are(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path, split, ["[ab]", "a", "b", "c*", "cat"])
    source = open_source(str(tmp_path))
    assert source.label_names == ["[ab]", "a", "b", "c*", "cat"]
    for split in ("train", "test"):
        paths, labels = folder._files(tmp_path / split, source.label_names)
        assert [path.split("/")[-2] for path in paths] == [source.label_names[label] for label in labels]
        assert source.size(split) == len(paths) == 10


def test_a_folder_of_images(tmp_path):
    write_images(tmp_path, "train", ["cat", "dog"], count=3)
    assert open_source(str(tmp_path)).shape == (4, 4, 3)
    write_images(tmp_path, "test", ["cat", "dog"], size=(9, 7), count=1)
    with pytest.raises(UsageError, match="differ in size, but a batch needs one size: .* --image-size"):
        open_source(str(tmp_path))
    source = open_source(str(tmp_path), image_size=5)
    assert (source.label_names, source.size("train"), source.size("test")) == (["cat", "dog"], 6, 2)
    assert first(source, "test")[0].shape == (5, 5, 3)
    share = pipeline.read_share(source, "train", 1, 2, cache_bytes=1e9)
    assert share.inputs.shape == (3, 5, 5, 3)


def test_a_resized_image_has_the_mean_of_its_pixels():
    stripes = np.tile(np.array([0, 0, 0, 200], np.uint8), [16, 4])[..., np.newaxis]
    small = resize(tf.constant(stripes), 2)
    assert small.dtype == tf.uint8
    assert small.numpy().astype(float).ravel() == pytest.approx([50] * 4, abs=8), "no single pixels are picked"
    white = tf.fill([7, 5, 3], tf.constant(255, tf.uint8))
    assert (resize(white, 4).numpy() == 255).all()


def save_image(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    write_images(tmp_path, "train", ["cat", "dog"], count=120)
    write_images(tmp_path, "test", ["cat", "dog"], count=1)
    source = open_source(str(tmp_path))
    for file in source._splits["train"][0][-2:]:  # not among those whose sizes are compared
        Path(file).write_bytes(Path(file).read_bytes()[:60])
    named = [Path(file).name for file in source._splits["train"][0][-2:]]
    with pytest.raises(
        UsageError, match=r"2 example\(s\) of split 'train' cannot be read: .*; .*Repair or remove"
    ) as said:
        pipeline.read_share(source, "train", 0, 1, cache_bytes=1e9)
    assert all(f"{name} (" in str(said.value) for name in named), said.value
    streamed = pipeline.read_share(source, "train", 1, 2, cache_bytes=0)
    with pytest.raises(UsageError, match="2 example.s. of split 'train' cannot be read"):
        checks.check_share(streamed, "train", 2)
    Path(source._splits["train"][0][0]).write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"1 image.s. of .* cannot be read: .* \(it is no image that Pillow knows\)"):
        open_source(str(tmp_path))


def test_an_image_that_breaks_in_the_middle_of_a_training_is_named(tmp_path):
    write_images(tmp_path, "train", ["cat", "dog"], count=12)
    write_images(tmp_path, "test", ["cat", "dog"], count=1)
    source = open_source(str(tmp_path))
    share = pipeline.read_share(source, "train", 0, 1, cache_bytes=0)
    batches = pipeline.training_batches(
        [share], local_batch=4, steps_per_epoch=6, seed=1, sampling=balance.Sampling("none", np.array([12, 12]))
    )
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pipeline.naming_unreadable([share]):
        model.fit(batches, epochs=1, steps_per_epoch=6, verbose=0)
    file = Path(source.locate("train", 17))
    file.write_bytes(file.read_bytes()[:60])
    with (
        pytest.raises(UnreadableExampleError, match=rf"1 example.s. of split 'train' cannot be read: {file} \("),
        pipeline.naming_unreadable([share]),
    ):
        model.fit(batches, epochs=2, steps_per_epoch=6, verbose=0)
    with pytest.raises(tf.errors.InvalidArgumentError), pipeline.naming_unreadable([share]):
        tf.debugging.assert_equal(1, 2)  # of the model, and not of the data


def test_image_folders_as_people_have_them(tmp_path, caplog):
    grey = np.full([6, 6, 3], 120, np.uint8)
    for name in ("cat", "dog"):
        save_image(tmp_path / name / "a.webp", grey, lossless=True)
        save_image(tmp_path / name / "more" / "b.tiff", grey)
        save_image(tmp_path / name / "more" / "deep" / "c.PNG", grey)
        (tmp_path / name / "._a.webp").write_bytes(b"\x00\x05\x16\x07" + bytes(40))
        (tmp_path / name / "Thumbs.db").write_bytes(b"x")
        save_image(tmp_path / name / ".ipynb_checkpoints" / "d.png", grey)
    (tmp_path / "__MACOSX" / "cat").mkdir(parents=True)
    source = open_source(str(tmp_path))
    assert (source.label_names, source.size("train") + source.size("test")) == (["cat", "dog"], 6)
    assert "2 file(s) are no images and left out: 2 .db, such as cat/Thumbs.db" in caplog.text
    for split in ("train", "test"):
        for encoded, _ in source.read(split, 0, source.size(split)):
            assert (source.decode(encoded).numpy() == 120).all()
    save_image(tmp_path / "e.png", grey)
    with pytest.raises(UsageError, match=r"1 image\(s\) in no class's folder, such as e.png"):
        open_source(str(tmp_path))


def test_a_validation_folder_is_the_test_split_if_there_is_no_other(tmp_path):
    write_images(tmp_path, "train", ["cat", "dog"])
    write_images(tmp_path, "val", ["cat", "dog"], count=5)
    source = open_source(str(tmp_path))
    assert (source.splits, source.size("test")) == (("train", "test"), 10)
    write_images(tmp_path, "test", ["cat", "dog"], count=1)
    source = open_source(str(tmp_path))
    assert (source.splits, source.size("test"), source.size("validation")) == (("train", "test", "validation"), 2, 10)


def test_folders_named_like_splits_are_no_classes(tmp_path):
    write_images(tmp_path, "Train", ["cat", "dog"])
    write_images(tmp_path, "Test", ["cat", "dog"])
    with pytest.raises(UsageError, match="has the folders Test, Train, which look like splits and not like classes"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize(("largest", "white"), [(4095, 4095), (700, 1023), (65_535, 65_535)])
def test_images_of_16_bits_are_scaled_by_what_they_hold(tmp_path, suffix, largest, white):
    pixels = np.full([4, 4], largest // 2, np.uint16)
    pixels[0, 0] = largest
    for name in ("cat", "dog"):
        for number in range(2):
            save_image(tmp_path / name / f"{number}.{suffix}", pixels)
    image, _ = first(open_source(str(tmp_path)))
    assert image.shape == (4, 4, 3)
    assert image[0, 0].tolist() == [round(largest * 255 / white)] * 3
    assert image[1, 1].tolist() == [round(largest // 2 * 255 / white)] * 3


def test_16_bits_a_channel_in_color_and_values_that_do_not_fit(tmp_path):
    colors = np.array([[[4000, 2000, 1000]]], np.uint16)
    for name in ("cat", "dog"):
        for number in range(2):
            file = tmp_path / name / f"{number}.png"
            tf.io.write_file(str(file), tf.io.encode_png(colors))
    source = open_source(str(tmp_path))
    assert first(source)[0].ravel().tolist() == [249, 125, 62]
    brighter = tf.io.encode_png(colors * 4)
    with pytest.raises(tf.errors.InvalidArgumentError, match="values above 4095, the largest that the first images"):
        source.decode(brighter)


def test_all_modes_of_images_become_three_channels(tmp_path):
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        suffixes = (
            ("tiff", "jpg") if mode == "CMYK" else ("png", "tiff") if mode in ("1", "LA") else ("png", "webp", "gif")
        )
        for suffix in suffixes:
            image = Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode)
            (tmp_path / mode).mkdir(exist_ok=True)
            image.save(tmp_path / mode / f"x.{suffix}")
    source = open_source(str(tmp_path))
    for split in ("train", "test"):
        for index, (encoded, _) in enumerate(source.read(split, 0, source.size(split))):
            pixels = source.decode(encoded).numpy()
            assert (pixels.shape, pixels.min()) == ((4, 5, 3), 255), source.locate(split, index)


def test_few_examples_of_many_classes_are_split_all_the_same(tmp_path):
    write_images(tmp_path, "train", ["a", "b", "c"], count=3)
    source = open_source(str(tmp_path))
    assert (source.size("train"), source.size("test")) == (7, 2)


def test_folders_that_are_not_what_they_should_be(tmp_path):
    with pytest.raises(UsageError, match="is neither a prepared TFDS directory nor a folder of images"):
        open_source(str(tmp_path))
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UsageError, match="no images in cat .* Fill the folder"):
        open_source(str(tmp_path))
    with pytest.raises(UsageError, match=r"/no/such/path does not exist\. Give the path"):
        open_source("/no/such/path")


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return str(path)


def test_a_table_of_texts(tmp_path):
    rows = "".join(f'"Good, film {i}",pos\nBad film {i},neg\n' for i in range(10))
    source = open_source(write(tmp_path / "reviews.csv", "text,label\n" + rows))
    assert (source.kind, source.label_names, source.size("train"), source.size("test")) == (
        "text",
        ["neg", "pos"],
        16,
        4,
    )
    text, label = first(source)
    assert (b"Good" in text) == (label == 1)


ROWS = {"text": [f"good, number {i}" if i % 2 else f"bad {i}" for i in range(10)], "label": ["neg", "pos"] * 5}


def write_json_lines(path):
    rows = [{"id": i, "text": text, "label": label} for i, (text, label) in enumerate(zip(*ROWS.values(), strict=True))]
    write(path, "\n".join(map(json.dumps, rows)) + "\n\n")


def write_stream(path):
    table = pyarrow.table(ROWS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("name", "write_table"),
    [
        ("x.jsonl", write_json_lines),
        ("x.parquet", lambda path: pyarrow.parquet.write_table(pyarrow.table(ROWS), path, row_group_size=3)),
        ("x.feather", lambda path: pyarrow.feather.write_feather(pyarrow.table(ROWS), path)),
        ("x.arrow", write_stream),
    ],
)
def test_tables_in_other_formats(tmp_path, name, write_table):
    write_table(tmp_path / name)
    source = open_source(str(tmp_path / name))
    assert (source.kind, source.label_names, source.size("train"), source.size("test")) == (
        "text",
        ["neg", "pos"],
        8,
        2,
    )
    examples = [source.read(split, 0, source.size(split)).as_numpy_iterator() for split in ("train", "test")]
    found = {text.decode(): source.label_names[label] for split in examples for text, label in split}
    assert found == dict(zip(ROWS["text"], ROWS["label"], strict=True))
    if name != "x.jsonl":
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:90])
        with pytest.raises(UsageError, match=r"cannot be read as (Parquet|Arrow) \(.*Is it complete"):
            open_source(str(tmp_path / name))


def test_a_folder_that_hugging_face_s_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = {"text": ROWS["text"], "label": [0, 1] * 5}
    whole = datasets.Dataset.from_dict(rows, features=features)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(tmp_path / "two")
    assert open_source(str(tmp_path / "one")).label_names == ["neg", "pos"]
    both = open_source(str(tmp_path / "two"))
    assert (both.size("train"), both.size("test"), first(both, "test")) == (10, 1, (b"good, number 1", 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": 1}\n{"text": ', "line 2 is not JSON"),
        ('["a", 1]', 'line 1 is a list, but must be an object: {"text": ...}'),
        ('{"text": ["a"], "label": 1}', "line 1: text is a list, but must be a text or a number"),
        ('{"text": "a"}', "needs a text column .* but it begins with: {.text.: .a.}"),
        ('{"text": "a", "label": 1}\n{"text": null, "label": 2}', "line 2: the text or the label is empty"),
    ],
)
def test_json_lines_that_are_not_what_they_should_be(tmp_path, content, message):
    with pytest.raises(UsageError, match=message):
        open_source(write(tmp_path / "x.jsonl", content))


def test_a_table_with_a_test_file_beside_it(tmp_path):
    write(tmp_path / "test.tsv", "label\treview\n10\tfine\n")
    source = open_source(write(tmp_path / "train.tsv", "label\treview\n2\tone\n10\ttwo\n"))
    assert source.label_names == ["2", "10"]  # numbers in the order of numbers
    assert (source.size("train"), first(source, "test")) == (2, (b"fine", 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", r"needs a text column .* but it begins with: a,b"),
        ("text,label\nfine,\n", r"line 2: the text or the label is empty"),
        ("text,label\nfine, really,pos\ngood,pos\nbad\n", r"2 row\(s\) .* header's 2: line 2 has 3, line 4 has 1\."),
        ('text,label\n"two\nlines",pos\n\na,b,c\n', r"line 5 has 3"),
        (
            "text,label\n" + "".join(f"a,{i / 7:.3f}\n" for i in range(9)),
            r"are measured values, such as 0.000",
        ),
        ("text,label\n" + "".join(f"pos,text {i}\n" for i in range(30)), r"30 different labels in 30 rows, such as "),
        ("text,label\n", "has names of columns but no rows"),
        ("text,label\nfine,pos\n", r"one class only \('pos'\)"),
    ],
)
def test_tables_that_are_not_what_they_should_be(tmp_path, content, message):
    with pytest.raises(UsageError, match=message):
        open_source(write(tmp_path / "x.csv", content))


def test_a_spreadsheets_byte_order_mark_and_other_encodings(tmp_path):
    rows = "text,label\ncaf\u00e9,a\nbar,b\nclub,a\npub,b\n"
    assert open_source(write(tmp_path / "bom.csv", rows, "utf-8-sig")).label_names == ["a", "b"]
    assert open_source(write(tmp_path / "wide.csv", rows, "utf-16")).label_names == ["a", "b"]
    with pytest.raises(
        UsageError, match=r"is not UTF-8 text \(at byte 14\)\. Name its encoding, such as --encoding=cp1252"
    ):
        open_source(write(tmp_path / "latin.csv", rows, "latin-1"))
    found = open_source(str(tmp_path / "latin.csv"), schema=Schema(encoding="latin-1"))
    texts = [x.decode() for split in found.splits for x, _ in found.read(split, 0, 4).as_numpy_iterator()]
    assert sorted(texts) == ["bar", "caf\u00e9", "club", "pub"]
    with pytest.raises(UsageError, match=r"is not cp932 text .at byte 14."):
        open_source(str(tmp_path / "latin.csv"), schema=Schema(encoding="cp932"))
    with pytest.raises(UsageError, match=r"--encoding=latin-99 is unknown\. Give a name that Python knows"):
        open_source(str(tmp_path / "latin.csv"), schema=Schema(encoding="latin-99"))


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters_and_fields_as_long_as_books(tmp_path, delimiter):
    book = "a long good film " * 20_000
    rows = "".join(f'"good, number {i}"{delimiter}pos\nbad{delimiter}neg\n' for i in range(5))
    source = open_source(write(tmp_path / "x.csv", f"text{delimiter}label\n{rows}{book}{delimiter}pos\n"))
    splits = [source.read(split, 0, source.size(split)).as_numpy_iterator() for split in ("train", "test")]
    texts = [text.decode() for split in splits for text, _ in split]
    assert len(texts) == 11
    assert {"good, number 3", "bad", book} < set(texts)


def test_names_choose_versions_and_configurations(shared_data, tmp_path):
    assert open_source("mnist:3.0.1", str(shared_data)).name == "mnist"
    with pytest.raises(UsageError, match="'mnist:9.9.9' is not in"):
        open_source("mnist:9.9.9", str(shared_data))
    for version in ("one/1.0.0", "two/1.0.0"):
        (tmp_path / "thing" / version).mkdir(parents=True)
        (tmp_path / "thing" / version / "dataset_info.json").touch()
    with pytest.raises(UsageError, match="several configurations of thing: choose one of thing/one, thing/two"):
        open_source("thing", str(tmp_path))


def test_a_download_that_fails_is_a_sentence(tmp_path):
    with pytest.raises(UsageError, match="knows no data set 'no_such_set'"):
        open_source("no_such_set", str(tmp_path), download=True)


def test_a_dataset_that_is_not_there_is_not_downloaded(tmp_path):
    with pytest.raises(UsageError, match=r"'mnist' is not in .* \(found: none\).*--download"):
        open_source("mnist", str(tmp_path))


def test_prepared_tfds_directories(shared_data):
    by_name = open_source("mnist", str(shared_data))
    assert (by_name.shape, by_name.size("train"), by_name.size("test")) == ((28, 28, 1), 60_000, 10_000)
    encoded, _ = next(iter(by_name.read("train", 59_999, 60_000)))
    assert encoded.dtype == tf.string, "images stay encoded until they are needed"
    (path,) = (shared_data / "sentence_polarity").iterdir()
    text = open_source(str(path))
    assert (text.kind, text.name, len(text.label_names)) == ("text", "sentence_polarity", 2)


def test_texts_become_tokens(tmp_path):
    source = open_source(write(tmp_path / "train.csv", "text,label\nthe film the film the,0\n\"Don't! A 'film'?\",1\n"))
    write(tmp_path / "test.csv", "text,label\nx,0\n")
    cleaned = standardize(tf.constant("Don't! A well-made 'film'?")).numpy().decode().split()
    assert cleaned == ["don't", "!", "a", "well", "made", "film", "?"]
    tokens = learn_tokens(open_source(str(tmp_path / "train.csv")), 100)
    assert tokens[:2] == ["the", "film"] or tokens[:2] == ["film", "the"]
    assert "x" not in tokens, "the vocabulary comes from the train split alone"
    vocabulary = Vocabulary(["the", "film"], 4)
    assert vocabulary.encode(tf.constant("The unknown film")).numpy().tolist() == [2, 1, 3, 0]
    vocabulary.save(tmp_path / "vocabulary.txt")
    assert (tmp_path / "vocabulary.txt").read_text() == "the\nfilm\n"
    assert source.size("train") > 0


def test_classes_that_only_the_test_split_has_are_refused(tmp_path):
    write(tmp_path / "test.csv", "text,label\nx,c\n")
    with pytest.raises(UsageError, match=r"test\.csv has classes that train\.csv lacks: c"):
        open_source(write(tmp_path / "train.csv", "text,label\nx,a\ny,b\n"))
    write_images(tmp_path, "train", ["cat"])
    write_images(tmp_path, "test", ["cow"])
    with pytest.raises(UsageError, match="test has classes that train lacks: cow"):
        open_source(str(tmp_path))
