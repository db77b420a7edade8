"""The workloads of `hvdkit.bench` for any Keras and for PyTorch: same layers, number of weights and optimizer.

This file does not import hvdkit, because it runs in the peers' environments.
"""

import json
import os
import sys
import time
from pathlib import Path

SHAPES = {"mlp": (28, 28, 1), "lenet": (32, 32, 3), "large_mlp": (28, 28, 1), "resnet20": (32, 32, 3)}
BATCHES = {"mlp": 64, "lenet": 64, "large_mlp": 64, "resnet20": 32}
EXAMPLES = 4096  # of each rank, in memory
STEPS_PER_CALL = 16
_DENSE = {"mlp": (128, 64), "large_mlp": (2048, 2048)}


def threads():
    """Return the number of threads for this rank."""
    return int(os.environ["HVDKIT_BENCH_THREADS"])


def pin(local_rank):
    """Bind this rank to its own cores if HVDKIT_BENCH_PIN is 1."""
    if os.environ.get("HVDKIT_BENCH_PIN") == "1":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[local_rank * threads() : (local_rank + 1) * threads()])


def agree(rank, name, value):
    """Return rank 0's value on all ranks of this host.

    It goes through a file, because not every peer can broadcast objects.
    """
    file = Path(os.environ["HVDKIT_BENCH_FOLDER"], name)
    if rank == 0:
        aside = file.with_suffix(".new")
        aside.write_text(json.dumps(value))
        aside.rename(file)
    while not file.exists():
        time.sleep(0.01)
    return json.loads(file.read_text())


def say(rank, workload, rates, weights):
    """Print the result on rank 0: samples per second of all ranks together, for each window."""
    if rank == 0:
        print(
            "BENCH " + json.dumps({"workload": workload, "samples_per_second": rates, "weights": weights}), flush=True
        )


def timed(run, rank, workload, global_batch, weights):
    """Time `run(steps)`, which trains `steps` steps: one call to warm up, one to choose the length, then five."""
    seconds = float(os.environ["HVDKIT_BENCH_SECONDS"])
    run(2 * STEPS_PER_CALL)
    began = time.perf_counter()
    run(STEPS_PER_CALL)
    once = agree(rank, f"{workload}.once", time.perf_counter() - began)
    calls = max(1, int(seconds / 5 / once))
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        run(calls * STEPS_PER_CALL)
        rates.append(calls * STEPS_PER_CALL * global_batch / (time.perf_counter() - began))
    say(rank, workload, rates, weights)


def build_keras(keras, name):
    """Build the uncompiled model in Keras 2 or 3."""
    layers = keras.layers
    image = keras.Input(SHAPES[name])
    if name in _DENSE:
        x = layers.Flatten()(layers.Rescaling(1 / 255)(image))
        for width in _DENSE[name]:
            x = layers.Dense(width, activation="relu")(x)
        return keras.Model(image, layers.Dense(10)(x))
    x = layers.Rescaling(1 / 64, offset=-1.875)(image)
    if name == "lenet":
        for filters in (6, 16):
            x = layers.MaxPooling2D(2)(layers.Conv2D(filters, 5, padding="same", activation="relu")(x))
        x = layers.Flatten()(x)
        for width in (120, 84):
            x = layers.Dense(width, activation="relu")(x)
        return keras.Model(image, layers.Dense(10)(x))

    def convolve(x, filters, size, strides=1):
        return layers.BatchNormalization()(layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x))

    x = layers.ReLU()(convolve(x, 16, 3))
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(3):
            strides = 2 if stage and not block else 1
            y = convolve(layers.ReLU()(convolve(x, filters, 3, strides)), filters, 3)
            x = layers.ReLU()(layers.Add()([y, x if strides == 1 else convolve(x, filters, 1, strides)]))
    return keras.Model(image, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def optimizer_of(keras, name):
    """Create the workload's optimizer in Keras 2 or 3."""
    return keras.optimizers.SGD(0.05, momentum=0.9) if name == "resnet20" else keras.optimizers.Adam(1e-3)


def chosen():
    """Return the names of the workloads to measure, from the command line."""
    return sys.argv[-1].split(",")
