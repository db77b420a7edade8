"""A running `Model.fit`: two of its local variables, and the iterator over an epoch's steps that one of them is.

Keras can begin at an epoch (`initial_epoch`), but not at a step, and there is no public way to either variable.
"""

from collections.abc import Callable, Iterator
from typing import Any

import keras

from hvdkit.compat import call_stack
from hvdkit.compat.lookup import missing_in_keras, private


def of(model: keras.Model) -> tuple[Any, list[Any]]:
    """The iterator over steps and the list of callbacks of the `fit` of a model that this call happens in.

    Raises:
        RuntimeError: no `fit` of this model is running.
        MissingNameError: it is that of a Keras whose `fit` is written otherwise.
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
    """The specification of a batch of the training data."""
    return private(iterator, "_distributed_dataset").element_spec


def replace_next_epoch(iterator: Any, steps: Callable[[Callable[[], Iterator[Any]]], Iterator[Any]]) -> None:
    """Replaces the enumeration of the next epoch's steps; those after it are Keras' own again.

    Args:
        iterator: as `of` returns it.
        steps: gets Keras' function that begins an epoch, and yields items such as that yields. See `step_of`.
    """
    # Keras 3.5 and 3.6 iterate over what `enumerate_epoch` yields, later ones have it for other backends only.
    name = "_enumerate_iterator" if hasattr(iterator, "_enumerate_iterator") else "enumerate_epoch"
    original = private(iterator, name)

    def once() -> Iterator[Any]:
        delattr(iterator, name)
        yield from steps(original)

    setattr(iterator, name, once)


def step_of(item: tuple[Any, ...]) -> int:
    """The number, within the epoch, of an item's first step."""
    return item[0]


def data_of(item: tuple[Any, ...]) -> Iterator[Any]:
    """The iterator over batches that an item's steps read from."""
    return item[-1]


def end_epoch_after(iterator: Any, steps: int) -> None:
    """Tells Keras how many steps an epoch has, and that the data of this one is used up.

    Then Keras leaves an epoch when the data ends, not when it has counted.
    """
    private(iterator, "_num_batches")
    private(iterator, "_current_iterator")
    iterator._num_batches = steps
    iterator._current_iterator = None
