import itertools

import numpy as np
import pytest
import tensorflow as tf

import hvdkit as hvd
from hvdkit.data import balance, checks, even_share, pipeline
from hvdkit.data.sources import ArraySource
from hvdkit.errors import UsageError

EVERYTHING = 1e12
NONE = balance.Sampling("none", np.array([10, 10]))


def source(examples=23, labels=None, inputs=None):
    """Examples that can be told apart: image i has the value i."""
    inputs = np.arange(examples, dtype=np.uint8).reshape(-1, 1, 1, 1) if inputs is None else inputs
    labels = np.arange(len(inputs)) % 2 if labels is None else np.asarray(labels)
    return ArraySource("test", "image", ["a", "b"], {"train": (inputs, labels), "test": (inputs, labels)})


def share_of(examples, share, shares, limit=EVERYTHING):
    return pipeline.read_share(source(examples), "train", share, shares, cache_bytes=limit)


def seen(batches, steps):
    return [np.asarray(b[0]).ravel().astype(int).tolist() for b in itertools.islice(batches, steps)]


@pytest.mark.parametrize(("examples", "shares"), [(23, 3), (3, 3), (100, 7), (5, 1)])
def test_shares_are_even_and_complete(examples, shares):
    ranges = [even_share(examples, s, shares) for s in range(shares)]
    assert [start for start, _ in ranges] == [0] + [stop for _, stop in ranges[:-1]]
    assert ranges[-1][1] == examples
    assert {stop - start for start, stop in ranges} <= {examples // shares, examples // shares + 1}


@pytest.mark.parametrize("limit", [EVERYTHING, 0], ids=["in memory", "read again each epoch"])
def test_an_epoch_sees_each_example_once_and_every_epoch_another_order(limit):
    batches = pipeline.training_batches(
        [share_of(20, 0, 1, limit)], local_batch=4, steps_per_epoch=5, seed=1, sampling=NONE
    )
    epochs = [sum(e, []) for e in np.array_split(np.array(seen(batches, 15)), 3) for e in [e.tolist()]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("limit", [EVERYTHING, 0], ids=["in memory", "read again each epoch"])
def test_the_order_is_a_function_of_seed_epoch_share_and_shares(limit):
    def order(seed=1, share=0, shares=2, start_epoch=0):
        batches = pipeline.training_batches(
            [share_of(20, share, shares, limit)],
            local_batch=5,
            steps_per_epoch=2,
            seed=seed,
            sampling=NONE,
            start=pipeline.Start(start_epoch),
        )
        return seen(batches, 4)

    assert order() == order()
    assert order() != order(seed=2)
    assert order(start_epoch=1)[:2] == order()[2:], "a run can begin at any epoch"
    assert not set(sum(order(share=0), [])) & set(sum(order(share=1), []))


@pytest.mark.parametrize("limit", [EVERYTHING, 0], ids=["in memory", "read again each epoch"])
def test_the_order_does_not_depend_on_the_programs_seed(limit):
    def order(programs_seed):
        tf.random.set_seed(programs_seed)
        share = share_of(20, 0, 2, limit)
        return seen(pipeline.training_batches([share], local_batch=5, steps_per_epoch=2, seed=1, sampling=NONE), 4)

    assert order(0) == order(7), "0 is the seed that TensorFlow takes for none"


def test_a_process_with_all_shares_sees_what_the_ranks_see_together():
    def batches(*shares):
        return pipeline.training_batches(
            [share_of(24, s, 3) for s in shares], local_batch=2, steps_per_epoch=4, seed=5, sampling=NONE
        )

    ranks = [seen(batches(s), 8) for s in range(3)]
    assert seen(batches(0, 1, 2), 8) == [sum(parts, []) for parts in zip(*ranks, strict=True)]


def test_evaluation_sees_each_example_once_over_all_shares():
    for limit in (EVERYTHING, 0):
        parts = [seen(pipeline.evaluation_batches(share_of(23, s, 3, limit), 4), 99) for s in range(3)]
        assert sum(sum(parts, []), []) == list(range(23))


def test_images_become_float32_in_the_pipeline():
    batch = next(iter(pipeline.evaluation_batches(share_of(4, 0, 1), 4)))
    assert batch[0].dtype == tf.float32


def test_class_weights_become_sample_weights():
    batches = pipeline.training_batches(
        [share_of(4, 0, 1)], local_batch=4, steps_per_epoch=1, seed=0, sampling=NONE, class_weights=np.array([0.5, 2.0])
    )
    _, labels, weights = next(iter(batches))
    assert np.asarray(weights).tolist() == np.where(np.asarray(labels) == 1, 2.0, 0.5).tolist()


def test_balanced_class_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.repeat([0, 1, 2], [50, 30, 1])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert balance.class_weights(np.bincount(labels)) == pytest.approx(expected)
    assert balance.class_weights(np.array([4, 0])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("mode", "each"), [("over", 10), ("under", 3)])
def test_sampling_makes_classes_equal(mode, each):
    labels = np.repeat([0, 1], [10, 3])
    sampling = balance.Sampling(mode, np.bincount(labels))
    order = sampling.order(labels, np.random.default_rng(0))
    assert np.bincount(labels[order]).tolist() == [each, each]
    assert len(order) == sampling.size(np.bincount(labels)) == 2 * each
    small = order[labels[order] == 1]
    assert set(small) == {10, 11, 12}, "every example of the small class is used"


@pytest.mark.parametrize("mode", ["over", "under"])
def test_sampling_a_stream_does_so_on_average(mode):
    labels = np.repeat([0, 1], [900, 100])
    sampling = balance.Sampling(mode, np.bincount(labels))
    stream = tf.data.Dataset.from_tensor_slices((np.arange(1000), labels))
    counts = np.bincount([y for _, y in sampling.resample(stream, 3).as_numpy_iterator()])
    assert counts == pytest.approx({"over": [900, 900], "under": [100, 100]}[mode], rel=0.25)


def test_an_unknown_sampling_is_refused():
    with pytest.raises(ValueError, match="must be one of none, over, under, but is 'some'"):
        balance.Sampling("some", np.array([1]))


def test_counts_are_described():
    assert balance.describe(np.array([1200, 3]), ["cat", "dog"]) == "cat 1,200, dog 3"
    assert "of 40 classes" in balance.describe(np.arange(40), [str(i) for i in range(40)])


@pytest.mark.parametrize("limit", [EVERYTHING, 0])
def test_labels_out_of_range_are_found(limit):
    labels = [0, 1, 1, 7, 0, -1]
    share = pipeline.read_share(source(6, labels), "train", 0, 1, cache_bytes=limit)
    with pytest.raises(
        UsageError, match=r"2 of 6 in this shard of split 'train', the first is 7 at example 3; 2 classes"
    ):
        checks.check_share(share, "train", 2)


def test_nan_is_found():
    inputs = np.zeros([5, 1, 1, 1], np.float32)
    inputs[3] = np.inf
    share = pipeline.read_share(source(inputs=inputs), "test", 0, 1, cache_bytes=EVERYTHING)
    with pytest.raises(UsageError, match="NaN or Inf in 1 of 5 inputs of split 'test', first at example 3"):
        checks.check_share(share, "test", 2)


def test_classes_are_counted_and_empty_ones_named():
    share = pipeline.read_share(source(5, [0, 0, 0, 2, 2]), "train", 0, 1, cache_bytes=EVERYTHING)
    counts = checks.check_share(share, "train", 3)
    assert counts.tolist() == [3, 0, 2]
    assert checks.empty_classes(counts, ["a", "b", "c"]) == ["b"]


def test_shard_divides_evenly_and_says_what_it_leaves_out(caplog):
    parts = [list(hvd.data.shard(tf.data.Dataset.range(11), r, 3).as_numpy_iterator()) for r in range(3)]
    assert [len(p) for p in parts] == [3, 3, 3]
    assert sorted(sum(parts, [])) == list(range(9))
    assert "2 of 11 examples are left out, so that all 3 ranks take 3 steps" in caplog.text


def test_shard_counts_what_tensorflow_cannot():
    unknown = tf.data.Dataset.range(12).filter(lambda i: i != 3)
    assert len(list(hvd.data.shard(unknown, 0, 2))) == 5
    assert hvd.data.shard(tf.data.Dataset.range(4).repeat(), 1, 2).cardinality() == tf.data.INFINITE_CARDINALITY


def test_shard_refuses_fewer_elements_than_ranks():
    with pytest.raises(ValueError, match=r"2 examples cannot be divided over 3 ranks"):
        hvd.data.shard(tf.data.Dataset.range(2), 0, 3)


def shares_of(data, size, **policy):
    return [list(hvd.data.shard(data, r, size, **policy).as_numpy_iterator()) for r in range(size)]


def test_pad_repeats_from_the_beginning_and_says_so(caplog):
    assert shares_of(tf.data.Dataset.range(11), 3, uneven="pad") == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 0]]
    assert "1 of 11 examples are taken twice, and count twice, so that all 3 ranks take 4 steps" in caplog.text
    assert shares_of(tf.data.Dataset.range(2), 5, uneven="pad") == [[0], [1], [0], [1], [0]]


def test_pad_takes_a_batched_data_sets_batches_as_they_are():
    shares = shares_of(tf.data.Dataset.range(10).batch(4), 2, uneven="pad")
    assert [[b.tolist() for b in share] for share in shares] == [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7], [0, 1, 2, 3]]]


def test_padding_keeps_a_shuffled_data_set_in_the_same_order_on_all_ranks():
    shares = [hvd.data.shard(tf.data.Dataset.range(5).shuffle(5, seed=3), rank, 2, uneven="pad") for rank in range(2)]
    steps = len(shares[0])
    epochs = [[list(share.take(steps).as_numpy_iterator()) for share in shares] for _ in range(4)]
    assert all(set(sum(epoch, [])) == set(range(5)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("examples", "size", "batch"), [(11, 3, 2), (12, 3, 2), (2, 3, 2), (7, 2, 16), (25, 2, 4)])
def test_join_takes_every_example_once_in_equally_many_steps(caplog, examples, size, batch):
    data = (np.arange(examples), np.arange(examples))
    shares = shares_of(data, size, uneven="join", batch_size=batch)
    assert len({len(share) for share in shares}) == 1
    for step, parts in enumerate(zip(*shares, strict=True)):
        numbers, _, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        expected = range(step * size * batch, min(examples, (step + 1) * size * batch))
        assert sorted(numbers[weights > 0]) == list(expected), "as one process with the global batch"
        assert weights[weights > 0] == pytest.approx(len(numbers) / len(expected))
    assert len(hvd.data.shard(data, 0, size, uneven="join", batch_size=batch)) == len(shares[0])
    assert f"every epoch takes the {examples} examples in the order of the arrays" in caplog.text


def test_join_multiplies_weights_that_are_there():
    given = np.array([[0.5, 1.0], [2.0, 3.0], [4.0, 0.0]])
    shares = shares_of((np.arange(3), np.arange(3), given), 2, uneven="join", batch_size=2)
    assert shares[0][0][2].tolist() == (given[[0, 2]] * np.float32(4 / 3)).astype("float32").tolist()
    assert shares[1][0][2].tolist() == [(given[1] * np.float32(4 / 3)).astype("float32").tolist(), [0, 0]]


def test_join_goes_on_for_ever_with_an_infinite_data_set():
    endless = tf.data.Dataset.from_tensor_slices((np.arange(3), np.arange(3))).repeat()
    batches = hvd.data.shard(endless, 1, 2, uneven="join", batch_size=2).take(2)
    assert [(x.tolist(), w.tolist()) for x, _, w in batches.as_numpy_iterator()] == [([1, 0], [1, 1]), ([2, 1], [1, 1])]


def test_arrays_are_divided_in_their_structure():
    x, y = {"a": np.arange(5), "b": np.arange(10).reshape(5, 2)}, tf.range(5)
    inputs, labels = hvd.data.shard((x, y), 1, 2)
    assert inputs["a"].tolist() == [1, 3]
    assert inputs["b"].tolist() == [[2, 3], [6, 7]]
    assert labels.numpy().tolist() == [1, 3]
    assert hvd.data.shard(np.arange(5), 1, 2, uneven="pad").tolist() == [1, 3, 0]
    assert hvd.data.shard(np.arange(5), 0, 1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("data", "policy", "message"),
    [
        ([[1, 2], [3]], {}, "but builtins.int was given"),
        (np.array(3), {}, "but numpy.ndarray was given"),
        (object(), {}, r"but builtins.object was given.*hvd.data.shard\(iter\(batches\)\)"),
        ((np.zeros(3), np.zeros(4)), {}, "3 and 4 examples"),
        (np.zeros(3), {"uneven": "none"}, "must be one of drop, pad, join, but is 'none'"),
        (np.zeros(3), {"uneven": "join"}, "batch_size is None. Give the local batch"),
        (np.zeros(3), {"uneven": "pad", "batch_size": 4}, r"write shard\(dataset\)\.batch\(4\)"),
        ((np.zeros(3),), {"uneven": "join", "batch_size": 4}, r"needs \(x, y\) or \(x, y, weight\)"),
        ((np.zeros(0), np.zeros(0)), {"uneven": "join", "batch_size": 4}, "of 0 example"),
        (np.zeros(0), {"uneven": "pad"}, "of 0 example"),
        (np.zeros(2), {}, r"2 examples cannot be divided over 3 ranks"),
        (tf.data.Dataset.from_tensor_slices(["a"]), {}, "1 string cannot be divided .* divide the records"),
    ],
)
def test_what_cannot_be_divided_is_refused(data, policy, message):
    with pytest.raises((TypeError, ValueError), match=message):
        hvd.data.shard(data, 0, 3, **policy)
