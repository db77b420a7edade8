"""When steps may be joined, and what a joined function does."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdkit.callbacks import LearningRateWarmupCallback, standard
from hvdkit.errors import UsageError
from hvdkit.model import executions
from hvdkit.model.executions import JoinedFunction, may_join


class SeesBatches(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        pass


def model(**options):
    made = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    made.compile("sgd", "mse", **options)
    return made


@pytest.mark.parametrize(
    ("callback", "joined"),
    [
        (keras.callbacks.EarlyStopping(), True),
        (keras.callbacks.ModelCheckpoint("m.keras"), True),
        (keras.callbacks.ModelCheckpoint("m.keras", save_freq=3), False),
        (keras.callbacks.LambdaCallback(on_epoch_end=print), True),
        (keras.callbacks.LambdaCallback(on_train_batch_end=print), False),
        (SeesBatches(), False),
        (LearningRateWarmupCallback(0.1, 2), False),
    ],
)
def test_a_callback_that_looks_at_batches_prevents_it(callback, joined):
    assert may_join(model(), [*standard(), callback]) is joined


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 4}])
def test_what_the_user_has_compiled_comes_first(options):
    assert may_join(model(jit_compile=False), [])
    assert not may_join(model(**{"jit_compile": False, **options}), [])


def test_the_environment_turns_it_off_and_is_checked(monkeypatch):
    monkeypatch.setenv("HVDKIT_STEPS_PER_EXECUTION", "1")
    assert not may_join(model(), [])
    monkeypatch.setenv("HVDKIT_STEPS_PER_EXECUTION", "many")
    with pytest.raises(UsageError, match="must be a number of steps, 1 or more, but is 'many'"):
        may_join(model(), [])


def test_a_joined_function_runs_its_steps_once_and_then_is_keras_own():
    seen = tf.Variable(0)

    def step(value):
        seen.assign_add(tf.cast(value >= 0, tf.int32))
        return {"loss": tf.cast(value, tf.float32)}

    joined = JoinedFunction(step, original=lambda iterator: ("Keras", next(iterator).numpy()))
    data = iter(tf.data.Dataset.range(6))
    joined.steps = 4
    assert (joined(data)["loss"].numpy(), seen.numpy()) == (3.0, 4)
    assert joined(data) == ("Keras", 4)
    joined.steps = 9
    with pytest.raises(StopIteration):
        joined(data)
    assert seen.numpy() == 5, "the step whose data were there"


def test_a_second_fit_does_not_trace_again():
    made = model()
    made.make_train_function()
    assert executions._joined(made) is executions._joined(made)
    first = executions._joined(made)
    made.make_train_function(force=True)
    assert executions._joined(made) is not first
    assert np.isfinite(made.predict(np.zeros([1, 3]), verbose=0)).all()
