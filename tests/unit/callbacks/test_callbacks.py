import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdkit as hvd
from hvdkit import callbacks, world
from hvdkit.errors import UsageError

STEPS = 4


def fit(optimizer, *chosen, epochs=3, steps_per_execution=1):
    """The learning rate at each step of a training of `epochs` epochs of 4 steps, and the model."""
    model = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)])
    model.compile(optimizer, loss="mse", steps_per_execution=steps_per_execution)
    rates = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            rates.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    x = np.arange(16.0).reshape(8, 2) / 16
    history = model.fit(x, x[:, :1], batch_size=2, epochs=epochs, verbose=0, callbacks=[*chosen, Watch()])
    return rates, history.history, model


def test_warmup_rises_from_one_rank_to_all():
    warmup = callbacks.LearningRateWarmupCallback(initial_lr=0.8, warmup_epochs=2, size=4)
    rates, history, _ = fit(keras.optimizers.SGD(0.8), warmup)
    expected = [0.8 / 4 * (1 + (step + 1) / STEPS * 3 / 2) for step in range(2 * STEPS)] + [0.8] * STEPS
    assert rates == pytest.approx(expected)
    assert history["lr"] == pytest.approx([0.5, 0.8, 0.8])


def test_warmup_takes_the_size_of_the_job():
    world.enter(world.World(0, 2, 0, 2, 0, 1, "h1"))
    warmup = callbacks.LearningRateWarmupCallback(initial_lr=None, warmup_epochs=1)
    model = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1.0))
    warmup.set_model(model)
    warmup.set_params({"steps": STEPS})
    warmup.on_train_begin()
    warmup.on_epoch_begin(0)
    warmup.on_train_batch_begin(0)
    assert float(keras.ops.convert_to_numpy(model.optimizer.learning_rate)) == pytest.approx(0.5 * (1 + 1 / STEPS))


def test_warmup_ends_at_the_rate_where_executions_jump_over_the_last_step():
    warmup = callbacks.LearningRateWarmupCallback(initial_lr=0.8, warmup_epochs=0.6, size=4)
    rates, _, _ = fit(keras.optimizers.SGD(0.8), warmup, steps_per_execution=4)
    assert rates[-1] == pytest.approx(0.8)


def test_warmup_leaves_the_rate_to_others_afterwards():
    class Reduce(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.optimizer.learning_rate = 0.1

    warmup = callbacks.LearningRateWarmupCallback(initial_lr=0.8, warmup_epochs=1, size=4)
    rates, _, _ = fit(keras.optimizers.SGD(0.8), warmup, Reduce())
    assert rates[STEPS:] == pytest.approx([0.1] * 2 * STEPS)


class Rates(keras.callbacks.Callback):
    """Notes the rate at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))


def go_on(model, first, last, *chosen, batch=2):
    """Trains from one epoch to another; returns the rates at the ends of epochs."""
    rates, x = Rates(), np.arange(16.0).reshape(8, 2) / 16
    chosen = [c if isinstance(c, keras.callbacks.Callback) else c(None) for c in chosen]
    model.fit(
        x, x[:, :1], batch, initial_epoch=first, epochs=last, shuffle=False, verbose=0, callbacks=[*chosen, rates]
    )
    return rates.seen


def linear(rate=0.8, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(rate, momentum=0.5), loss="mse", run_eagerly=True, **options)  # traces no graph
    return model


def saved(model, path):
    model.save(path)
    loaded = keras.saving.load_model(path)
    loaded.run_eagerly = True
    return loaded


def warmup(rate):
    return callbacks.LearningRateWarmupCallback(rate, warmup_epochs=4, size=4)


def halves(rate):
    return callbacks.LearningRateScheduleCallback(rate, 0.5, start_epoch=4, end_epoch=6)


def tenth(rate):
    return callbacks.LearningRateScheduleCallback(rate, lambda _: 0.1, start_epoch=6)


@pytest.mark.parametrize("together", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_in_the_middle_of_schedules_training_goes_on_with_the_rates_of_a_whole_one(together, tmp_path):
    chosen = warmup, halves, tenth
    whole = linear(steps_per_execution=together)
    expected = go_on(whole, 0, 7, *chosen)
    for stop in (2, 5, 6):
        model = linear(steps_per_execution=together)
        rates = go_on(model, 0, stop, *chosen)
        loaded = saved(model, tmp_path / "half.keras")
        for again in (model, loaded):  # in the same process, and from the file
            assert rates + go_on(again, stop, 7, *chosen) == pytest.approx(expected)
            for ours, theirs in zip(again.get_weights(), whole.get_weights(), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_second_training_does_not_start_from_the_rate_of_an_unfinished_warmup(tmp_path, caplog):
    model = linear()
    first = [go_on(model, 0, 1, warmup) for _ in range(3)]
    assert first == [pytest.approx([0.8 / 4 * (1 + 3 / 4)])] * 3
    model.optimizer.learning_rate = 0.4  # set by the user, so it is the one to reach
    assert go_on(model, 0, 4, warmup)[-1] == pytest.approx(0.4)
    loaded = saved(model, tmp_path / "new.keras")
    assert go_on(loaded, 0, 4, warmup)[-1] == pytest.approx(0.4)
    assert "goes on in epoch" not in caplog.text


def test_a_rate_that_cannot_be_known_is_refused_and_one_that_is_concluded_is_said(tmp_path, caplog):
    model = linear()
    go_on(model, 0, 2, warmup)
    loaded = saved(model, tmp_path / "half.keras")
    with pytest.raises(UsageError, match=r"begins in epoch 3.*that after 8 steps, and 2 epochs of 2 steps are 4.*init"):
        go_on(loaded, 2, 4, warmup, batch=4)
    assert go_on(loaded, 2, 4, callbacks.LearningRateWarmupCallback(0.8, 4, size=4), batch=4)[-1] == pytest.approx(0.8)
    loaded = saved(model, tmp_path / "half.keras")
    go_on(loaded, 2, 4, warmup)
    assert "goes on in epoch 3 with a rate of 0.5, which it takes for 0.625 times 0.8" in caplog.text
    ended = linear(0.3)
    none = callbacks.LearningRateScheduleCallback(None, lambda epoch: max(0.0, 1 - epoch))
    go_on(ended, 0, 2, none)
    loaded = saved(ended, tmp_path / "ended.keras")
    with pytest.raises(UsageError, match="the rate was 0 times it"):
        go_on(loaded, 2, 3, callbacks.LearningRateScheduleCallback(None, lambda epoch: max(0.0, 1 - epoch)))


def test_a_staircase_by_a_number_and_by_a_function():
    decay = callbacks.LearningRateScheduleCallback(1.0, multiplier=0.5, start_epoch=1)
    rates, _, _ = fit(keras.optimizers.SGD(1.0), decay)
    assert rates == pytest.approx([1.0] * 8 + [0.5] * 4)
    smooth = callbacks.LearningRateScheduleCallback(1.0, lambda epoch: 1 / (1 + epoch), staircase=False, end_epoch=2)
    rates, _, _ = fit(keras.optimizers.SGD(1.0), smooth)
    assert rates == pytest.approx([1 / (1 + s / STEPS) for s in range(8)] + [1 / (1 + 7 / STEPS)] * 4)


@pytest.mark.parametrize("correct", [True, False])
def test_momentum_correction_scales_the_velocity(correct):
    model = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1.0, momentum=0.9), loss="mse")
    model.optimizer.build(model.trainable_variables)
    for velocity in model.optimizer.momentums:
        velocity.assign(np.ones(velocity.shape))
    schedule = callbacks.LearningRateScheduleCallback(1.0, lambda epoch: 0.5, momentum_correction=correct)
    schedule.set_model(model)
    schedule.set_params({"steps": STEPS})
    schedule.on_train_begin()
    schedule.on_epoch_begin(0)
    assert all(np.all(np.asarray(v) == (0.5 if correct else 1.0)) for v in model.optimizer.momentums)


def test_a_rate_that_is_a_schedule_is_refused():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    with pytest.raises(ValueError, match="learning rate is a CosineDecay, which sets itself at every step"):
        fit(keras.optimizers.SGD(schedule), callbacks.LearningRateWarmupCallback(None))


def test_an_unknown_number_of_steps_is_refused():
    schedule = callbacks.LearningRateScheduleCallback(1.0, lambda epoch: 1.0, staircase=False)
    schedule.set_model(keras.Sequential([keras.layers.Input([1])]))
    schedule.model.compile(keras.optimizers.SGD(1.0))
    schedule.set_params({})
    with pytest.raises(ValueError, match="Pass steps_per_epoch"):
        schedule.on_train_begin()


def test_a_full_disk_under_the_losses_does_not_end_training(caplog):
    losses = callbacks.StepLossCallback(pathlib.Path("/dev/full"), STEPS)
    rates, _, _ = fit(keras.optimizers.SGD(0.1), losses)
    assert len(rates) == len(losses.losses) == 3 * STEPS
    assert "/dev/full cannot be written (No space left on device). Training continues." in caplog.text


def test_tensorboard_shows_the_loss_of_each_step_and_the_rate_once(tmp_path):
    from hvdkit.train.callbacks import _TensorBoard

    losses = callbacks.StepLossCallback(tmp_path / "loss.csv", STEPS, tmp_path / "steps")
    schedule = callbacks.LearningRateScheduleCallback(0.1, lambda epoch: 0.5**epoch)
    fit(keras.optimizers.SGD(0.1), schedule, losses, _TensorBoard(tmp_path, write_graph=False))
    found = _summaries(tmp_path / "steps")
    assert [step for step, _ in found["loss_by_step"]] == list(range(1, 3 * STEPS + 1))
    assert [value for _, value in found["loss_by_step"]] == pytest.approx([loss for _, loss in losses.losses])
    rates = {name: values for name, values in _summaries(tmp_path / "train").items() if "l" in name and "r" in name}
    assert [value for _, value in rates["epoch_learning_rate"]] == pytest.approx([0.1, 0.05, 0.025])
    assert "epoch_lr" not in rates


def _summaries(folder):
    """By name, pairs of step and value that TensorBoard would show."""
    from tensorflow.core.util import event_pb2

    found = {}
    for file in folder.glob("events.*"):
        for record in tf.data.TFRecordDataset(str(file)):
            event = event_pb2.Event.FromString(record.numpy())
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, float(tf.make_ndarray(value.tensor))))
    return found


def test_stop_at_step():
    rates, _, _ = fit(keras.optimizers.SGD(0.1), callbacks.StopAtStepCallback(6, STEPS))
    assert len(rates) == 6


def test_other_ranks_than_0_are_silent(capsys):
    world.enter(world.World(1, 2, 1, 2, 0, 1, "h1"))
    model = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)])
    model.compile("sgd", loss="mse")
    model.fit(np.ones([2, 2]), np.ones([2, 1]), verbose=2, callbacks=[callbacks.RootOutputCallback()])
    assert "loss" not in capsys.readouterr().out
    world.enter(world.World.single())
    model.fit(np.ones([2, 2]), np.ones([2, 1]), verbose=2, callbacks=[callbacks.RootOutputCallback()])
    assert "loss" in capsys.readouterr().out


def test_a_model_without_variables_cannot_be_broadcast():
    world.enter(world.World(0, 2, 0, 2, 0, 1, "h1"))
    model = keras.Sequential([keras.layers.Dense(1)])
    callback = callbacks.BroadcastGlobalVariablesCallback(0)
    callback.set_model(model)
    with pytest.raises(RuntimeError, match=r"Build it first: model\.build"):
        callback.on_train_begin()


def test_standard_has_what_a_run_needs_in_the_right_order():
    names = [type(c).__name__ for c in hvd.callbacks.standard(warmup_epochs=2)]
    assert names == [
        "BroadcastGlobalVariablesCallback",
        "AverageStateCallback",
        "MetricAverageCallback",
        "RootOutputCallback",
        "LearningRateWarmupCallback",
        "ReplicaGuardCallback",
    ]
    assert len(hvd.callbacks.standard(guard_every=0)) == 4


def test_progress_measures_and_shows(capfd):
    progress = callbacks.ProgressCallback(steps=12, steps_per_epoch=STEPS, global_batch=2)
    fit(keras.optimizers.SGD(0.1), progress)
    assert progress.samples_per_second > 0
    # TensorFlow, too, may say something when it computes for the first time.
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("epoch")]
    assert [line.split(":")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert "samples/s, 00:00 left" in lines[-1]
