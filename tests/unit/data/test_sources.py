import numpy as np
import pytest
import tensorflow as tf

from hvdkit.data import pipeline
from hvdkit.data.sources import folder, open_source
from hvdkit.data.sources.folder import resize
from hvdkit.data.vocabulary import Vocabulary, learn_tokens, standardize
from hvdkit.errors import UsageError


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
            image = tf.io.encode_png(np.full([*size, 3], 10 * i, np.uint8))
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


def test_an_image_that_cannot_be_read_is_located(tmp_path):
    write_images(tmp_path, "train", ["cat", "dog"], count=8)
    write_images(tmp_path, "test", ["cat", "dog"], count=1)
    broken = tmp_path / "train" / "dog" / "7.png"
    broken.write_bytes(broken.read_bytes()[:60])
    source = open_source(str(tmp_path), image_size=4)
    with pytest.raises(UsageError, match=r"An example of split 'train', between number 0 and 16, cannot be read"):
        pipeline.read_share(source, "train", 0, 1, cache_bytes=1e9)


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


def test_a_table_with_a_test_file_beside_it(tmp_path):
    write(tmp_path / "test.tsv", "label\treview\n10\tfine\n")
    source = open_source(write(tmp_path / "train.tsv", "label\treview\n2\tone\n10\ttwo\n"))
    assert source.label_names == ["2", "10"]  # numbers in the order of numbers
    assert (source.size("train"), first(source, "test")) == (2, (b"fine", 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", r"needs a header line with a text column .* but its first line is: a,b"),
        ("text,label\nfine,\n", r"line 2: the text or the label is empty"),
        ("text,label\n", "has a header line but no rows"),
        ("text,label\nfine,pos\n", r"one class only \('pos'\)"),
    ],
)
def test_tables_that_are_not_what_they_should_be(tmp_path, content, message):
    with pytest.raises(UsageError, match=message):
        open_source(write(tmp_path / "x.csv", content))


def test_a_spreadsheets_byte_order_mark_and_another_encoding(tmp_path):
    rows = "text,label\ncaf\u00e9,a\nbar,b\nclub,a\npub,b\n"
    assert open_source(write(tmp_path / "bom.csv", rows, "utf-8-sig")).label_names == ["a", "b"]
    with pytest.raises(UsageError, match=r"is not UTF-8 text \(at byte 14\)"):
        open_source(write(tmp_path / "latin.csv", rows, "latin-1"))


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
