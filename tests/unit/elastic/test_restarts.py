"""`elastic.run`: what a function does again, in memory and from commits on disk."""

import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdkit as hvd
from hvdkit import elastic
from hvdkit.checkpoint.commits import Commits
from hvdkit.elastic import restarts
from tests.unit.elastic.training import make_data, make_model, values_of


class _Interrupt(keras.callbacks.Callback):
    """Raises what a lost rank would cause, at one step."""

    def __init__(self, step, error):
        super().__init__()
        self.step, self.error = step, error

    def on_train_batch_end(self, batch, logs=None):
        self.step -= 1
        if self.step == 0:
            raise self.error


@pytest.mark.parametrize("initial_epoch", [False, True])
def test_a_broken_exchange_costs_what_was_not_committed(model, monkeypatch, initial_epoch):
    monkeypatch.setattr(restarts, "_reset", lambda: None)  # there is no other rank to meet
    state, starts = elastic.KerasState(model, epoch=0, batch=0), []
    broken = tf.errors.UnknownError(None, None, "[gloo/transport/tcp/pair.cc:589] Connection closed by peer")
    interrupt = _Interrupt(9, broken)

    @elastic.run
    def train(state):
        starts.append((state.epoch, state.batch, int(model.optimizer.iterations)))
        callbacks = [
            elastic.UpdateBatchStateCallback(state),
            elastic.UpdateEpochStateCallback(state),
            elastic.CommitStateCallback(state, batches_per_commit=4),
            interrupt,
        ]
        until = {"epochs": 3, "initial_epoch": state.epoch} if initial_epoch else {"epochs": 3 - state.epoch}
        model.fit(*make_data(), batch_size=2, callbacks=callbacks, verbose=0, **until)
        return "done"

    assert train(state) == "done"
    # 6 steps are epoch 0, committed at its end; 2 of the 3 that followed were not committed, as 4 make a commit.
    assert starts == [(0, 0, 0), (1, 2, 8)]
    assert (state.epoch, state.batch, int(model.optimizer.iterations)) == (3, 0, 18)


def test_other_errors_pass(model):
    state = elastic.KerasState(model)

    @elastic.run
    def train(state):
        raise tf.errors.UnknownError(None, None, "the disk is full")

    with pytest.raises(tf.errors.UnknownError, match="the disk is full"):
        train(state)


def test_a_loop_of_ones_own_leaves_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setenv("HVDKIT_ELASTIC", str(tmp_path))
    starts = []

    @elastic.run
    def train(state, leave):
        starts.append(state.step)
        while state.step < 4:
            state.variables[0].assign_add([state.step])
            state.step += 1
            if state.step == leave:
                os.kill(os.getpid(), signal.SIGTERM)
            state.commit()

    with pytest.raises(SystemExit, match="received a stop request. The commit is written"):
        train(elastic.TensorFlowState([tf.Variable([0])], step=0), leave=2)
    state = elastic.TensorFlowState([tf.Variable([0])], step=0)
    train(state, leave=None)
    assert (starts, state.step, int(state.variables[0][0])) == ([0, 2], 4, 6)


# ---- Commits on disk, where a launcher starts ranks anew ---------------------------------------------------------


def _train_until(model, step, number=signal.SIGTERM):
    """Trains 2 epochs of 6 steps, commits after every second one, and gets a signal in a step; returns the state."""
    state = elastic.KerasState(model, epoch=0, batch=0, seen=())

    class Told(keras.callbacks.Callback):
        left = step

        def on_train_batch_end(self, batch, logs=None):
            state.seen = (*state.seen, int(model.optimizer.iterations))
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), number)

    @elastic.run
    def train(state):
        callbacks = [
            Told(),
            elastic.UpdateBatchStateCallback(state),
            elastic.UpdateEpochStateCallback(state),
            elastic.CommitStateCallback(state, batches_per_commit=2),
        ]
        model.fit(*make_data(), batch_size=2, epochs=2 - state.epoch, callbacks=callbacks, verbose=0)

    train(state)
    return state


@pytest.mark.parametrize("step", [9, pytest.param(6, id="the last of an epoch")])
def test_a_job_that_is_told_to_leave_goes_on_at_its_next_start(monkeypatch, tmp_path, step):
    monkeypatch.setenv("HVDKIT_ELASTIC", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)  # of an earlier test, perhaps, whose `fit` ended by an exception
    with pytest.raises(SystemExit, match="received a stop request. The commit is written") as left:
        _train_until(make_model(), step)
    assert left.value.code == 85
    assert signal.getsignal(signal.SIGTERM) == before, "who listened has stopped"
    resumed = make_model()
    state = _train_until(resumed, step=0)
    assert state.seen == tuple(range(1, 13)), "no step is lost or done twice"
    assert (state.epoch, state.batch) == (2, 0)
    assert not list(tmp_path.iterdir()), "a job that is done leaves no commits behind"
    monkeypatch.delenv("HVDKIT_ELASTIC")
    whole = make_model()
    _train_until(whole, step=0)
    assert all(np.array_equal(a, b) for a, b in zip(values_of(whole), values_of(resumed), strict=True)), "bit for bit"


def test_what_is_not_committed_is_lost_and_what_is_committed_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("HVDKIT_ELASTIC", str(tmp_path))
    monkeypatch.setattr(Commits, "keep", lambda self, *values, may_drop: keep(self, *values, may_drop=False))
    before = signal.signal(signal.SIGUSR2, _die)
    try:
        with pytest.raises(ZeroDivisionError):
            _train_until(make_model(), step=9, number=signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    state = _train_until(make_model(), step=0)
    assert state.seen == tuple(range(1, 13)), "step 9 was done twice, and counts once"


keep = Commits.keep


def _die(*_):
    raise ZeroDivisionError


def test_commits_of_another_model_and_values_that_cannot_be_kept_are_refused(monkeypatch, tmp_path, model):
    monkeypatch.setenv("HVDKIT_ELASTIC", str(tmp_path))
    with pytest.raises(SystemExit):
        _train_until(model, step=1)
    other = keras.Sequential([keras.layers.Input([3]), keras.layers.Dense(1)])
    other.compile("sgd", loss="mse")
    with pytest.raises(hvd.UsageError, match=r"is a commit of another model.*another --workdir"):
        elastic.run(lambda state: None)(elastic.KerasState(other))
    commits = Commits(tmp_path / "other")
    with pytest.raises(hvd.UsageError, match="holds a value of type object, which is not kept on disk"):
        commits.keep([], {"epoch": object()}, may_drop=False)
    with pytest.raises(hvd.UsageError, match="needs a hvd.elastic.KerasState or TensorFlowState, but was given int"):
        elastic.run(lambda state: None)(0)
