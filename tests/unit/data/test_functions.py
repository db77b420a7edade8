"""Data of any structure that a function of the user's returns."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdkit.data import balance, pipeline
from hvdkit.data.checks import check_share
from hvdkit.data.epoch_order import Stretch
from hvdkit.data.sources import FoldSource, Schema, open_source, with_validation
from hvdkit.data.sources.function import FunctionSource
from hvdkit.data.sources.given_kinds import examples_of
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


def yields_batches():
    """The same in batches of 4, one after another; the last one has 3."""
    for start in range(0, EXAMPLES, 4):
        numbers = np.arange(start, min(start + 4, EXAMPLES))
        yield numbers, numbers * 10.0


class Loader:
    """Yields batches anew in each pass, and more than its length says."""

    def __len__(self):
        return -(-EXAMPLES // 4)

    def __iter__(self):
        return itertools.chain(yields_batches(), yields_batches())


class Sequence:
    """Batches by index, as Keras 2 has them."""

    def __len__(self):
        return len(Batches.sizes)

    def __getitem__(self, index):
        return Batches()[index]


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
        yields_batches,
        Loader(),
        Sequence(),
    ],
    ids=["arrays", "examples", "batches", "PyDataset", "generator", "iterable", "Sequence"],
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


def check_that_all_are_read(data):
    """Check that the second of two ranks reads its half of the 23 examples."""
    source = source_of(data)
    assert source.size("train") == EXAMPLES
    x, y = next(iter(pipeline.evaluation_batches(shares_of(source, 2)[1], 99)))
    np.testing.assert_array_equal(x, np.arange(11, EXAMPLES))
    np.testing.assert_array_equal(y, x * 10)


def test_grain_data_are_divided_by_their_examples():
    grain = pytest.importorskip("grain")
    rows = grain.MapDataset.range(EXAMPLES).map(lambda n: (np.float32(n), np.float32(n * 10)))

    def loader(epochs=1, batch=5, shards=1):
        return grain.DataLoader(
            data_source=rows,
            sampler=grain.samplers.SequentialSampler(EXAMPLES),
            operations=[grain.transforms.Batch(batch)] if batch else [],
            shard_options=grain.sharding.ShardOptions(0, shards),
        )

    for data in (
        rows,
        rows.batch(5),
        rows.to_iter_dataset(),
        rows.batch(5).to_iter_dataset(),
        loader(),
        loader(batch=0),
    ):
        check_that_all_are_read(data)
    for data, message in (
        (rows.repeat(), "is an infinite .*MapDataset. Leave repeat"),
        (rows.repeat().to_iter_dataset(), "is an infinite .*IterDataset. Leave repeat"),
        (loader(shards=2), "is already divided by its shard_options"),
    ):
        with pytest.raises(UsageError, match=message):
            source_of(data)


def test_the_loaders_of_pytorch_are_divided_by_their_examples(torch):
    class Examples(torch.utils.data.Dataset):
        def __len__(self):
            return EXAMPLES

        def __getitem__(self, index):
            return torch.tensor(float(index)), index * 10

    class Yielded(torch.utils.data.IterableDataset):
        def __iter__(self):
            return ((float(n), n * 10) for n in range(EXAMPLES))

    loader = torch.utils.data.DataLoader
    for data in (loader(Examples(), batch_size=4, shuffle=True), loader(Yielded(), batch_size=4)):
        check_that_all_are_read(data)
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * EXAMPLES, EXAMPLES)
    with pytest.raises(UsageError, match="a DataLoader with a WeightedRandomSampler, and hvdkit chooses and orders"):
        source_of(loader(Examples(), sampler=sampler))


def boxes_of(start, stop):
    """Pictures numbered from 0 to 11; picture n has n % 4 boxes of four numbers n, and words of as many n."""
    numbers = range(start, stop)
    boxes = tf.ragged.constant([[[n] * 4] * (n % 4) for n in numbers], ragged_rank=1, inner_shape=(4,))
    words = tf.ragged.constant([[n] * (n % 4) for n in numbers], dtype=tf.int64)
    return {"number": np.array(numbers), "words": words}, {"boxes": boxes}


def yields_boxes():
    for start in range(0, 12, 2):
        yield boxes_of(start, start + 2)


@pytest.mark.parametrize(
    "data",
    [
        boxes_of(0, 12),
        yields_boxes,
        tf.data.Dataset.from_tensor_slices(boxes_of(0, 12)),
        tf.data.Dataset.from_tensor_slices(boxes_of(0, 12)).batch(5),
    ],
    ids=["arrays", "generator", "examples", "batches"],
)
def test_examples_may_be_ragged(data):
    source = with_validation(source_of(data), 0.25)
    seen = []
    for split, number in (("validation", 3), ("test", 12)):
        share = pipeline.read_share(source, split, 0, 1, cache_bytes=0)
        check_share(share, split, 0)
        batches = list(pipeline.evaluation_batches(share, 5))
        assert sum(len(inputs["number"]) for inputs, _ in batches) == number
        seen += batches
    shares = shares_of(source, 1)
    seen += [*batches_of(shares, local_batch=4, steps=2).take(4), pipeline.first_batch(shares[0])]
    for inputs, targets in seen:
        numbers = inputs["number"].numpy().tolist()
        assert inputs["words"].to_list() == [[n] * (n % 4) for n in numbers]
        assert targets["boxes"].shape[1:].as_list() == [None, 4]
        assert targets["boxes"].to_list() == [[[n] * 4] * (n % 4) for n in numbers]


def test_targets_that_change_when_they_are_read_again_are_named(caplog):
    noisy = examples_of_tf_data().map(lambda x, y: (tf.random.uniform([]), y))
    source_of(noisy)
    assert not caplog.text, "inputs may be augmented"
    draw = np.random.default_rng(0)
    orders = (draw.permutation(EXAMPLES) for _ in range(99))
    source_of(lambda: (((order := next(orders)), order * 10.0) for _ in range(1)))
    assert caplog.text.count("The targets of the first train examples of mine:data are others when they are read") == 1


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
        "def stops():\n"
        "    def batches():\n"
        "        yield rows(3)\n"
        "        raise OSError('no more')\n"
        "    return batches, batches\n"
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
        "stops": r"failed: OSError: no more \(line 12 of .*mine.py\)",
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
        (iter([1]), "is a list_iterator, which can be read once only, .* Return the function that begins it"),
        (lambda seed: [], "is a function that needs an argument, seed. Return one without arguments"),
        (lambda: 3, "is a function that returned a int, and batches one after another are expected"),
        (lambda: [np.zeros([2, 3]), np.zeros([2, 4])], "batch 1 of mine, train is .*4.*, and the first one .*3.*pad"),
        (list, "mine:data returned no train examples"),
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
