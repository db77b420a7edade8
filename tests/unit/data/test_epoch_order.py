"""An epoch that changes hands: every example is still seen once."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from hvdkit.data import balance, pipeline
from hvdkit.data.epoch_order import Stretch, stream_seed, untouched
from hvdkit.data.sources import ArraySource

EXAMPLES, GLOBAL_BATCH, SEED, EPOCH = 133, 12, 5, 3
STEPS = EXAMPLES // GLOBAL_BATCH
IMAGES = np.arange(EXAMPLES, dtype=np.uint8).reshape(-1, 1, 1, 1)  # image i has the value i
SOURCE = ArraySource("test", "image", ["a"], {"train": (IMAGES, np.zeros(EXAMPLES, int))})
NONE = balance.Sampling("none", np.array([EXAMPLES]))
LIMITS = {"in memory": 1e12, "streamed": 0}


def ranks(number, limit, stretches):
    """The batches of every rank from where `stretches` end, what was handed over, and the buffers now."""
    shares = [pipeline.read_share(SOURCE, "train", s, number, cache_bytes=limit) for s in range(number)]
    buffers = None if limit else [share.buffer() for share in shares]
    found = [
        pipeline.start_of(
            EPOCH, stretches, SOURCE, [share], buffers, seed=SEED, global_batch=GLOBAL_BATCH, steps_per_epoch=STEPS
        )
        for share in shares
    ]
    starts, handed_over = [start for start, _ in found], found[0][1]
    streams = [
        pipeline.training_batches(
            [share], local_batch=GLOBAL_BATCH // number, steps_per_epoch=STEPS, seed=SEED, sampling=NONE, start=start
        )
        for share, start in zip(shares, starts, strict=True)
    ]
    now = [rest.buffer() for start in starts for rest in start.rest] if handed_over else buffers
    return streams, handed_over, now


def ids(batches, steps):
    return [np.asarray(b[0]).ravel().astype(int).tolist() for b in itertools.islice(batches, steps)]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("numbers", [(2, 3), (3, 1, 4), (2, 4, 2, 3), (4, 4, 2)])
def test_each_example_is_seen_once_whoever_goes_on(numbers, limit):
    """An epoch of 11 steps, of which each number of ranks takes two or three, and the last the rest."""
    stretches, seen = [], []
    for place, number in enumerate(numbers):
        streams, handed_over, buffers = ranks(number, LIMITS[limit], stretches)
        taken = sum(stretch.steps for stretch in stretches)
        steps = STEPS - taken if place == len(numbers) - 1 else 2 + place % 2
        batches = [ids(stream, steps) for stream in streams]
        assert all(len(batch) == GLOBAL_BATCH // number for rank in batches for batch in rank)
        seen += sum(sum(batches, []), [])
        steps += stretches[-1].steps if len(handed_over) < len(stretches) else 0  # the same ranks go on
        stretches = [*handed_over, Stretch(number, steps, None if buffers is None else tuple(buffers))]
        left = untouched(EXAMPLES, SEED, EPOCH, GLOBAL_BATCH, stretches)
        assert sorted(seen) == sorted(set(range(EXAMPLES)) - set(left.tolist()))
    assert len(seen) == len(set(seen)) == STEPS * GLOBAL_BATCH


@pytest.mark.parametrize("limit", LIMITS)
def test_the_same_ranks_go_on_in_the_same_order(limit):
    """In an ordinary epoch, and in one that was handed over to them before."""
    for before in ([], [Stretch(3, 2, None if LIMITS[limit] else (44, 44, 45))]):
        (whole, *_), handed_over, buffers = ranks(2, LIMITS[limit], before)
        expected = ids(whole, STEPS + 3)  # into the next epoch
        stretch = Stretch(2, 4, None if buffers is None else tuple(buffers))
        (again, *_), handed_over_again, _ = ranks(2, LIMITS[limit], [*before, stretch])
        assert ids(again, STEPS - 1) == expected[4:]
        assert handed_over_again == handed_over == before


def test_an_epoch_after_a_handover_is_as_ever():
    (handed, *_), _, _ = ranks(2, 1e12, [Stretch(3, 2, None)])
    share = pipeline.read_share(SOURCE, "train", 0, 2, cache_bytes=1e12)
    next_epoch = pipeline.training_batches(
        [share], local_batch=6, steps_per_epoch=STEPS, seed=SEED, sampling=NONE, start=pipeline.Start(EPOCH + 1)
    )
    assert ids(handed, STEPS + 2)[STEPS - 2 :] == ids(next_epoch, 4)


def test_an_order_goes_on_with_as_many_shares_and_the_same_buffers_only():
    assert Stretch(3, 5, None).goes_on(3, None)
    assert Stretch(2, 1, (4, 5)).goes_on(2, [4, 5])
    for shares, buffers in ((3, [4, 5]), (2, [5, 5]), (2, None)):
        assert not Stretch(2, 1, (4, 5)).goes_on(shares, buffers)


def test_each_epoch_share_and_rest_of_an_epoch_has_a_seed_of_its_own():
    seeds = [
        stream_seed(seed, epoch, share, 4, rest)
        for seed, epoch, share, rest in itertools.product(range(3), range(50), range(4), range(3))
    ]
    assert len(set(seeds)) == len(seeds) == 1800
    assert int(stream_seed(1, tf.constant(2, tf.int64), 3, 4)) == stream_seed(1, 2, 3, 4)


def test_a_stream_has_another_order_in_each_epoch():
    share = pipeline.read_share(SOURCE, "train", 0, 1, cache_bytes=0)
    batches = pipeline.training_batches(
        [share], local_batch=EXAMPLES, steps_per_epoch=1, seed=SEED, sampling=NONE, start=pipeline.Start()
    )
    first, second = ids(batches, 2)
    assert sorted(first) == sorted(second) == list(range(EXAMPLES))
    assert first != second


def test_stretches_survive_json():
    for stretch in (Stretch(3, 5, None), Stretch(2, 1, (4, 5))):
        assert Stretch.from_json(stretch.to_json()) == stretch
