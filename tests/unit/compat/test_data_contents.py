"""What can be seen of data without reading them: equal for equal data, and for none that ranks have divided."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdkit.compat import data_contents

X = np.random.default_rng(0).normal(size=(200, 3)).astype("float32")
Data = tf.data.Dataset


@pytest.fixture(autouse=True)
def no_seed():
    """An earlier test may have set a seed, which then is that of all shuffles."""
    tf.random.set_seed(None)


def _read(rank):
    """Elements that depend on the rank in their function only."""
    return Data.range(9).map(lambda i: tf.gather(X, 2 * i + rank))


def test_a_shard_of_an_order_that_differs(tmp_path):
    (tmp_path / "a").touch()
    plain, shuffled = Data.from_tensor_slices(X), Data.from_tensor_slices(X).shuffle(9)
    for data in (shuffled, shuffled.batch(8).prefetch(1), Data.list_files(str(tmp_path / "*"))):
        assert data_contents.seeds_of(data) == [data_contents.UNSEEDED]
        assert data_contents.divided_seeds_of(data) == []
        assert data_contents.divided_seeds_of(data.shard(1, 0).repeat()) == [data_contents.UNSEEDED]
    for data in (plain, Data.list_files(str(tmp_path / "*"), shuffle=False)):
        assert data_contents.divided_seeds_of(data.shard(2, 0).shuffle(9)) == []
    one, other = (data_contents.divided_seeds_of(plain.shuffle(9, seed=seed).shard(2, 0)) for seed in (1, 2))
    assert one != other
    assert data_contents.UNSEEDED not in one + other


def _same(make):
    here, there = (data_contents.of_dataset(make(rank)) for rank in range(2))
    return here is not None and here == there


@pytest.mark.parametrize(
    "make",
    [
        lambda _: Data.from_tensor_slices((X, X[:, 0])).shuffle(200).batch(8),
        lambda rank: Data.from_tensor_slices(X).map(lambda x: x + tf.random.normal([3]), num_parallel_calls=1 + rank),
        lambda _: Data.range(9).map(lambda i: tf.gather(X, i)).prefetch(1).repeat(3),
        lambda _: Data.from_tensor_slices(X).shuffle(200, seed=1).repeat(),
        lambda _: Data.zip((Data.from_tensor_slices(X), Data.range(200))).filter(lambda x, i: i % 2 == 0),
        lambda _: tf.data.TFRecordDataset(["a", "b"]).cache(),
        lambda _: tf.data.TextLineDataset(["a", "b"]).take(4),
        lambda _: Data.from_tensors((X, X)).repeat(),
    ],
)
def test_data_that_no_rank_has_divided_are_alike(make):
    assert _same(make)


@pytest.mark.parametrize(
    "make",
    [
        lambda rank: Data.from_tensor_slices(X[rank::2]).batch(8),
        lambda rank: Data.from_tensor_slices(X).shard(2, rank).batch(8),
        lambda rank: Data.from_tensor_slices(X).skip(rank),
        lambda rank: Data.from_tensor_slices(X).enumerate().filter(lambda i, x: i % 2 == rank),
        lambda rank: tf.data.TFRecordDataset([f"part-{rank}"]),
        lambda rank: Data.from_tensor_slices([f"part-{rank}", "x"]).interleave(tf.data.TFRecordDataset),
        lambda _: Data.range(9).map(lambda i: tf.random.normal([3])),
        lambda _: Data.from_tensor_slices(X).shuffle(200).repeat(),
        lambda rank: Data.from_tensor_slices(X).shuffle(200, seed=1 + rank).repeat(),
        lambda _: Data.from_tensor_slices(np.ones([200, 3])).batch(8),
        lambda _: Data.from_generator(lambda: iter(X), output_signature=tf.TensorSpec([3])),
        lambda _: Data.range(9).map(lambda i: tf.numpy_function(lambda i: X[i], [i], tf.float32)),
        lambda _: Data.random(seed=3),
        _read,
    ],
)
def test_data_that_may_be_divided_are_not(make):
    assert not _same(make)


def test_files_of_one_name_and_another_size_are_others(tmp_path):
    files = []
    for rank in range(2):
        (tmp_path / "train").write_text("x" * rank)
        files.append(data_contents.of_dataset(tf.data.TFRecordDataset([str(tmp_path / "train"), "b"])))
    assert files[0] != files[1]


def test_nothing_is_read():
    read = []
    data = Data.from_tensor_slices(X).map(lambda x: tf.py_function(lambda x: read.append(x) or x, [x], tf.float32))
    assert data_contents.of_dataset(data) is None
    assert read == []


def test_the_first_batches_are_those_that_keras_reads():
    class Batches(keras.utils.PyDataset):
        read = 0

        def __len__(self):
            return 3

        def __getitem__(self, index):
            self.read += 1
            return X[index : index + 2], X[index : index + 2, 0]

    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    model.compile("sgd", loss="mse", jit_compile=False)
    data, noted = Batches(), []
    stop = data_contents.watch_first_batches(
        lambda batches: noted.append((data.read, data_contents.of_batches(batches)))
    )
    model.fit(data, verbose=0)
    stop()
    model.fit(Batches(), verbose=0)
    expected = data_contents.of_batches([(X[i : i + 2], X[i : i + 2, 0]) for i in range(2)])
    assert noted == [(2, expected)]
    assert expected is not None
    assert data_contents.of_batches([(X[:2], X[:2, 0])]) != expected
    assert data_contents.of_batches([(np.ones([4, 2]), np.zeros(4))]) is None
