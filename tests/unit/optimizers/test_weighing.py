"""Losses in one process, where nothing is to be weighed, and what `hvd.shard_loss` takes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdkit as hvd


def test_in_one_process_it_is_the_loss():
    loss = keras.losses.MeanSquaredError()
    y, predictions, weights = np.zeros([4, 1]), np.arange(4.0)[:, None], np.array([1.0, 0, 0, 2])
    assert float(hvd.shard_loss(loss)(y, predictions)) == float(loss(y, predictions)) == 3.5
    assert float(hvd.shard_loss(loss)(y, predictions, weights)) == float(loss(y, predictions, weights)) == 4.5


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        (keras.losses.mean_squared_error, "Write keras.losses.MeanSquaredError()"),
        ("mse", "was given 'mse'"),
        (keras.losses.MeanSquaredError(reduction=None), "Give it reduction='sum_over_batch_size'"),
    ],
)
def test_what_cannot_be_weighed_is_refused(given, fix):
    with pytest.raises(hvd.UsageError) as caught:
        hvd.shard_loss(given)
    assert fix in str(caught.value)


def test_the_flag_chooses_whether_sizes_are_exchanged(monkeypatch):
    from hvdkit.optimizers import batch_sizes, heartbeat

    beat, sizes = heartbeat.Heartbeat(), batch_sizes.BatchSizes()
    monkeypatch.setattr(heartbeat, "current", lambda: beat)
    asked = []

    def factor(examples):
        def sum_over_ranks(mine):
            asked.append(float(mine))
            return mine + 4.0

        return float(sizes.factor(tf.constant(examples), 2, sum_over_ranks)), beat.payload().numpy()[3]

    assert sizes.compares  # outside of fit
    assert factor(12.0) == (1.5, 0)
    assert sizes.compared() == 12
    sizes.compare(False)
    assert factor(2.0) == (1, 2), "the heartbeat tells the others"
    assert sizes.compared() == 12
    sizes.compare(True)
    assert factor(0.0) == (0, 0)
    assert asked == [12, 0]


@pytest.mark.parametrize("ranks", [[0, 1], [0, 1, 2], [1, 3], list(range(8))])
def test_the_heartbeat_shows_batches_of_different_sizes(monkeypatch, ranks):
    from hvdkit import world
    from hvdkit.optimizers import heartbeat

    def differ(sizes):
        beat, sent = heartbeat.Heartbeat(), []
        for rank, size in zip(ranks, sizes, strict=True):
            monkeypatch.setattr(world, "rank", lambda rank=rank: rank)
            beat.note_batch(size)
            sent.append(beat.payload().numpy())
        total = tf.constant(np.sum(sent, axis=0) * np.float32(1 / len(ranks)) * np.float32(len(ranks)))
        beat.receive(total, ranks)
        assert (beat.read(), beat.leaving()) == ((1.0, 0), 0)
        return beat.had_unequal_batches()

    for size in (0, 1, 7, 32, 1000, 4096):
        assert not differ([size] * len(ranks))
    for size in (1, 32, 1000):
        assert all(differ([size - (place == other) for place in range(len(ranks))]) for other in range(len(ranks)))
        assert differ([size - (place > 0) for place in range(len(ranks))])
