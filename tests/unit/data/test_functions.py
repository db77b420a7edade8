"""Data of any structure that a function of the user's returns."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdkit.data import balance, pipeline
from hvdkit.data.checks import check_share
from hvdkit.data.epoch_order import Stretch
from hvdkit.data.sources import FoldSource, Schema, open_source, with_validation
from hvdkit.data.sources.function import FunctionSource
from hvdkit.data.sources.given import examples_of
from hvdkit.errors import UsageError

EXAMPLES = 23


def arrays(examples=EXAMPLES):
    """Several inputs, one of them ragged and one of texts, several targets, and sample weights."""
    numbers = np.arange(examples, dtype=np.float64)
    inputs = {
        "number": numbers[:, None],
        "words": tf.RaggedTensor.from_row_lengths(tf.range(2 * examples - 1), [1, *[2] * (examples - 1)]),
        "name": [np.array([f"n{n}" for n in range(examples)])],
    }
    return inputs, (numbers * 10, numbers.astype("int32")), numbers / 2


def examples_of_tf_data():
    return tf.data.Dataset.from_tensor_slices((np.arange(EXAMPLES), np.arange(EXAMPLES) * 10.0))


class Batches(keras.utils.PyDataset):
    """23 examples in batches of 5; the last one has 3."""

    sizes = (5, 5, 5, 5, 3)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        numbers = np.arange(self.sizes[index]) + sum(self.sizes[:index])
        return numbers, numbers * 10.0


def source_of(train, test=None):
    data = {"train": train, "test": train if test is None else test}
    return FunctionSource("mine:data", {split: examples_of(given, f"mine, {split}") for split, given in data.items()})


def shares_of(source, shares):
    return [pipeline.read_share(source, "train", n, shares, cache_bytes=1e9) for n in range(shares)]


def batches_of(shares, start=None, local_batch=3, steps=3):
    sampling = balance.Sampling("none", np.array([EXAMPLES]))
    options = {"local_batch": local_batch, "steps_per_epoch": steps, "seed": 1, "sampling": sampling, "start": start}
    return pipeline.training_batches(shares, **options)


def test_arrays_of_any_structure_keep_their_examples_together():
    source = source_of(arrays())
    assert (source.kind, source.size("train"), source.size("test")) == ("arrays", EXAMPLES, EXAMPLES)
    seen = []
    for inputs, targets, weights in batches_of(shares_of(source, 2)).take(3):
        number = inputs["number"][:, 0].numpy()
        assert inputs["number"].dtype == tf.float32, "as in fit"
        assert inputs["name"][0].numpy().tolist() == [f"n{int(n)}".encode() for n in number]
        assert [row[-1] for row in inputs["words"].to_list()] == [2 * n for n in number]
        np.testing.assert_array_equal(targets[0], number * 10)
        np.testing.assert_array_equal(targets[1], number)
        np.testing.assert_array_equal(weights, number / 2)
        seen += number.tolist()
    assert len(set(seen)) == 18, "an epoch of 3 steps sees no example twice"
    (whole,) = pipeline.evaluation_batches(shares_of(source, 1)[0], 99)
    np.testing.assert_array_equal(whole[0]["number"][:, 0], np.arange(EXAMPLES))


@pytest.mark.parametrize(
    "data",
    [
        (np.arange(EXAMPLES), np.arange(EXAMPLES) * 10.0),
        examples_of_tf_data(),
        examples_of_tf_data().batch(5),
        Batches(),
    ],
    ids=["arrays", "examples", "batches", "PyDataset"],
)
def test_each_kind_is_divided_shuffled_and_resumed_alike(data):
    source = source_of(data)
    assert source.size("train") == EXAMPLES
    shares = shares_of(source, 2)
    assert [share.size for share in shares] == [11, 12]
    steps = [x.numpy().tolist() for x, y in batches_of(shares).take(6) if (y.numpy() == x.numpy() * 10).all()]
    assert len(steps) == 6
    assert len({*sum(steps[:3], [])}) == 18
    assert steps[:3] != steps[3:]
    assert [x.numpy().tolist() for x, _ in batches_of(shares, pipeline.Start(1, 1)).take(2)] == steps[4:]
    before = [Stretch(2, 1, None if shares[0].inputs is not None else tuple(share.buffer() for share in shares))]
    three = shares_of(source, 3)
    buffers = None if before[0].buffers is None else [share.buffer() for share in three]
    options = {"seed": 1, "global_batch": 6, "steps_per_epoch": 3}
    start, _ = pipeline.start_of(0, before, source, three, buffers, **options)
    rest = [x.numpy().tolist() for x, _ in batches_of(three, start, local_batch=2).take(2)]
    assert len({*steps[0], *sum(rest, [])}) == 18, "three ranks see what two have not seen"


def test_a_grain_data_set_is_divided_by_its_examples():
    grain = pytest.importorskip("grain")
    rows = grain.MapDataset.range(EXAMPLES).map(lambda n: (np.float32(n), np.float32(n * 10)))
    for data in (rows, rows.batch(5)):
        source = source_of(data)
        assert source.size("train") == EXAMPLES
        x, y = next(iter(pipeline.evaluation_batches(shares_of(source, 2)[1], 99)))
        np.testing.assert_array_equal(x, np.arange(11, EXAMPLES))
        np.testing.assert_array_equal(y, x * 10)
    with pytest.raises(UsageError, match=r"is a grain\..*IterDataset, whose examples have no index"):
        source_of(rows.to_iter_dataset())


def test_streams_are_read_again_so_that_they_augment_anew():
    noisy = examples_of_tf_data().map(lambda x, y: (tf.random.uniform([]), y))
    (share,) = shares_of(source_of(noisy), 1)
    assert share.inputs is None
    values = [x.numpy().tolist() for x, _ in batches_of([share], local_batch=23, steps=1).take(2)]
    assert not set(values[0]) & set(values[1])


def test_folds_and_validation_take_structures():
    source = source_of(arrays())
    fold = FoldSource(source, 0, 3)
    assert fold.size("train") + fold.size("test") == EXAMPLES
    held_out = with_validation(source, 0.2)
    assert held_out.size("validation") == 5
    share = pipeline.read_share(held_out, "validation", 0, 1, cache_bytes=0)
    ((inputs, targets, _),) = pipeline.evaluation_batches(share, 9)
    np.testing.assert_array_equal(targets[1], inputs["number"][:, 0])


def test_what_a_function_returns_may_have_names(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import numpy as np\n"
        "rows = lambda n: (np.zeros([n, 2]), np.zeros(n))\n"
        "def pair(): return rows(4), rows(2)\n"
        "def three(seed): return rows(seed), rows(3), rows(2)\n"
        "def named(): return {'test': rows(2), 'train': rows(4)}\n"
        "def one(): return rows(4)[0]\n"
        "def wrong(): return {'training': rows(4)}\n"
        "def fails(): return rows('4')\n"
        "def other(): return rows(4), (np.zeros([2, 3]), np.zeros(2))\n"
        "def empty(): return rows(4), rows(0)\n"
    )
    sizes = {"pair": (4, 2), "three": (7, 3, 2), "named": (2, 4)}
    for function, expected in sizes.items():
        source = open_source(f"{path}:{function}", seed=7)
        assert source.name == f"mine:{function}"
        assert tuple(source.size(split) for split in source.splits) == expected
    for function, message in {
        "none": "has no function 'none' that --dataset=.* could call",
        "one": r"returned a ndarray. Return \(train, test\), \(train, validation, test\), or a dict with these names",
        "wrong": "returned a dict with training",
        "fails": r"failed: TypeError: .* \(line 2 of .*mine.py\)",
        "other": r"returned test examples \('float32\[3\]', .*, and train examples \('float32\[2\]'",
        "empty": "returned no test examples",
    }.items():
        with pytest.raises(UsageError, match=message):
            open_source(f"{path}:{function}")
    with pytest.raises(UsageError, match="names the file .*, which is not there"):
        open_source(f"{tmp_path}/no.py:data")
    with pytest.raises(UsageError, match="--task, --encoding and the flags for columns describe tables"):
        open_source(f"{path}:pair", schema=Schema("regression"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((np.zeros([4, 2]), np.zeros(3)), "mine, train have 3 and 4 examples; one example needs a row in each"),
        ((np.zeros(4), 3), "mine, train has a int where an array of numbers or texts"),
        (
            (np.zeros(4), np.array([None] * 4)),
            "has an array of object where .* rows of differing length with tf.ragged",
        ),
        ((np.zeros(4),) * 4, r"mine, train has 4 parts, and fit takes x, \(x, y\) or \(x, y, sample_weight\)"),
        (iter([1]), "whose examples have no index"),
        (examples_of_tf_data().repeat(), "is an infinite tf.data.Dataset. Leave repeat"),
    ],
)
def test_what_is_no_data_is_refused(data, message):
    with pytest.raises(UsageError, match=message):
        source_of(data)


def test_batches_that_do_not_fit_are_found(caplog):
    ragged = tf.data.Dataset.from_generator(lambda: map(np.zeros, [[2], [3]]), output_signature=tf.TensorSpec([None]))
    (share,) = shares_of(source_of(ragged), 1)
    with pytest.raises(UsageError, match="the first 2 train examples cannot be read and put into a batch"):
        check_share(share, "train", 0)

    class Uneven(Batches):
        sizes = (5, 4, 5)

    (share,) = shares_of(source_of(Uneven()), 1)
    with pytest.raises(UsageError, match="batch 1 of mine, train has 4 examples, and batch 0 5"):
        check_share(share, "train", 0)
    broken = np.array([0.0, np.nan, 1.0])
    (share,) = shares_of(source_of(({"a": broken}, np.zeros(3))), 1)
    with pytest.raises(UsageError, match=r"NaN or Inf in 1 of 3 inputs\['a'\] of split 'train', first at example 1"):
        check_share(share, "train", 0)
    (share,) = shares_of(source_of((np.zeros(3), (broken, broken))), 1)
    assert check_share(share, "train", 0).tolist() == [3]
    assert "NaN or Inf in 1 of 3 targets[1]" in caplog.text
