"""The callbacks that count batches and epochs and commit."""

import keras

import hvdkit as hvd
from hvdkit import elastic
from tests.unit.elastic.training import make_data


def test_an_execution_of_several_batches_counts_as_many():
    model = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss="mse", steps_per_execution=4)
    state, committed = elastic.KerasState(model, epoch=0, batch=0), []
    state.commit = lambda: committed.append(state.batch)
    callbacks = [elastic.UpdateBatchStateCallback(state), elastic.CommitStateCallback(state, batches_per_commit=8)]
    model.fit(*make_data(48), batch_size=2, epochs=2, callbacks=callbacks, verbose=0)
    assert committed == [8, 16, 0] * 2, "of 24 batches; the last ones with the end of the epoch"


def test_early_stopping_behind_the_update_still_stops(model):
    state = elastic.KerasState(model, epoch=0, batch=4)
    callbacks = [
        elastic.UpdateBatchStateCallback(state),
        elastic.UpdateEpochStateCallback(state),
        keras.callbacks.EarlyStopping(monitor="loss", patience=0, min_delta=1e9),
    ]
    history = model.fit(*make_data(), batch_size=2, epochs=9, callbacks=callbacks, verbose=0)
    assert len(history.epoch) == 2
    assert int(model.optimizer.iterations) == 2 + 6, "the first epoch has 2 steps left of 6"
