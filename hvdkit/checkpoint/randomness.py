"""The global random generators of a process: Python's, NumPy's, and the one of `keras.random` without a seed.

Those of layers (`keras.random.SeedGenerator`) are variables of the model, and kept with it. TensorFlow's stateful
operations (`tf.random.uniform`, `tf.image.random_flip_left_right`, ...) keep their state where nobody can read it.
"""

import random
from typing import Any

import keras
import numpy as np

from hvdkit.compat.keras3 import global_seed_generator


def state() -> dict[str, Any]:
    """The generators' states, of plain values."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    generator = global_seed_generator()
    return {
        "python": [version, np.array(numbers, np.uint32), gauss],
        "numpy": [name, np.asarray(keys), *rest],
        "keras": None if generator is None else np.asarray(keras.ops.convert_to_numpy(generator.state)),
    }


def restore(saved: dict[str, Any]) -> None:
    """Undoes `state`."""
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(int(n) for n in numbers), gauss))
    np.random.set_state(tuple(saved["numpy"]))
    if saved["keras"] is not None:
        global_seed_generator(make=True).state.assign(saved["keras"])
