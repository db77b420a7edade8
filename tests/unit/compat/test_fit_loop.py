"""The local variables of a running `Model.fit`: what each must mean."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdkit.compat import fit_loop
from hvdkit.compat.lookup import MissingNameError


class At(keras.callbacks.Callback):
    """Calls a function with the loop of the fit when training begins."""

    def __init__(self, do):
        super().__init__()
        self.do = do

    def on_train_begin(self, logs=None):
        self.do(*fit_loop.of(self.model))


class Watch(keras.callbacks.Callback):
    """Notes epoch and step of each call, and what the model has seen."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        self.steps.append((self.epoch, batch))


def fit(do, epochs=2, known=True, **options):
    """Two epochs of four steps; returns what `Watch` noted, and the inputs' sums of each step."""
    seen, watch = [], Watch()

    class Summing(keras.Sequential):
        def train_step(self, data):
            tf.numpy_function(lambda x: seen.append(float(x.sum())), [data[0]], [])
            return super().train_step(data)

    model = Summing([keras.Input([1]), keras.layers.Dense(1)])
    model.compile("sgd", loss="mse", **options)
    data = tf.data.Dataset.from_tensor_slices((np.arange(4.0)[:, None], np.ones([4, 1]))).batch(1)
    data = data if known else data.filter(lambda x, y: True)
    model.fit(data, epochs=epochs, verbose=0, callbacks=[At(do), watch])
    return watch.steps, seen


def test_the_iterator_and_the_callbacks_are_those_of_the_fit():
    found = []
    fit(lambda iterator, callbacks: found.append((iterator, callbacks)))
    ((iterator, callbacks),) = found
    assert [type(c).__name__ for c in callbacks][:2] == ["At", "Watch"]
    assert iterator.num_batches == 4
    assert iterator.steps_per_epoch is None
    assert iterator.steps_per_execution == 1
    x, y = fit_loop.element_spec(iterator)
    assert (x.shape.as_list(), y.dtype) == ([None, 1], tf.float64)


def test_outside_of_fit_there_is_none():
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)], name="lonely")
    with pytest.raises(RuntimeError, match="no fit of the model 'lonely' was found around it"):
        fit_loop.of(model)


def test_a_fit_that_is_written_otherwise_is_said_in_a_sentence():
    class Other(keras.Sequential):
        def fit(self):
            return fit_loop.of(self)

    with pytest.raises(MissingNameError, match="no local variables epoch_iterator and callbacks in Model.fit"):
        Other().fit()


@pytest.mark.parametrize("executed", [1, 2])
def test_the_next_epoch_is_replaced_and_no_other(executed):
    items = []

    def skip(original):
        for item in original():
            items.append(fit_loop.step_of(item))
            if fit_loop.step_of(item) < 2:
                for _ in range(executed):
                    next(fit_loop.data_of(item))
            else:
                yield item

    steps, seen = fit(lambda loop, _: fit_loop.replace_next_epoch(loop, skip), steps_per_execution=executed)
    every = range(0, 4, executed)
    assert items == list(every)
    assert steps == [(0, n) for n in every if n >= 2] + [(1, n) for n in every]
    assert seen == [2, 3, 0, 1, 2, 3]


def test_an_epoch_of_unknown_length_ends_where_it_is_told():
    def leave_out(original, iterator):
        for item in original():
            next(fit_loop.data_of(item))
            fit_loop.end_epoch_after(iterator, 4)
            break
        yield from original()

    steps, _ = fit(
        lambda loop, _: fit_loop.replace_next_epoch(loop, lambda original: leave_out(original, loop)), known=False
    )
    assert steps == [(epoch, n) for epoch in range(2) for n in range(4)]


@pytest.mark.parametrize(
    ("known", "steps", "expected"),
    [(True, None, True), (False, None, False), (True, 2, True), (False, 2, False)],
)
def test_the_length_is_known_if_steps_are_and_the_data_cannot_end_before(known, steps, expected):
    found = []
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
    model.compile("sgd", loss="mse")
    data = tf.data.Dataset.from_tensor_slices((np.zeros([4, 1]), np.zeros([4, 1]))).batch(1)
    data = data if known else data.filter(lambda x, y: True)
    at = At(lambda iterator, _: found.append(fit_loop.has_known_length(iterator)))
    model.fit(data, steps_per_epoch=steps, verbose=0, callbacks=[at])
    model.fit(np.zeros([4, 1]), np.zeros([4, 1]), batch_size=2, verbose=0, callbacks=[at])
    model.fit(data.repeat(), steps_per_epoch=3, verbose=0, callbacks=[at])
    assert found == [expected, True, True]


def test_items_are_joined_from_the_first_step_to_the_last():
    assert fit_loop.joined((3, 3, "data"), (9, 9, "data")) == (3, 9, "data")
    assert fit_loop.joined((3, "data"), (9, "data")) == (9, "data")


def tuned(data, batch=None):
    """Stops the autotuning of a fit; returns the answer, the options, and how many batches the fit saw."""
    found = []

    def stop(iterator, callbacks):
        found.append(fit_loop.stop_autotuning(iterator))
        found.append(iterator._distributed_dataset.options().autotune.enabled)

    watch = Watch()
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
    model.compile("sgd", loss="mse")
    inputs = data if batch is None else {"x": data[0], "y": data[1], "batch_size": batch}
    model.fit(**inputs if batch else {"x": inputs}, verbose=0, callbacks=[At(stop), watch])
    return (*found, len(watch.steps))


def test_autotuning_is_turned_off_for_data_sets_and_arrays():
    arrays = (np.arange(4.0)[:, None], np.ones([4, 1]))
    assert tuned(tf.data.Dataset.from_tensor_slices(arrays).batch(1)) == (True, False, 4)
    assert tuned(arrays, batch=2) == (True, False, 2)


@pytest.mark.parametrize("wish", [True, False])
def test_autotuning_stays_as_the_user_has_set_it(wish):
    options = tf.data.Options()
    options.autotune.enabled = wish
    data = tf.data.Dataset.from_tensor_slices((np.arange(4.0)[:, None], np.ones([4, 1]))).batch(1)
    assert tuned(data.with_options(options)) == (False, wish, 4)


@pytest.mark.parametrize(
    ("examples", "batch", "expected"),
    [(8, 4, [[4, 1], [4, 1]]), (9, 4, [4, 1, 3, [None, 1], [None, 1]])],
)
def test_the_sizes_of_batches_of_arrays(examples, batch, expected):
    assert sizes_of(np.ones([examples, 1]), np.ones([examples, 1]), batch_size=batch) == expected


@pytest.mark.parametrize("drops", [True, False])
def test_the_sizes_of_batches_of_a_data_set_are_known_if_it_drops_the_last_one(drops):
    data = tf.data.Dataset.from_tensors((np.ones([1]), np.ones([1]))).repeat(9).batch(4, drop_remainder=drops)
    assert sizes_of(data) == ([[4, 1], [4, 1]] if drops else None)


class OneBatch(keras.utils.PyDataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return np.ones([4, 1]), np.ones([4, 1])


def test_batches_that_python_makes_may_vary_and_those_of_a_filter():
    one = OneBatch()[0]
    data = tf.data.Dataset.from_tensors(one)
    assert seen(fit_loop.may_vary, OneBatch())
    assert seen(fit_loop.may_vary, (batch for batch in [one]))
    assert seen(fit_loop.may_vary, data.filter(lambda x, y: True), steps_per_epoch=1)
    assert seen(fit_loop.may_vary, data.unbatch().batch(3).repeat(2))
    assert seen(fit_loop.may_vary, data.unbatch().batch(3), steps_per_epoch=1), "the second epoch has the short batch"
    assert not seen(fit_loop.may_vary, data.unbatch().batch(3), steps_per_epoch=2)
    assert not seen(fit_loop.may_vary, data)
    assert not seen(fit_loop.may_vary, data.repeat(), steps_per_epoch=1)
    assert not seen(fit_loop.may_vary, *one)


def sizes_of(*data, **options):
    return seen(fit_loop.sizes_of_batches, *data, **options)


def seen(of_iterator, *data, **options):
    found = []
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
    model.compile("sgd", loss="mse")

    class EndedError(Exception):
        pass

    def look(iterator, callbacks):
        found.append(of_iterator(iterator))
        raise EndedError

    with pytest.raises(EndedError):
        model.fit(*data, verbose=0, callbacks=[At(look)], **options)
    return found[0]
