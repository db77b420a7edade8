"""Private names of Keras 3 and TensorFlow, each behind one function."""

from typing import Any

import keras
import tensorflow as tf


def native_variable(variable: Any) -> tf.Variable:
    """The `tf.Variable` behind a Keras variable: gradients may be asked for by either."""
    return getattr(variable, "_value", variable) if isinstance(variable, keras.Variable) else variable


def is_seed(variable: Any) -> bool:
    """Whether a variable is the state of a `keras.random.SeedGenerator`, which Keras tells by its path alone."""
    return variable.path.endswith("seed_generator_state")


def is_gradient_accumulator(variable: Any) -> bool:
    """Whether an optimizer's variable sums up gradients between two updates (`gradient_accumulation_steps`)."""
    return "gradient_accumulator" in variable.path
