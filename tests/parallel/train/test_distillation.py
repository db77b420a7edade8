"""Keras' Distiller on two ranks: the numbers of one process."""

import json
import re

import keras
import numpy as np
import pytest

from hvdkit.data import balance, pipeline
from hvdkit.data.sources import open_source
from tests import forked
from tests.conftest import run_command


def distill(shares, folder):
    """Returns the student's weights, the losses by epoch, and whether the teacher is as it was."""
    import types

    import hvdkit as hvd
    from hvdkit.train import teacher

    hvd.init()
    source = open_source("digits")
    here = [share for share in range(shares) if share % hvd.size() == hvd.rank()]
    read = [pipeline.read_share(source, "train", share, shares, cache_bytes=1e9) for share in here]
    sampling = balance.Sampling("none", np.full(10, 10))
    batches = pipeline.training_batches(read, local_batch=8, steps_per_epoch=6, seed=0, sampling=sampling)
    keras.utils.set_random_seed(0)

    def classifier(*layers):
        first = [keras.layers.Input(source.shape), keras.layers.Rescaling(1 / 255), keras.layers.Flatten()]
        return keras.Sequential([*first, *layers, keras.layers.Dense(10)])

    known = classifier(keras.layers.Dense(16, "tanh"), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5))
    known.save(f"{folder}/{hvd.rank()}.keras")
    told = types.SimpleNamespace(teacher=f"{folder}/{hvd.rank()}.keras", temperature=3.0, student_loss_weight=0.5)
    student = classifier()
    before = student.get_weights()
    distiller = teacher.teach(student, "mine", source, None, told)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    distiller.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.5)), loss=loss, jit_compile=False)
    options = {"steps_per_epoch": 6, "verbose": 0, "shuffle": False, "callbacks": hvd.callbacks.standard()}
    fitted = distiller.fit(batches, epochs=2, **options)
    assert all(np.abs(one - other).max() > 1e-3 for one, other in zip(student.get_weights(), before, strict=True))
    pairs = zip(distiller.teacher.get_weights(), known.get_weights(), strict=True)
    is_kept = all(np.array_equal(one, other) for one, other in pairs)
    return (
        student.get_weights(),
        [fitted.history[name] for name in ("loss", "student_loss", "distillation_loss")],
        is_kept,
    )


def test_two_ranks_distill_like_one_process(ranks, tmp_path):
    ((weights, losses, is_kept),) = ranks(1, distill, shares=2, folder=str(tmp_path))
    assert is_kept
    assert losses[0] == pytest.approx([(hard + soft) / 2 for hard, soft in zip(*losses[1:], strict=True)], rel=1e-5)
    for ours, our_losses, ours_is_kept in ranks(2, distill, shares=2, folder=str(tmp_path)):
        assert ours_is_kept
        for one, other in zip(ours, weights, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(our_losses, losses, rtol=1e-5)


@pytest.mark.slow
def test_the_command_trains_a_student_and_compares_it_with_its_teacher(tmp_path):
    run, small = tmp_path / "run", tmp_path / "small"
    flags = ["--epochs=3", "--no-tensorboard"]
    trained = forked.command("-m", "hvdkit.train", "--strategy=single", f"--workdir={run}", *flags)
    assert run_command(trained, timeout=300).code == 0
    student = ["--model-args=hidden=(16,)", f"--workdir={small}", "--resume=never", *flags]
    ended = run_command(forked.command("-m", "hvdkit.distill", f"--teacher={run}", *student), timeout=300)
    assert ended.code == 0, ended.output
    result = json.loads((small / "result.json").read_text())
    assert (result["size"], result["parameters"], result["dataset"]) == (2, 64 * 16 + 16 + 16 * 10 + 10, "digits")
    theirs = json.loads((run / "result.json").read_text())
    assert result["teacher"]["test_accuracy"] == pytest.approx(theirs["test_accuracy"])
    assert result["test_accuracy"] > 0.7
    assert re.search(rf"^student +1,210 +{result['test_loss']:.4f} +{result['test_accuracy']:.4f}$", ended.output, re.M)
    model = keras.saving.load_model(small / "model.keras")
    assert model.count_params() == 1210, "the student alone"
