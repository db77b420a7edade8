"""A long tail, augmentation, focal loss and class weights on two ranks: the numbers of one process."""

import json
import re
import types

import keras
import numpy as np
import pytest

from hvdkit.data import balance, pipeline
from hvdkit.data.augmentation import Augmentation
from hvdkit.data.sources import open_source
from hvdkit.train import objectives
from hvdkit.train.data import with_long_tail


def train_on_rare_classes(shares):
    """Trains with mixed and augmented images, class weights and the focal loss; each process feeds its shares."""
    import hvdkit as hvd

    hvd.init()
    source = with_long_tail(open_source("digits"), types.SimpleNamespace(long_tail=5.0))
    here = [share for share in range(shares) if share % hvd.size() == hvd.rank()]
    read = [pipeline.read_share(source, "train", share, shares, cache_bytes=1e9) for share in here]
    counts = np.bincount([label for _, label in source.read("train", 0, source.size("train")).as_numpy_iterator()])
    batches = pipeline.training_batches(
        read,
        local_batch=8,
        steps_per_epoch=6,
        seed=0,
        sampling=balance.Sampling("none", counts),
        class_weights=balance.effective_weights(counts, 0.999),
        augmentation=Augmentation(("flip", "crop", "mixup"), source.shape, 0),
        one_hot=10,
    )
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(10)]
    model = keras.Sequential([keras.layers.Input(source.shape), *layers])
    loss = objectives.loss_for(source.task, model, one_hot=True, focal=2.0)
    metrics = objectives.metrics_for(source.task, model, one_hot=True)
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.5)), loss=loss, metrics=metrics)
    fitted = model.fit(
        batches, epochs=2, steps_per_epoch=6, verbose=0, shuffle=False, callbacks=hvd.callbacks.standard()
    )
    test = pipeline.read_share(source, "test", hvd.rank(), hvd.size(), cache_bytes=1e9)
    judged = pipeline.evaluation_batches(test, 50, 10)
    confusion = objectives.confusion(model, judged, 10)
    return model.get_weights(), fitted.history["loss"], np.sum(hvd.allgather_object(confusion), axis=0), counts.tolist()


def test_two_ranks_train_and_count_classes_like_one_process(ranks):
    ((weights, losses, counts, tail),) = ranks(1, train_on_rare_classes, shares=2)
    assert (tail[0], tail[-1]) == (139, 28)
    for ours, our_losses, our_counts, our_tail in ranks(2, train_on_rare_classes, shares=2):
        assert our_tail == tail
        for one, other in zip(ours, weights, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
        assert our_losses == pytest.approx(losses, rel=1e-5)
        assert our_counts.sum() == counts.sum() == 360
        assert np.abs(our_counts - counts).sum() <= 4, "but for images between two classes"


@pytest.mark.slow
def test_the_main_job_augments_and_says_how_each_class_is_recognized(train, tmp_path):
    flags = ["--augment=crop,mixup", "--focal=1", "--effective-number=0.99", "--epochs=12", "--eval-every=4"]
    flags += ["--long-tail=3"]
    ended = train(2, *flags, "--workdir=w", "--no-tensorboard")
    assert ended.code == 0, ended.output
    assert "class weights: " in ended.output
    found = re.search(r"digits: (\d+) training examples: 0 (\d+), .*, 9 (\d+)", ended.output)
    assert 700 < int(found[1]) < 1000
    assert int(found[2]) / int(found[3]) == pytest.approx(3, rel=0.02)
    result = json.loads((tmp_path / "w" / "result.json").read_text())
    assert result["test_accuracy"] > 0.8
    classes = result["test_classes"]
    assert list(classes) == [str(digit) for digit in range(10)]
    assert sum(found["examples"] for found in classes.values()) == 360
    hits = sum(found["recall"] * found["examples"] for found in classes.values())
    assert hits / 360 == pytest.approx(result["test_accuracy"])
    recalls = [found["recall"] for found in classes.values()]
    assert result["test_balanced_accuracy"] == pytest.approx(np.mean(recalls))
