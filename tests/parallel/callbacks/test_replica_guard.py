"""A replica that is no longer a replica is found, named and, if asked, mended."""

import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import forked
from tests.conftest import run_command


def _fit(world, harms, *, steps_per_execution=1, epochs=1, steps=6, **guard):
    """Trains, with `harms`: what is done to one rank's model (all: None) after which step. The error, and the model."""
    import keras

    import hvdkit as hvd

    class Harm(keras.callbacks.Callback):
        step = 0

        def on_train_batch_end(self, batch, logs=None):
            self.step += steps_per_execution
            rank, harm = harms.get(self.step, (None, None))
            if harm and rank in (None, world.rank):
                harm(self.model)

    keras.utils.set_random_seed(1)
    frozen = keras.layers.Dense(4, name="frozen")
    frozen.trainable = False
    dense = [keras.layers.Dense(8, name="first"), keras.layers.Dense(1, name="last")]
    between = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
    model = keras.Sequential([keras.layers.Input([4]), frozen, dense[0], *between, dense[1]])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01))
    model.compile(optimizer, "mse", metrics=["mae"], jit_compile=False, steps_per_execution=steps_per_execution)
    x = np.random.default_rng(world.rank).normal(size=(steps * 4, 4)).astype("float32")
    chosen = [*hvd.callbacks.standard(guard_every=0), Harm(), hvd.callbacks.ReplicaGuardCallback(**guard)]
    try:
        model.fit(x, x[:, :1], batch_size=4, epochs=epochs, verbose=0, callbacks=chosen)
    except hvd.ReplicasDiverged as error:
        return str(error), model
    return None, model


def _flip(variable, bit=0):
    value = np.array(variable)
    value.reshape(-1).view(np.uint32)[-1] ^= np.uint32(1 << bit)
    variable.assign(value)


def _flip_kernel(model):
    _flip(model.get_layer("first").kernel)


def _move_seed(model):
    state = model.layers[3].seed_generator.state
    state.assign(np.asarray(state) + np.array([0, 1], "uint32"))


def harmed():
    import hvdkit as hvd

    world = hvd.init()

    def not_a_number(model):
        value = np.array(model.get_layer("last").bias)
        value.view(np.uint32)[...] = 0x7FC00000 + (world.rank == 2)
        model.get_layer("last").bias.assign(value)

    harms = {
        3: (1, _flip_kernel),
        6: (2, lambda model: _flip(model.optimizer.variables[-1], 30)),
        8: (1, lambda model: _flip(model.get_layer("frozen").kernel, 31)),
        10: (1, lambda model: model.optimizer.learning_rate.assign(0.02)),
        12: (1, _move_seed),
        15: (None, not_a_number),  # after the last check
    }
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("hvdkit.callbacks.replica_guard").addHandler(handler)
    error, model = _fit(world, harms, epochs=3, steps=5, every=2, action="broadcast")
    state = b"".join(np.asarray(v).tobytes() for v in [*model.trainable_variables, *model.optimizer.variables])
    seed = np.asarray(model.layers[3].seed_generator.state).tolist()
    minority, _ = _fit(world, {4: (0, _flip_kernel)}, every=3, action="broadcast", steps_per_execution=2)
    return said, error, state, seed, minority


def test_a_rank_that_differs_is_found_named_and_mended(ranks):
    said, errors, states, seeds, minority = zip(*ranks(3, harmed, timeout=400), strict=True)
    expected = [
        (4, 1, "first/kernel"),
        (6, 2, "last_bias_velocity"),
        (8, 1, "frozen/kernel"),
        (10, 1, "learning_rate"),
        (12, 1, "seed_generator_state"),
        (15, 2, "last/bias"),
    ]
    for warnings in said:
        assert len(warnings) == len(expected), "a healthy step was taken for a harmed one, or the other way round"
        for warning, (step, rank, variable) in zip(warnings, expected, strict=True):
            assert f"differ at step {step}:" in warning
            assert f"{variable} on rank(s) {rank} is not that of the others (of 3 ranks)" in warning
            assert "All ranks take the state of rank 0 and continue" in warning
    assert set(errors) == {None}
    assert len(set(states)) == 1
    assert [len(set(part)) for part in zip(*seeds, strict=True)] == [3, 1], "seeds stay apart, their counters are one"
    for message in minority:
        assert "differ at step 4: " in message
        assert "first/kernel on rank(s) 0 is not that of the others" in message


def stopped():
    import hvdkit as hvd

    return _fit(hvd.init(), {4: (1, _flip_kernel)}, every=3)[0]


def test_all_ranks_stop_together(ranks):
    """Two ranks cannot tell which of them is right."""
    for message in ranks(2, stopped):
        assert "differ at step 6: " in message
        assert "first/kernel on rank(s) 1 is not that of rank 0 (of 2 ranks). They were equal at step 3." in message


@pytest.mark.slow
def test_its_cost_can_be_measured():
    """README has the figures; a machine that does much else says nothing about them."""
    program = Path(__file__).parents[1] / "guard_cost.py"
    command = [sys.executable, "-m", "hvdkit.launch", "-np", 2, "--", *forked.command(program, "mnist_mlp:28x28x1:64")]
    ended = run_command(command, timeout=300)
    assert ended.code == 0, ended.output
    (percent,) = re.findall(r"with every=500 ([\d.]+)% of the training", ended.output)
    assert float(percent) > 0, ended.output
