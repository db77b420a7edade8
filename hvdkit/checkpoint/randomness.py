"""The global random generators of a process: Python's, NumPy's, and the one of `keras.random` without a seed.

The generators of layers (`keras.random.SeedGenerator`) are variables of the model and saved with it. The state of
TensorFlow's stateful operations (`tf.random.uniform`, `tf.image.random_flip_left_right`, ...) cannot be read or saved.
"""

import random
from typing import Any

import keras
import numpy as np

from hvdkit.compat.keras3 import global_seed_generator


def state() -> dict[str, Any]:
    """Returns the generators' states as plain values."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    generator = global_seed_generator()
    return {
        "python": [version, np.array(numbers, np.uint32), gauss],
        "numpy": [name, np.asarray(keys), *rest],
        "keras": None if generator is None else np.asarray(keras.ops.convert_to_numpy(generator.state)),
    }


def restore(saved: dict[str, Any]) -> None:
    """Restores what `state` returned."""
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(int(n) for n in numbers), gauss))
    np.random.set_state(tuple(saved["numpy"]))
    if saved["keras"] is not None:
        global_seed_generator(make=True).state.assign(saved["keras"])
