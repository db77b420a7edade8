"""Replicas stay one model: what is broadcast, what is averaged, and what a run without hvdkit does."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests import forked
from tests.conftest import run_command


def _data(rank, examples=96):
    generator = np.random.default_rng(100 + rank)
    return generator.normal(size=(examples, 8)).astype("float32"), generator.integers(3, size=examples)


def _model(seed, extra=()):
    import keras

    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [keras.layers.Input([8]), keras.layers.Dense(16, activation="relu"), *extra, keras.layers.Dense(3)]
    )


def _checksum(model):
    return hashlib.sha256(b"".join(np.ascontiguousarray(w).tobytes() for w in model.get_weights())).hexdigest()


def _fit(model, optimizer, rank, callbacks, epochs=2):
    import keras

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, metrics=["accuracy"], jit_compile=False)
    return model.fit(*_data(rank), batch_size=16, epochs=epochs, verbose=0, shuffle=False, callbacks=callbacks)


def trained_from_different_seeds(wrapped):
    import keras

    import hvdkit as hvd

    world = hvd.init()
    optimizer = keras.optimizers.Adam(1e-2)
    model = _model(seed=world.rank)
    before = _checksum(model)
    if wrapped:
        optimizer = hvd.DistributedOptimizer(optimizer)
    try:
        _fit(model, optimizer, world.rank, hvd.callbacks.standard())
    except hvd.ReplicasDiverged as error:
        return before, str(error), _checksum(model)
    return before, None, _checksum(model)


def test_ranks_with_different_seeds_end_with_identical_weights(ranks):
    before, errors, after = zip(*ranks(3, trained_from_different_seeds, wrapped=True), strict=True)
    assert len(set(before)) == 3
    assert set(errors) == {None}
    assert len(set(after)) == 1


def test_without_the_wrapper_they_do_not_and_are_told(ranks):
    _, errors, after = zip(*ranks(2, trained_from_different_seeds, wrapped=False), strict=True)
    assert len(set(after)) == 2
    assert all("The replicas differ at step 12: " in error for error in errors), errors


def checksums(library):
    two_ranks = Path(__file__).parents[1] / "two_ranks.py"
    ended = run_command(
        [sys.executable, "-m", "hvdkit.launch", "-np", 2, "--", *forked.command(two_ranks, library)], timeout=120
    )
    assert ended.code == 0, ended.output
    return re.findall(r"rank \d has the weights (\w+)", ended.output)


def test_the_problem_that_hvdkit_solves_is_still_there():
    """If this fails, Horovod has learnt Keras 3, and the README's first page has to be written anew."""
    first, second = checksums("horovod.tensorflow.keras")
    assert first != second


def test_the_same_program_with_hvdkit_trains_one_model():
    first, second = checksums("hvdkit")
    assert first == second


def broadcast_by_horovods_own_keras_layer():
    import horovod.tensorflow.keras as hvd
    import keras

    hvd.init()
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    try:
        _fit(_model(seed=0), keras.optimizers.Adam(1e-2), hvd.rank(), [callback], epochs=1)
    except AttributeError as error:
        return str(error)


def test_horovods_own_broadcast_still_crashes_on_keras_3(ranks):
    for error in ranks(2, broadcast_by_horovods_own_keras_layer, fresh=True):
        assert error == "'Variable' object has no attribute 'ref'"


def values_at_the_first_step():
    import keras

    import hvdkit as hvd

    world = hvd.init()
    dropout = keras.layers.Dropout(0.5)
    model = _model(world.rank, [keras.layers.BatchNormalization(momentum=0.5), dropout])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.0, momentum=0.9))
    seen = {}

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 0 and not seen:
                seen["weights"] = _checksum(self.model)
                seen["slots"] = [np.asarray(v).tolist() for v in self.model.optimizer.variables]

    model.build((None, 8))
    model.compile(optimizer, loss="mse")
    model.optimizer.build(model.trainable_variables)
    model.optimizer.variables[2].assign_add(np.full(model.optimizer.variables[2].shape, float(world.rank)))
    _fit(model, optimizer, world.rank, [*hvd.callbacks.standard(), Watch()], epochs=1)
    seed = keras.ops.convert_to_numpy(dropout.seed_generator.state).tolist()
    return seen, seed, [np.asarray(v).tolist() for v in model.layers[1].non_trainable_variables]


def test_all_state_is_common_before_the_first_step_and_dropout_differs(ranks):
    (first, seed, moving), (second, other_seed, other_moving) = ranks(2, values_at_the_first_step)
    assert first == second, "weights and optimizer slots must be equal before the first step"
    assert seed[0] != other_seed[0], "ranks with equal seeds drop the same units"
    assert seed[1] == other_seed[1]
    assert moving == other_moving, "moving statistics are averaged at the end"


def seeds_without_a_callback():
    import keras

    import hvdkit as hvd

    world = hvd.init()
    model = _model(0, [keras.layers.Dropout(0.5), keras.layers.Dropout(0.5, seed=7)])  # the same seeds on all ranks
    seeds = [v for v in model.variables if v.path.endswith("seed_generator_state")]
    found = []
    for _ in range(2):
        _fit(model, hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), world.rank, [], epochs=1)
        found.append([np.asarray(v).tolist() for v in seeds])
    return found


def test_ranks_with_one_seed_drop_different_units_without_a_callback_too(ranks):
    (first, again), (other, other_again) = ranks(2, seeds_without_a_callback)
    for before, after, theirs, theirs_after in zip(first, again, other, other_again, strict=True):
        assert before[0] != theirs[0], "ranks with equal seeds drop the same units"
        assert (before[0], theirs[0]) == (after[0], theirs_after[0]), "what differs is left as it is"
        assert before[1] == theirs[1] == 6 < after[1], "both have drawn as often"
    assert len(first) == 2


def trained_where_rank_0_made_another_model_first():
    import keras

    import hvdkit as hvd

    world = hvd.init()
    if world.is_root:  # Keras now numbers this rank's models and optimizers differently
        _model(seed=7).compile(keras.optimizers.Adam())
    model = _model(seed=world.rank)
    _fit(model, hvd.DistributedOptimizer(keras.optimizers.Adam(1e-2)), world.rank, hvd.callbacks.standard(), epochs=1)
    return _checksum(model)


def test_ranks_need_not_have_made_as_many_models(ranks):
    first, second = ranks(2, trained_where_rank_0_made_another_model_first, timeout=120)
    assert first == second


def exact_metrics():
    import keras

    import hvdkit as hvd

    world = hvd.init()
    generator = np.random.default_rng(0)
    inputs, labels = generator.normal(size=(100, 8)).astype("float32"), generator.integers(2, size=(100, 1))
    mine = [slice(0, 71), slice(71, 100)][world.rank]  # uneven on purpose

    def make():
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.layers.Input([8]), keras.layers.Dense(1, activation="sigmoid")])
        metrics = ["accuracy", keras.metrics.AUC(name="auc")]
        optimizer = keras.optimizers.SGD(0.0)  # the weights stay: what is compared are the metrics alone
        model.compile(optimizer, loss="binary_crossentropy", metrics=metrics, jit_compile=False)
        return model

    alone = make().fit(inputs, labels, batch_size=100, validation_data=(inputs[:90], labels[:90]), verbose=0)
    validation = [slice(0, 19), slice(19, 90)][world.rank]
    ours = make().fit(
        inputs[mine],
        labels[mine],
        batch_size=100,
        validation_data=(inputs[validation], labels[validation]),
        callbacks=[hvd.callbacks.MetricAverageCallback()],
        verbose=0,
    )
    plain = make().fit(inputs[mine], labels[mine], batch_size=100, verbose=0)
    return [{name: values[-1] for name, values in h.history.items()} for h in (ours, alone, plain)]


def test_metrics_are_exact_over_uneven_shards(ranks):
    results = ranks(2, exact_metrics)
    for ours, alone, _ in results:
        assert set(ours) == set(alone)
        assert len(ours) == 6
        for name, value in alone.items():
            assert abs(ours[name] - value) < 1e-6, f"{name}: {ours[name]} of all ranks, {value} of one process"
    assert results[0][2]["loss"] != results[1][2]["loss"], "the shares' own losses must differ, or nothing is proved"


def saved(path):
    import keras

    import hvdkit as hvd

    world = hvd.init()
    model = _model(seed=0)
    _fit(model, hvd.DistributedOptimizer(keras.optimizers.Adam(3e-3)), world.rank, hvd.callbacks.standard())
    if world.is_root:
        model.save(path)
    return model.optimizer.iterations.numpy().item(), np.asarray(model.optimizer.variables[2]).tolist()


def test_the_saved_model_opens_in_plain_keras(ranks, tmp_path):
    path = tmp_path / "x.keras"
    (iterations, slot), _ = ranks(2, saved, path=str(path))
    program = f"""
import sys
sys.modules["hvdkit"] = sys.modules["horovod"] = None  # importing either raises ImportError
import keras, numpy, json
model = keras.models.load_model({str(path)!r})
assert type(model.optimizer) is keras.optimizers.Adam and model.compiled, model.optimizer
rate = float(numpy.asarray(model.optimizer.learning_rate))
print(json.dumps([int(model.optimizer.iterations.numpy()), numpy.asarray(model.optimizer.variables[2]).tolist(), rate]))
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    loaded_iterations, loaded_slot, rate = json.loads(printed)
    assert loaded_iterations == iterations == 12
    assert loaded_slot == slot
    assert np.abs(slot).max() > 0
    assert abs(rate - 3e-3) < 1e-9
