"""Arrays that NumPy saved, as Keras' own data sets and other people name them."""

import numpy as np
import pytest

from hvdkit.data import checks, pipeline
from hvdkit.data.sources import Schema, open_source, with_validation
from hvdkit.errors import UsageError

GENERATOR = np.random.default_rng(0)
DIGITS = GENERATOR.integers(256, size=[30, 6, 5], dtype=np.uint8)
LABELS = np.arange(30, dtype=np.uint8) % 3
POINTS = GENERATOR.standard_normal([30, 4])


def everything(source, split="train"):
    examples = source.read(split, 0, source.size(split)).map(lambda x, y: (source.decode(x), y))
    inputs, labels = zip(*examples.as_numpy_iterator(), strict=True)
    return np.stack(inputs), np.stack(labels)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("form", ["{what}_{split}", "{split}_{what}"])
def test_archives_like_keras_mnist(tmp_path, save, form, caplog):
    x, y = ("x", "y") if form.startswith("{what}") else ("images", "labels")
    arrays = {form.format(what=x, split="train"): DIGITS, form.format(what=y, split="train"): LABELS}
    arrays |= {form.format(what=x, split="test"): DIGITS[:7], form.format(what=y, split="test"): LABELS[:7]}
    arrays |= {form.format(what=x, split="val"): DIGITS[7:9], form.format(what=y, split="val"): LABELS[7:9, np.newaxis]}
    save(tmp_path / "mnist.npz", **arrays, seeds=[1, 2])
    source = open_source(str(tmp_path / "mnist.npz"))
    assert (source.kind, source.task, source.shape) == ("image", "classification", (6, 5, 1))
    assert source.label_names == ["0", "1", "2"]
    assert "arrays seeds are left out" in caplog.text
    assert {split: source.size(split) for split in source.splits} == {"train": 30, "test": 7, "validation": 2}
    inputs, labels = everything(source)
    assert (inputs.dtype, labels.dtype) == (np.uint8, np.int64)
    assert (inputs[..., 0] == DIGITS).all()
    assert (labels == LABELS).all()
    assert (everything(source, "validation")[1] == LABELS[7:9]).all()
    is_mapped = all(isinstance(array, np.memmap) for array, _ in source._splits.values())
    assert is_mapped == (save is np.savez)
    part = source.read("train", 5, 9)
    assert [int(y) for _, y in part] == LABELS[5:9].tolist()
    assert part.cardinality() == 4


@pytest.mark.parametrize("opened", ["x.npy", "."])
def test_files_beside_each_other(tmp_path, opened):
    np.save(tmp_path / "x.npy", np.asfortranarray(POINTS))
    np.save(tmp_path / "y.npy", np.array(["cat", "dog"])[LABELS % 2])
    np.save(tmp_path / "notes.npy", POINTS)
    source = open_source(f"{tmp_path}/{opened}")
    assert (source.kind, source.shape, source.label_names) == ("features", (4,), ["cat", "dog"])
    assert (source.size("train"), source.size("test")) == (24, 6)
    assert isinstance(source._splits["train"][0], np.memmap)
    found = [everything(source, split) for split in ("train", "test")]
    inputs, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = [int(np.flatnonzero((POINTS.astype(np.float32) == row).all(axis=1))[0]) for row in inputs]
    assert sorted(order) == list(range(30)), "each example is in one split"
    assert (labels == LABELS[order] % 2).all()


def saved(path, inputs, labels, **others):
    np.savez(path / "x.npz", x=inputs, y=labels, **others)
    return str(path / "x.npz")


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (DIGITS / 255.0, DIGITS),
        (DIGITS.astype(np.float32), DIGITS),
        (DIGITS.astype(np.int64), DIGITS),
        (DIGITS > 100, 255 * (DIGITS > 100)),
        (np.minimum(DIGITS.astype(np.uint16) * 16, 4095), np.minimum(DIGITS * (16 * 255 / 4095), 255).round()),
        (DIGITS[..., np.newaxis].repeat(3, axis=-1), DIGITS[..., np.newaxis].repeat(3, axis=-1)),
    ],
)
def test_pixels_become_0_to_255(tmp_path, images, expected):
    # The same labels as places, to find an example's place.
    np.savez(tmp_path / "x.npz", x_train=images, y_train=LABELS, x_test=images, y_test=LABELS)
    inputs, _ = everything(open_source(str(tmp_path / "x.npz")))
    np.testing.assert_allclose(inputs, expected.reshape(inputs.shape), atol=1e-3 if images.dtype.kind == "f" else 0)
    resized = open_source(str(tmp_path / "x.npz"), image_size=8)
    assert resized.shape[:2] == everything(resized)[0].shape[1:3] == (8, 8)


@pytest.mark.parametrize(
    ("labels", "task", "expected"),
    [
        (np.eye(3)[LABELS], "classification", LABELS),
        (LABELS.astype(np.float32), "classification", LABELS),
        (LABELS + 5, "classification", LABELS),
        (np.eye(4, dtype=bool)[LABELS] | (np.arange(30) % 4 == 3)[:, np.newaxis], "multilabel", None),
        (POINTS[:, 0], "regression", POINTS[:, :1]),
        (POINTS[:, :2], "regression", POINTS[:, :2]),
    ],
)
def test_labels_of_each_task(tmp_path, labels, task, expected):
    np.savez(tmp_path / "x.npz", x_train=POINTS, y_train=labels, x_test=POINTS[:3], y_test=labels[:3])
    schema = Schema("regression" if task == "regression" else "auto")
    source = open_source(str(tmp_path / "x.npz"), schema=schema)
    assert source.task == task
    found = everything(source)[1]
    np.testing.assert_allclose(found, labels if expected is None else expected, rtol=1e-6)
    assert len(source.label_names) == (found.shape[1] if found.ndim > 1 else 3)


def test_what_a_share_has_is_read_and_checked(tmp_path):
    points = POINTS.copy()
    points[11, 2] = np.nan
    path = saved(tmp_path, points, LABELS, x_test=points[:3], y_test=LABELS[:3])
    source = open_source(path)
    with pytest.raises(UsageError, match="NaN or Inf in 1 of 30 inputs of split 'train', first at example 11"):
        checks.check_share(pipeline.read_share(source, "train", 0, 1, cache_bytes=1e9), "train", 3)
    held_out = with_validation(source, 0.2)
    shares = [pipeline.read_share(held_out, "train", i, 2, cache_bytes=1e9) for i in range(2)]
    rows = np.concatenate([share.inputs for share in shares])
    assert len(rows) == 24
    assert set(rows[:, 0]) < set(points[:, 0].astype(np.float32))
    bright = DIGITS / 255.0
    images = np.concatenate([bright] * 4 + [bright * 2])
    path = saved(tmp_path, images, np.tile(LABELS, 5), x_test=bright, y_test=LABELS)
    with pytest.raises(
        UsageError, match=r"cannot be read: example 120 \(The image has pixels that are not from 0 to 1"
    ):
        pipeline.read_share(open_source(path), "train", 0, 1, cache_bytes=1e9)


ARRAYS = {
    "objects": ({"x": np.array([None, {}] * 15), "y": LABELS}, "x(.npy)? has Python objects, which could run code"),
    "lengths": ({"x": POINTS, "y": LABELS[:29]}, "x has 30 examples and y 29. Save one label for each example"),
    "no labels": ({"x": POINTS}, "has no labels for x: its arrays are x. Name them x_train, y_train"),
    "no inputs": ({"y_train": LABELS}, "has no inputs for y_train"),
    "no names": ({"arr_0": POINTS, "arr_1": LABELS}, "has no training data: its arrays are arr_0, arr_1"),
    "half a split": ({"x": POINTS, "y": LABELS, "x_test": POINTS}, "has no labels for x_test"),
    "two of a kind": (
        {"x": POINTS, "images": DIGITS, "y": LABELS},
        "two arrays of train inputs, (x and images|images and x)",
    ),
    "other shapes": (
        {"x": POINTS, "y": LABELS, "x_test": POINTS[:, :2], "y_test": LABELS},
        r"an example of x_test is float64 \[2\], and one of x is float64 \[4\]",
    ),
    "a new class": ({"x": POINTS, "y": LABELS, "x_test": POINTS, "y_test": LABELS + 1}, "x.npz has classes that .*: 3"),
    "measured values": ({"x": POINTS, "y": POINTS[:, 0]}, "are measured values, .* --task=regression"),
    "a matrix": ({"x": POINTS, "y": POINTS}, r"the labels have shape \(30, 4\), which does not fit --task=auto"),
    "dimensions": (
        {"x": np.zeros([30, 2, 2, 2, 2]), "y": LABELS},
        r"inputs have shape \(30, 2, 2, 2, 2\). Save images",
    ),
    "channels": ({"x": np.zeros([30, 3, 8, 8]), "y": LABELS}, r"channels before height and width.*transpose\(0, 2, 3"),
    "standardized": ({"x": DIGITS - 128.0, "y": LABELS}, r"float64 pixels from -128 to 127, but they must be from 0"),
    "texts": ({"x": np.array(["a"] * 30), "y": LABELS}, "the inputs have dtype <U1, but must be numbers"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_are_not_what_they_should_be(tmp_path, case):
    arrays, message = ARRAYS[case]
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        open_source(str(tmp_path / "x.npz"))
    if "x" in arrays:
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(UsageError, match=message.replace("x.npz", "x.npy")):
            open_source(str(tmp_path / "x.npy"))


def test_files_of_arrays_that_cannot_be_read(tmp_path):
    path = saved(tmp_path, POINTS, LABELS)
    whole = (tmp_path / "x.npz").read_bytes()
    for content in (whole[:200], b"PK no archive"):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(UsageError, match=r"x\.npz cannot be read as \.npz \(.*Is it complete"):
            open_source(path)
    np.save(tmp_path / "x.npy", POINTS)
    np.save(tmp_path / "y.npy", LABELS)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:200])
    with pytest.raises(UsageError, match=r"x\.npy cannot be read \(.*Is it complete"):
        open_source(str(tmp_path / "x.npy"))
    for missing in ("no.npz", "no.npy"):
        with pytest.raises(UsageError, match=f"The data set .*{missing} does not exist"):
            open_source(str(tmp_path / missing))
