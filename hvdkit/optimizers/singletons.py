"""What a process has once, and holds TensorFlow variables: once for eager execution, and once for each TF 1 graph."""

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import tensorflow as tf

Value = TypeVar("Value")


class OncePerGraph(Generic[Value]):
    """Makes a value when it is first asked for, and returns the same one afterwards.

    A variable that was made inside a `tf.Graph` of TensorFlow 1 cannot be used outside of it. A `tf.function` is no
    such graph: its variables are those of eager execution.

    Args:
        make: makes the value.
    """

    def __init__(self, make: Callable[[], Value]) -> None:
        self._make = make
        self._eager: Value | None = None
        self._of_graphs: weakref.WeakKeyDictionary[Any, Value] = weakref.WeakKeyDictionary()

    def __call__(self) -> Value:
        """Returns the value."""
        if self._eager is not None and tf.executing_eagerly():
            return self._eager
        with tf.init_scope():  # leaves tf.functions
            if not tf.executing_eagerly():
                graph = tf.compat.v1.get_default_graph()
                if graph not in self._of_graphs:
                    self._of_graphs[graph] = self._make()
                return self._of_graphs[graph]
            if self._eager is None:
                self._eager = self._make()
            return self._eager
