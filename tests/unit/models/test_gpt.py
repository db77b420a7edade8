"""Text in windows, the model that predicts the next byte, and what it writes."""

import dataclasses
import itertools
import sys

import hvdkit_models
import keras
import numpy as np
import pytest
import tensorflow as tf
from hvdkit_models.recipe import Recipe

from hvdkit import generate
from hvdkit.data import balance, checks, pipeline
from hvdkit.data.sources import TokenSource, open_source
from hvdkit.errors import UsageError
from hvdkit.train import data, flags
from hvdkit.train.build import check_output
from hvdkit.train.settings import resolve
from tests.conftest import run_command

TEXT = bytes(range(65, 91)) * 4  # A to Z, so that each byte tells what comes next


def tiny(length=8, **sizes):
    keras.utils.set_random_seed(0)
    return hvdkit_models.load("gpt").build(length, **{"width": 16, "depth": 2, "heads": 2, **sizes})


def windows(source, split="train"):
    return [(source.decode(x).numpy(), y.numpy()) for x, y in source.read(split, 0, source.size(split))]


def test_windows_are_cut_right():
    source = TokenSource("letters", {"train": TEXT[:26], "test": TEXT[:9]}, 8)
    assert (source.kind, source.size("train"), source.size("test"), source.label_names) == ("tokens", 3, 1, [])
    inputs, labels = (np.stack(part) for part in zip(*windows(source), strict=True))
    assert inputs.dtype == labels.dtype == np.int32
    assert bytes(inputs.ravel().tolist()) == TEXT[:24]
    assert bytes(labels.ravel().tolist()) == TEXT[1:25], "each byte's label is the next one, over windows' ends too"
    assert source.cut(5).size("train") == 5
    with pytest.raises(
        UsageError, match="The test part of letters has 9 bytes, and a window of 9 needs 10. Give a lon"
    ):
        source.cut(9)


@pytest.mark.parametrize("limit", [1e9, 0], ids=["in memory", "read again each epoch"])
def test_each_rank_has_its_share_in_another_order_each_epoch(limit):
    text = np.random.default_rng(0).integers(256, size=321, dtype=np.uint8).tobytes()
    source = TokenSource("noise", {"train": text, "test": text}, 8)
    seen = []
    for share in range(2):
        part = pipeline.read_share(source, "train", share, 2, cache_bytes=limit)
        counts = checks.check_share(part, "train", 0)
        assert counts.tolist() == [20]
        batches = pipeline.training_batches(
            [part], local_batch=4, steps_per_epoch=5, seed=0, sampling=balance.Sampling("none", counts)
        )
        taken = [(x.numpy(), y.numpy()) for x, y in itertools.islice(batches, 10)]
        assert all((x[:, 1:] == y[:, :-1]).all() and x.dtype == np.int32 for x, y in taken)
        epochs = [[window.tobytes() for x, _ in taken[start : start + 5] for window in x] for start in (0, 5)]
        assert sorted(epochs[0]) == sorted(epochs[1])
        assert epochs[0] != epochs[1]
        seen += epochs[0]
    assert sorted(seen) == sorted(x.tobytes() for x, _ in windows(source)), "all windows, once"


def test_texts_of_a_file_and_a_folder(tmp_path):
    (tmp_path / "b.txt").write_bytes(TEXT[:50])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "first.md").write_bytes(TEXT[50:99] + b"\n")
    (tmp_path / "a" / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").write_bytes(TEXT)
    one = open_source(f"text:{tmp_path}/b.txt").cut(4)
    assert (one.name, one.length("train"), one.length("test")) == ("b.txt", 46, 5), "a line's end is added"
    both = open_source(f"text:{tmp_path}").cut(4)
    assert both.length("train") + both.length("test") == 101
    assert bytes(windows(both)[0][0].tolist()) == TEXT[50:54], "files in the order of their names"
    assert bytes(windows(both, "test")[0][0].tolist()) == TEXT[41:45], "the end is held out"
    for name, message in {
        "text:/no/such": "text:/no/such names no file or folder that exists",
        "text:missing.txt": "text:missing.txt names no file",
        "text:": "names no file or folder",
        f"text:{tmp_path}/a/picture.png": r"There is no text in .*: of 1 file\(s\), 1 are not text",
        "text:nothing_by_that_name": "'nothing_by_that_name' is not in",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_source(name, str(tmp_path))


def test_the_embedded_text_has_no_paragraph_twice():
    source = open_source("pydoc")
    train, test = (source._texts[split].decode().split("\n\n") for split in ("train", "test"))
    assert len(train) > 1000
    assert len(set(train) & set(test)) == 0, "otherwise the test split was trained on"
    assert source.length("test") == pytest.approx(source.length("train") / 9, rel=1e-3)


def test_texts_of_a_prepared_data_set(shared_data):
    named = open_source("text:sentence_polarity", str(shared_data))
    (path,) = (shared_data / "sentence_polarity").iterdir()
    by_path = open_source(f"text:{path}")
    assert named.name == by_path.name == "sentence_polarity"
    assert named.length("train") == by_path.length("train") > 500_000
    with pytest.raises(UsageError, match="'mnist' has no text to predict; its features are: image, label"):
        open_source("text:mnist", str(shared_data))


@pytest.mark.parametrize(("flag", "value"), [("sampling", "over"), ("class_weights", True)])
def test_there_are_no_classes_to_balance(flag, value):
    source = TokenSource("letters", {"train": TEXT, "test": TEXT})
    settings = resolve(flags.parse(["train"]), Recipe(sequence_length=8), 1)
    assert data.prepared(source, settings).sequence_length == 8
    with pytest.raises(
        UsageError, match=f"^--{flag.replace('_', '-')}.* balances classes, and the windows of letters have none"
    ):
        data.prepared(source, dataclasses.replace(settings, **{flag: value}))


def test_no_place_sees_a_later_one():
    model = tiny()
    tokens = np.random.default_rng(0).integers(256, size=[2, 8])
    changed = tokens.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 256
    before, after = (model(t).numpy() for t in (tokens, changed))
    assert (before[:, :5] == after[:, :5]).all()
    assert (np.abs(before[:, 5:] - after[:, 5:]).max(axis=(0, 2)) > 1e-4).all(), "and each place sees all earlier ones"


def test_layers_and_sizes_are_those_that_splitting_counts_on():
    model = tiny(dropout=0.1)
    names = [layer.name for layer in model.layers]
    assert [n for n in names if "block1" in n] == [
        "block1_attention_norm",
        "block1_attention",
        "block1_attention_dropout",
        "block1_attention_add",
        "block1_mlp_norm",
        "block1_mlp_up",
        "block1_mlp_down",
        "block1_mlp_dropout",
        "block1_mlp_add",
    ]
    assert {"tokens", "embed_tokens", "embed_positions", "final_norm", "head"} <= set(names)
    assert model.output_shape == (None, 8, 256)
    assert all(
        w.path.split("/")[0].startswith(("block", "embed_", "final_norm", "head", "seed")) for w in model.weights
    )
    # One tensor alone goes from a block to the next: the second half is a model of its own.
    between = model.get_layer("block0_mlp_add").output
    halves = keras.Model(model.input, between), keras.Model(between, model.output)
    tokens = np.arange(16).reshape(2, 8)
    assert (halves[1](halves[0](tokens)).numpy() == model(tokens).numpy()).all()


def test_the_output_is_compared_with_the_labels_of_each_token():
    check_output(tiny(), tf.TensorSpec([8], tf.int32), 256, "gpt", each_token=True)
    with pytest.raises(UsageError, match=r"gives \(None, 8, 256\), but 99 tokens need \(batch, 8, 99\)"):
        check_output(tiny(), tf.TensorSpec([8], tf.int32), 99, "gpt", each_token=True)


def test_the_file_opens_in_plain_keras(tmp_path):
    model = tiny()
    model.save(tmp_path / "model.keras")
    tokens = np.arange(16).reshape(2, 8)
    np.save(tmp_path / "tokens.npy", tokens)
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['hvdkit', 'hvdkit_models', 'horovod']))  # as if they were not installed\n"
        "import keras, numpy as np\n"
        "np.save('out.npy', keras.models.load_model('model.keras').predict(np.load('tokens.npy'), verbose=0))\n"
    )
    ended = run_command([sys.executable, "-c", program], timeout=120, cwd=tmp_path)
    assert ended.code == 0, ended.output
    assert np.load(tmp_path / "out.npy") == pytest.approx(model(tokens).numpy(), abs=1e-6)


@pytest.fixture(scope="module")
def alphabet():
    """A model that knows its letters."""
    model = tiny()
    model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    text = np.frombuffer(TEXT * 20, np.uint8)
    starts = np.random.default_rng(0).integers(len(text) - 9, size=512)
    lines = np.stack([text[s : s + 9] for s in starts]).astype("int32")
    model.fit(lines[:, :-1], lines[:, 1:], batch_size=32, epochs=4, verbose=0)
    return model


def test_text_is_the_same_by_seed(alphabet):
    def text(prompt=b"X", length=30, **options):
        return bytes(generate.generate(alphabet, prompt, length, **options))

    assert text(temperature=0) == (TEXT * 2)[24:54], "beyond the window's eight letters, too"
    assert text(top_k=1, temperature=5.0) == text(temperature=0)
    assert text(temperature=3.0, seed=1) == text(temperature=3.0, seed=1) != text(temperature=3.0, seed=2)
    assert text(b"ABCDEFGHIJKLMNOPQ", 3, temperature=0) == b"RST", "of a longer prompt the end counts"
    assert text(length=0) == b""


@pytest.mark.parametrize("length", [20, 1000])
def test_what_is_kept_of_earlier_tokens_changes_no_logit(alphabet, length):
    """Beyond the window of 8 it goes on with the last 4 tokens, and fills the window again."""
    predict = generate._prediction(alphabet, length)
    assert isinstance(predict, generate._Cached)
    traced = []
    for number in range(1, 20):
        seen = list(TEXT[:number])
        got = predict(seen)
        context = seen[predict._begin :]
        padded = np.array([context + [0] * (8 - len(context))])
        assert got == pytest.approx(alphabet(padded).numpy()[0, len(context) - 1], abs=1e-4)
        traced.append(len(context))
    assert traced == [*range(1, 9), *range(4, 9), *range(4, 9), 4]
    lines = keras.Sequential([keras.Input([8], dtype="int32"), keras.layers.Embedding(256, 256)])
    assert not isinstance(generate._prediction(lines, length), generate._Cached)


@pytest.mark.parametrize("wrong", [{"length": -1}, {"temperature": -0.1}, {"top_k": 0}, {"seed": -1}])
def test_what_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(UsageError, match="top_k must be 1 or more, the others 0 or more"):
        generate.generate(tiny(), **{"prompt": b"x", "length": 1, **wrong})


def test_models_that_write_no_text_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"model\.keras does not exist \(the run is not finished"):
        generate.open_model(tmp_path)
    with pytest.raises(UsageError, match="The prompt is empty"):
        generate.generate(tiny(), b"", 3)
    (tmp_path / "model.keras").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be opened"):
        generate.open_model(tmp_path)
    hvdkit_models.load("mnist_mlp").build((8, 8, 1), 10).save(tmp_path / "digits.keras")
    with pytest.raises(UsageError, match=r"from \(None, 8, 8, 1\) to \(None, 10\), but text needs one from"):
        generate.open_model(tmp_path / "digits.keras")
