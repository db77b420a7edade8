"""A running `Model.fit`: two of its local variables, one of which is the iterator over an epoch's steps.

Keras can start at an epoch (`initial_epoch`), but not at a step, and it has no public access to either variable.
"""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from hvdkit.compat import call_stack, data_batches
from hvdkit.compat.lookup import missing_in_keras, private


def of(model: keras.Model) -> tuple[Any, list[Any]]:
    """Returns the step iterator and the callback list of the running `fit` of a model.

    Raises:
        RuntimeError: no `fit` of this model is running.
        MissingNameError: the `fit` of this Keras version is implemented differently.
    """
    if call_stack.locals_of("fit", model, ()) is None:
        raise RuntimeError(
            f"CheckpointCallback works in Model.fit only, and no fit of the model {model.name!r} was found around it."
        )
    found = call_stack.locals_of("fit", model, ("epoch_iterator", "callbacks"))
    if found is None:
        raise missing_in_keras("local variables epoch_iterator and callbacks in Model.fit")
    for name in ("num_batches", "steps_per_epoch", "steps_per_execution"):
        private(found["epoch_iterator"], name)
    return found["epoch_iterator"], found["callbacks"].callbacks


def element_spec(iterator: Any) -> Any:
    """Returns the specification of a batch of the training data."""
    return private(iterator, "_distributed_dataset").element_spec


def dataset_of(iterator: Any) -> Any:
    """Returns what Keras iterates over: a `tf.data.Dataset`, unless a strategy distributes it."""
    return private(iterator, "_distributed_dataset")


def replace_dataset(iterator: Any, dataset: tf.data.Dataset) -> None:
    """Replaces what Keras iterates over, for the epochs that have not begun."""
    dataset_of(iterator)
    iterator._distributed_dataset = dataset


def adapter_of(iterator: Any) -> Any:
    """Returns Keras' adapter of the training data, which knows what `fit` was given."""
    return private(iterator, "data_adapter")


def has_python_adapter(iterator: Any) -> bool:
    """Returns whether Python makes the batches: a `PyDataset` or a generator."""
    return isinstance(adapter_of(iterator), _adapters_of_python())


def sizes_of_batches(iterator: Any) -> list[Any] | None:
    """Returns what the data tell of their batches; None if they do not tell the number of examples in each step.

    Two iterators for which it is equal have batches of the same sizes in the same steps.
    """
    specs = [spec for spec in tf.nest.flatten(element_spec(iterator)) if hasattr(spec, "shape")]
    if not specs or not all(spec.shape.rank for spec in specs):
        return None
    shapes = [spec.shape.as_list() for spec in specs]
    if all(shape[0] is not None for shape in shapes):
        return shapes
    adapter = private(iterator, "data_adapter")
    if isinstance(adapter, _adapter_of_arrays()):
        return [adapter.batch_size, adapter.partial_batch_size, adapter.num_batches, *shapes]
    return None


def may_vary(iterator: Any) -> bool:
    """Returns whether batches may have any size in any step, as those of a generator and of a data set in buckets do.

    Those made by Python may; those of a data set that does not know its length, also if `steps_per_epoch` is given; and
    those of a data set that makes them otherwise than by `batch`, or whose short last batch is not the last one of an
    epoch (`data.batch(8).repeat()`).
    """
    if has_python_adapter(iterator):
        return True
    if isinstance(adapter_of(iterator), _adapter_of_arrays()):  # Keras' data set of arrays does not know its length
        return False
    dataset = private(iterator, "_distributed_dataset")
    if not isinstance(dataset, tf.data.Dataset):
        return False
    length, sizes = int(dataset.cardinality()), data_batches.sizes_of(dataset)
    ends_elsewhere = iterator.steps_per_epoch and iterator.steps_per_epoch != length
    return (
        length == tf.data.UNKNOWN_CARDINALITY
        or sizes is data_batches.Sizes.ANY
        or (sizes is data_batches.Sizes.LAST_IS_SHORT and bool(ends_elsewhere))
    )


def _adapter_of_arrays() -> Any:
    try:
        from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
    except ImportError as error:
        raise missing_in_keras("ArrayDataAdapter") from error
    return ArrayDataAdapter


def _adapters_of_python() -> tuple[Any, ...]:
    try:
        from keras.src.trainers.data_adapters.generator_data_adapter import GeneratorDataAdapter
        from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
    except ImportError as error:
        raise missing_in_keras("GeneratorDataAdapter and PyDatasetAdapter") from error
    return GeneratorDataAdapter, PyDatasetAdapter


def stop_autotuning(iterator: Any) -> bool:
    """Turns off tf.data's autotuning for the training data, unless the user has set it. Call it before the first epoch.

    Returns:
        Whether it was turned off.
    """
    dataset = private(iterator, "_distributed_dataset")
    if not isinstance(dataset, tf.data.Dataset) or dataset.options().autotune.enabled is not None:
        return False
    options = tf.data.Options()
    options.autotune.enabled = False
    replace_dataset(iterator, dataset.with_options(options))
    return True


def logs_of_evaluation(model: keras.Model) -> dict[str, Any]:
    """Returns the logs that the running `evaluate` of a model is going to return; empty if none is running.

    Keras hands callbacks a copy of them.
    """
    found = call_stack.locals_of("evaluate", model, ("logs",))
    return found["logs"] if found and isinstance(found["logs"], dict) else {}


def has_known_length(iterator: Any) -> bool:
    """Returns whether the steps of an epoch are known, and the data cannot end before them unexpectedly.

    Data with None in them are Optionals, which only Keras' own training function converts.
    """
    dataset = private(iterator, "_distributed_dataset")
    length = getattr(dataset, "cardinality", lambda: tf.data.UNKNOWN_CARDINALITY)()
    lasts = private(iterator, "data_adapter").num_batches is not None or int(length) == tf.data.INFINITE_CARDINALITY
    optional = any(isinstance(s, tf.OptionalSpec) for s in tf.nest.flatten(dataset.element_spec))
    return bool(iterator.num_batches) and lasts and not optional


def replace_next_epoch(iterator: Any, steps: Callable[[Callable[[], Iterator[Any]]], Iterator[Any]]) -> None:
    """Replaces the enumeration of the next epoch's steps; later epochs use Keras' own again.

    Args:
        iterator: the iterator from `of`.
        steps: takes Keras' function that starts an epoch, and yields items like those of that function. See `step_of`.
    """
    name = "_enumerate_iterator"
    original = private(iterator, name)

    def once() -> Iterator[Any]:
        delattr(iterator, name)
        yield from steps(original)

    setattr(iterator, name, once)


def step_of(item: tuple[Any, ...]) -> int:
    """Returns the index, within the epoch, of an item's first step."""
    return item[0]


def data_of(item: tuple[Any, ...]) -> Iterator[Any]:
    """Returns the iterator over batches that an item's steps read from."""
    return item[-1]


def joined(first: tuple[Any, ...], last: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the item of all steps from those of one item to those of another.

    Keras 3.10 has items (step, data), and calls callbacks with one number for both ends, here the last one. Later
    versions have (first step, last step, data).
    """
    return (first[0], last[1], first[-1]) if len(first) > 2 else (last[0], first[-1])


def end_epoch_after(iterator: Any, steps: int) -> None:
    """Sets the number of steps of an epoch in Keras, and marks the data of this epoch as used up.

    Keras does the same at the end of an epoch of unknown length, which ends when the data end, not at a step count.
    """
    private(iterator, "_num_batches")
    private(iterator, "_current_iterator")
    iterator._num_batches = steps
    iterator._current_iterator = None
