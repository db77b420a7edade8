"""The strategy `multiworker`: the numbers of the others, `fit` as it is, and a cluster made of the ranks."""

import csv
import os
import re
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

from tests import forked
from tests.parallel.optimizers import test_parity as parity

# ---- Parity ------------------------------------------------------------------------------------------------------


def multiworker_against_one_process(names):
    from hvdkit import strategies

    strategy = strategies.create("multiworker")
    mine = slice(strategy.world.rank * parity.LOCAL_BATCH, (strategy.world.rank + 1) * parity.LOCAL_BATCH)
    differences = {}
    for kind in ("dense", "sparse"):
        inputs, labels = parity._examples(kind, strategy.size)
        for name in names:
            reference = parity._train(parity._model(kind, parity._optimizer(name)), inputs, labels)
            with strategy.scope():
                model = parity._model(kind, strategy.distribute(parity._optimizer(name)))
            ours = parity._train(model, inputs[:, mine], labels[:, mine])
            a_step = parity._difference(ours[1:], ours[:-1])
            differences[f"{name}, {kind}"] = parity._difference(ours, reference), a_step
    return differences


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "names"), [(2, [*parity.SOME, *parity.OTHERS]), (3, parity.SOME)])
def test_workers_equal_one_process(ranks, workers, names):
    for differences in ranks(workers, multiworker_against_one_process, fresh=True, names=names, timeout=500):
        assert len(differences) == 2 * len(names)
        assert {name: d for name, d in differences.items() if not d[0] < 1e-5 < 1e-4 < d[1]} == {}


# ---- fit ---------------------------------------------------------------------------------------------------------


def _data(rank):
    """A training set of equal shares, and a test set of 19 and 71 examples."""
    import tensorflow as tf

    generator = np.random.default_rng(5)
    inputs = generator.normal(size=(250, 8)).astype("float32")
    labels = (inputs.sum(axis=1) + generator.normal(size=250) > 0).astype("float32")[:, None]

    def batches(start, stop):
        return tf.data.Dataset.from_tensor_slices((inputs[start:stop], labels[start:stop])).batch(16)

    return batches(80 * rank, 80 * rank + 80), batches(*[(160, 179), (179, 250)][rank])


def _model(distribute, rank, **compile_options):
    keras.utils.set_random_seed(rank)  # the workers begin with different weights
    model = keras.Sequential(
        [
            keras.layers.Input([8]),
            keras.layers.Dense(16, "relu"),
            keras.layers.BatchNormalization(momentum=0.8),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(1, "sigmoid", dtype="float64"),
        ]
    )
    metrics = ["accuracy", keras.metrics.AUC(name="auc")]
    options = {"loss": "binary_crossentropy", "metrics": metrics, "jit_compile": False, **compile_options}
    model.compile(distribute(keras.optimizers.Adam(0.02, clipnorm=0.5)), **options)
    return model


def _fit(model, strategy):
    import hvdkit as hvd

    train, test = _data(strategy.world.rank)
    callbacks = [
        *strategy.callbacks(),
        hvd.callbacks.LearningRateWarmupCallback(None, 2),
        keras.callbacks.ReduceLROnPlateau("val_loss", patience=1, min_delta=0.02),
        keras.callbacks.EarlyStopping("val_auc", patience=4, min_delta=0.03, mode="max", restore_best_weights=True),
    ]
    history = model.fit(
        train,
        epochs=40,
        initial_epoch=1,
        validation_data=test,
        class_weight={0: 1.0, 1: 3.0},
        callbacks=callbacks,
        verbose=0,
    )
    return {name: np.asarray(values, float).tolist() for name, values in history.history.items()}, history.epoch


def fitted_by_both_strategies(path):
    import hvdkit as hvd
    from hvdkit import collectives, strategies

    strategy = strategies.create("multiworker")
    rank = strategy.world.rank
    result = {"options": _refused(lambda: strategy.distribute(keras.optimizers.SGD(), compression=1))}
    result["horovod"] = _fit(_model(hvd.DistributedOptimizer, rank, steps_per_execution=5), strategy)
    model = _model(strategy.distribute, rank, steps_per_execution=5)
    result["multiworker"] = _fit(model, strategy)
    result["digest"] = collectives.digest(model.weights)
    if strategy.world.is_root:  # alone
        model.save(path)
    result["evaluated"] = strategy.evaluate(model, _data(rank)[1])
    result["evaluated alone"] = model.evaluate(_data(0)[1].concatenate(_data(1)[1]), return_dict=True, verbose=0)
    # From here on each worker is given batches of its own size, and traces the step at other times than the other.
    for size in (7, 16, 3) if rank else (16, 16, 16):
        model.train_on_batch(np.ones([size, 8]), np.zeros([size, 1]))
    eager = _model(strategy.distribute, 0, run_eagerly=True)
    eager.train_on_batch(np.full([4, 8], rank), np.zeros([4, 1]))
    trainable = [[*m.trainable_weights, *m.optimizer.variables] for m in (model, eager)]
    result["later digests"] = [collectives.digest(variables) for variables in trainable]
    return result


def _refused(action):
    from hvdkit import UsageError

    try:
        action()
    except UsageError as error:
        return str(error)


@pytest.mark.slow
def test_fit_behaves_as_with_horovod(ranks, tmp_path):
    path = tmp_path / "model.keras"
    results = ranks(2, fitted_by_both_strategies, fresh=True, path=str(path))
    first, second = results
    assert first["multiworker"] == second["multiworker"]
    assert first["digest"] == second["digest"]
    assert first["later digests"] == second["later digests"]
    history, epochs = first["multiworker"]
    expected, expected_epochs = first["horovod"]
    assert epochs == expected_epochs
    assert epochs[0] == 1
    assert 4 < len(epochs) < 39, "EarlyStopping must decide, or nothing is proved"
    assert len(set(history["learning_rate"])) > 3, "the warm-up and ReduceLROnPlateau must have set the rate"
    assert set(history) == set(expected) >= {"auc", "val_accuracy", "val_auc", "val_loss"}
    for name, values in history.items():
        assert values == pytest.approx(expected[name], rel=1e-4), name
    assert first["evaluated"] == second["evaluated"] == pytest.approx(first["evaluated alone"], rel=1e-5)
    assert "--strategy=multiworker has no compression" in first["options"]
    _opens_in_plain_keras(path)


def stopped_by_one_worker():
    from hvdkit import strategies

    strategy = strategies.create("multiworker")
    rank = strategy.world.rank
    model = _model(strategy.distribute, rank)

    def leave(batch, logs=None):
        if rank == 1 and batch == 2:
            model.stop_training = True

    callbacks = [*strategy.callbacks(), keras.callbacks.LambdaCallback(on_train_batch_end=leave)]
    history = model.fit(_data(rank)[0], epochs=5, callbacks=callbacks, verbose=0)
    return history.epoch, model.optimizer.iterations.numpy().item()


@pytest.mark.slow
def test_all_workers_leave_with_the_one_that_wants_to(ranks):
    first, second = ranks(2, stopped_by_one_worker, fresh=True)
    assert first == second == ([0], 5), "at the end of the epoch"


def _opens_in_plain_keras(path):
    program = f"""
import sys
sys.modules["hvdkit"] = sys.modules["horovod"] = None  # importing either raises ImportError
import keras
model = keras.models.load_model({str(path)!r})
print(type(model.optimizer).__name__, model.compiled)
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["Adam", "True"]


# ---- The cluster -------------------------------------------------------------------------------------------------


def refused_on_one_rank():
    import tensorflow as tf

    from hvdkit import strategies

    rank = int(os.environ["HOROVOD_RANK"])
    messages = [_refused(lambda: strategies.create("multiworker", 3))]
    if rank == 1:
        os.environ["TF_CONFIG"] = "{}"
    messages.append(_refused(lambda: strategies.create("multiworker")))
    os.environ.pop("TF_CONFIG", None)
    if rank == 0:
        tf.constant(1)
    messages.append(_refused(lambda: strategies.create("multiworker")))
    return messages


def test_what_is_wrong_on_one_rank_is_refused_on_all(ranks):
    first, second = ranks(2, refused_on_one_rank, fresh=True, timeout=120)
    assert first == second
    for message, part in zip(
        first,
        [
            "--replicas=3, but 2 rank(s) were started. With --strategy=multiworker the launcher decides",
            "TF_CONFIG is set, but --strategy=multiworker makes its cluster of the ranks",
            "must be made once, and before TensorFlow makes its first tensor",
        ],
        strict=True,
    ):
        assert part in message


def killed_in_training():
    from hvdkit import strategies

    strategy = strategies.create("multiworker")
    rank = strategy.world.rank

    def die(batch, logs=None):
        if (rank, batch) == (1, 2):
            os.kill(os.getpid(), signal.SIGKILL)

    callbacks = [*strategy.callbacks(), keras.callbacks.LambdaCallback(on_train_batch_end=die)]
    _model(strategy.distribute, rank).fit(_data(rank)[0], epochs=1000, callbacks=callbacks, verbose=0)


@pytest.mark.slow
def test_a_dead_worker_ends_the_job(ranks):
    ended = ranks(2, killed_in_training, fresh=True, timeout=400, fails=True, env=forked.NOT_FORKED)
    assert ended.code == 128 + signal.SIGKILL, ended.output
    assert re.search(r"\nhvdkit\.launch: rank 1 on host \S+ was the first to fail, killed by SIGKILL", ended.output)


# ---- The main job ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_main_job_with_texts(train, tmp_path):
    rows = [("a dull and tedious film", "neg")] * 60 + [("a moving, brilliant film", "pos")] * 20
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    ended = train(
        3,
        "--strategy=multiworker",
        "--model=text_classifier",
        "--dataset=reviews.csv",
        "--workdir=w",
        "--local_batch=4",
        "--epochs=8",
        "--learning_rate=0.01",
        "--class_weights",
        "--precision=mixed_bfloat16",
    )
    assert ended.code == 0, ended.output
    assert "text_classifier on reviews.csv, multiworker, 3 replica(s): test accuracy 100.00%" in ended.output
    assert "on all 3 replica(s)" in ended.output


def test_the_main_job_refuses_compression(train):
    ended = train(2, "--strategy=multiworker", "--compression=fp16", timeout=120)
    assert ended.code == 2, ended.output
    assert "hvdkit.train: --compression has no use with --strategy=multiworker" in ended.output
