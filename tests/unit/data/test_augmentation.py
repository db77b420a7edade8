"""Augmented images: the same on any number of ranks and when resumed, others in each epoch, and mixed as labels say."""

import itertools

import numpy as np
import pytest

from hvdkit.data import balance, pipeline
from hvdkit.data.augmentation import Augmentation
from hvdkit.data.sources import ArraySource

EXAMPLES, CLASSES, STEPS = 36, 36, 3
IMAGES = np.random.default_rng(0).integers(256, size=[EXAMPLES, 12, 10, 3], dtype=np.uint8)
EACH = Augmentation(("flip", "crop"), IMAGES.shape[1:], 5)
LIMITS = {"in memory": 1e12, "streamed": 0}


def source_of(images, labels):
    return ArraySource("test", "image", [str(c) for c in range(CLASSES)], {"train": (images, labels)})


def batches_of(source, ranks, limit, augmentation, start=None, mode="none", here=None, one_hot=0):
    """The batches of each rank, or of one process with all shares."""
    shares = [pipeline.read_share(source, "train", rank, ranks, cache_bytes=limit) for rank in range(ranks)]
    sampling = balance.Sampling(mode, np.bincount(source.read("train", 0, 99).batch(99).get_single_element()[1]))
    options = {"seed": 2, "sampling": sampling, "start": start, "augmentation": augmentation, "one_hot": one_hot}
    return [
        pipeline.training_batches(part, local_batch=12 // ranks, steps_per_epoch=STEPS, **options)
        for part in ([shares] if here == "all" else [[share] for share in shares])
    ]


def by_label(streams, steps=STEPS):
    return {
        int(y): x
        for stream in streams
        for images, labels in itertools.islice(stream.as_numpy_iterator(), steps)
        for x, y in zip(images, labels, strict=True)
    }


def test_an_image_becomes_the_same_whoever_augments_it():
    source = source_of(IMAGES, np.arange(EXAMPLES))
    alone = by_label(batches_of(source, 1, LIMITS["in memory"], EACH))
    assert len(alone) == EXAMPLES
    assert alone[0].dtype == np.float32
    assert sum((alone[n] == IMAGES[n]).all() for n in alone) < EXAMPLES / 2
    for ranks, limit in ((2, "in memory"), (3, "streamed")):
        found = by_label(batches_of(source, ranks, LIMITS[limit], EACH))
        for n in range(EXAMPLES):
            np.testing.assert_array_equal(found[n], alone[n])
    (whole,) = batches_of(source, 1, LIMITS["streamed"], EACH)
    later = by_label([whole.skip(STEPS)])
    assert sum((later[n] == alone[n]).all() for n in range(EXAMPLES)) < EXAMPLES / 2, "another way in each epoch"
    for limit in LIMITS.values():
        (resumed,) = batches_of(source, 1, limit, EACH, pipeline.Start(1, 1))
        for n, image in by_label([resumed], STEPS - 1).items():
            np.testing.assert_array_equal(image, later[n])


def test_rand_augment_does_the_same_on_any_rank():
    source, rand = source_of(IMAGES, np.arange(EXAMPLES)), Augmentation(("rand",), IMAGES.shape[1:], 5)
    alone = by_label(batches_of(source, 1, LIMITS["streamed"], rand))
    first, _ = batches_of(source, 2, LIMITS["in memory"], rand)
    for n, image in by_label([first]).items():
        np.testing.assert_array_equal(image, alone[n])
    assert sum((alone[n] == IMAGES[n]).all() for n in alone) < EXAMPLES / 2


def test_flips_and_crops_keep_pixels():
    columns = np.tile(np.arange(1, 11, dtype=np.uint8)[:, np.newaxis], [EXAMPLES, 12, 1, 3])
    flip = Augmentation(("flip",), (12, 10, 3), 5)
    flipped = by_label(batches_of(source_of(columns, np.arange(EXAMPLES)), 1, 0, flip))
    ways = [image[0, :, 0].tolist() for image in flipped.values()]
    assert {tuple(way) for way in ways} == {tuple(range(1, 11)), tuple(range(10, 0, -1))}
    crop = Augmentation(("crop",), (12, 10, 3), 5)
    cropped = by_label(batches_of(source_of(columns, np.arange(EXAMPLES)), 1, 0, crop))
    first = [int(image[6, 4, 0]) for image in cropped.values()]
    assert set(first) == {3, 4, 5, 6, 7}, "moved by up to two pixels"


@pytest.mark.parametrize("names", [("mixup",), ("cutmix",), ("flip", "mixup", "cutmix")])
def test_mixed_labels_say_how_images_are_mixed_and_ranks_mix_like_one_process(names):
    values = np.arange(EXAMPLES, dtype=np.uint8)
    plain = np.broadcast_to(values[:, np.newaxis, np.newaxis, np.newaxis], [EXAMPLES, 8, 8, 1]).copy()
    source, mixing = source_of(plain, np.arange(EXAMPLES)), Augmentation(names, (8, 8, 1), 5)
    ranks = batches_of(source, 2, 1e12, mixing, one_hot=CLASSES)
    alone = batches_of(source, 2, 1e12, mixing, here="all", one_hot=CLASSES)
    mixed = 0
    for (x, y), *parts in zip(alone[0].take(STEPS), *ranks, strict=False):
        np.testing.assert_array_equal(x, np.concatenate([part[0] for part in parts]))
        np.testing.assert_array_equal(y, np.concatenate([part[1] for part in parts]))
        np.testing.assert_allclose(y.numpy().sum(axis=1), 1, atol=1e-6)
        means = x.numpy().mean(axis=(1, 2, 3))
        # CutMix takes the weight of a box with fractions of pixels.
        np.testing.assert_allclose(means, y.numpy() @ values, atol=9 if "cutmix" in names else 1e-3)
        mixed += int((y.numpy().max(axis=1) < 0.999).sum())
    assert mixed > EXAMPLES / 3


@pytest.mark.parametrize("limit", LIMITS)
def test_copies_of_an_example_are_augmented_differently(limit):
    labels = np.arange(EXAMPLES) // 30  # 30 of one class, 6 of the other, each five times
    streams = batches_of(source_of(IMAGES, labels), 1, LIMITS[limit], EACH, mode="over")
    seen = [image.tobytes() for x, y in streams[0].take(4).as_numpy_iterator() for image in x[y == 1]]
    assert len(seen) > 12
    assert len(set(seen)) > len(seen) / 2, "copies of six images"


def test_weights_by_the_effective_number():
    counts = np.array([1000, 100, 10, 0])
    weights = balance.effective_weights(counts, 0.99)
    expected = np.array([(1 - 0.99) / (1 - 0.99**n) for n in (1000, 100, 10)])
    np.testing.assert_allclose(weights[:3] / weights[0], expected / expected[0])
    assert weights[3] == 0
    assert (weights * counts).sum() == pytest.approx(counts.sum())
    np.testing.assert_allclose(balance.effective_weights(counts, 0.0)[:3], 1)
    nearly = balance.effective_weights(counts, 1 - 1e-9)
    np.testing.assert_allclose(nearly, balance.class_weights(counts), rtol=1e-3)


def test_mixed_labels_weigh_what_they_are_mixed_of():
    source = source_of(IMAGES, np.arange(EXAMPLES) % 2)
    share = pipeline.read_share(source, "train", 0, 1, cache_bytes=1e12)
    mixing = Augmentation(("mixup",), IMAGES.shape[1:], 5)
    sampling = balance.Sampling("none", np.array([18, 18]))
    options = {"sampling": sampling, "class_weights": np.array([1.0, 3.0]), "augmentation": mixing, "one_hot": 2}
    batches = pipeline.training_batches([share], local_batch=12, steps_per_epoch=3, seed=2, **options)
    _, labels, weights = next(batches.as_numpy_iterator())
    np.testing.assert_allclose(weights, labels @ [1, 3], rtol=1e-6)
