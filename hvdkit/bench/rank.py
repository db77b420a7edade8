"""The rank program of a benchmark: run `hvdkit.train` for some seconds and time its steps.

    python -m hvdkit.launch -np 2 -- python -m hvdkit.bench.rank SECONDS RESULT.json [--count-zeros] --- [FLAGS]

It times the real training job, with its input pipeline, metrics and guards. The job writes no checkpoints. FLAGS are
those of hvdkit.train. The flags of another training may follow after another `---`; the same processes run it next.
`--count-zeros` counts the zeros of the gradients, too, which takes time in each step.
"""

import itertools
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

_STARTED = psutil.Process().create_time()
_LOADING = time.time()  # taken before the imports, which take seconds
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as in launched ranks, for one process without a launcher

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from hvdkit import collectives, parallel, runtime, world  # noqa: E402
from hvdkit.bench.peers.programs import timing  # noqa: E402
from hvdkit.bench.zeros import ZeroShare  # noqa: E402
from hvdkit.collectives import transports  # noqa: E402
from hvdkit.optimizers import local_sgd  # noqa: E402
from hvdkit.train import flags as train_flags  # noqa: E402
from hvdkit.train.run import run  # noqa: E402

_LOADED = time.time()
_WINDOWS = 20  # number of windows that the measured time is divided into
_FIRST_STEPS = 3  # steps that trace graphs; memory is not stable yet
_WARM_UP = 0.2  # fraction of the measured time to drop: caches fill and threads settle on cores


class Clock(keras.callbacks.Callback):
    """Record the time at the end of each execution, and stop training after enough seconds.

    Args:
        seconds: time from the end of the first execution to the end of the last. It is longer if two synchronizations
            take longer.
    """

    checkpointed = False

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.ends: list[tuple[float, int, int]] = []  # time, steps done, bytes that this host has sent
        self.began = self.first_step = 0.0
        self.peak = 0  # maximum resident bytes in training steps, without the final checks and files
        self._seconds = seconds
        self._epoch = 0
        self._every = 1

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Record the end of the start-up phase."""
        self.began = time.time()
        self._every = max(exchanges_every(self.model.optimizer), 1)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Store the epoch, to count steps over all epochs."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Record the time, steps, bytes and peak memory; rank 0 stops training when the time is over."""
        self.first_step = self.first_step or time.time()
        if len(self.ends) == _FIRST_STEPS:
            _forget_peak()
        self.peak = _peak()
        sent = psutil.net_io_counters().bytes_sent
        self.ends.append((time.perf_counter(), self._epoch * self.params["steps"] + batch + 1, sent))
        # Only rank 0 decides, because it reports the result, and another rank's measurement may have begun earlier.
        is_over = self.ends[-1][0] - self.ends[0][0] > self._seconds and len(self._whole()) > 1
        if world.rank() == 0 and is_over:
            self.model.stop_training = True

    def facts(self) -> dict[str, Any]:
        """Return the shapes, bytes and possible divisions of the trained model."""
        weights, optimizer = self.model.trainable_weights, self.model.optimizer
        slots = getattr(optimizer, "variables", [])
        return {
            "shapes": [list(w.shape) for w in weights],
            "gradient_bytes": sum(4 * int(np.prod(w.shape)) for w in weights),
            "state_bytes": _bytes([*self.model.weights, *slots]),
            "optimizer_bytes": _bytes(slots),
            "divisions": parallel.divisions(self.model),
        }

    def rates(self) -> list[float]:
        """Return the steps per second of each window after the warm-up; windows have about equal length."""
        kept = self._kept()
        marks = kept[:: max(1, len(kept) // _WINDOWS)]
        return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(marks)]

    def means(self) -> tuple[float, float]:
        """Return the steps per second, and the bytes that this host sends per step.

        Both are means over whole rounds: the steps up to a synchronization, and the synchronization itself.
        """
        first, *_, last = self._whole()
        return (last[1] - first[1]) / (last[0] - first[0]), (last[2] - first[2]) / (last[1] - first[1])

    def step_times(self) -> dict[str, float]:
        """Return the median and 95th percentile of the step times after the warm-up, as for other tools.

        What happens between two epochs counts for no step.
        """
        epoch = self.params["steps"]
        pairs = [(a, b) for a, b in itertools.pairwise(self._kept()) if a[1] % epoch]
        return timing.step_times([(b[0] - a[0], b[1] - a[1]) for a, b in pairs])

    def _kept(self) -> list[tuple[float, int, int]]:
        begin = self.ends[0][0] + _WARM_UP * self._seconds
        return [end for end in self.ends if end[0] >= begin]

    def _whole(self) -> list[tuple[float, int, int]]:
        return [end for end in self._kept() if end[1] % self._every == 0]


def _forget_peak() -> None:
    """Reset the process's peak memory (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Return the peak resident bytes since the last reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def _bytes(variables: Sequence[Any]) -> int:
    return sum(int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for v in variables)


def exchanges_every(optimizer: Any) -> int:
    """Return the steps between two synchronizations of this optimizer, from local SGD or gradient accumulation."""
    local = optimizer.local_steps if isinstance(optimizer, local_sgd.LocalSGD) else 1
    return int(max(local, getattr(optimizer, "gradient_accumulation_steps", None) or 1))


def measure(seconds: float, flags: list[str], counts_zeros: bool = False) -> dict[str, Any]:
    """Train, and return the measurements on rank 0: throughput, start-up time and memory; empty on other ranks.

    The share of zeros is 0 if they are not counted.
    """
    clock, zeros = Clock(seconds), ZeroShare()
    callbacks = [clock, zeros] if counts_zeros else [clock]
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--checkpoint_every=never", "--notensorboard", f"--workdir={folder}/run", "--steps=1000000000"]
        result = run(train_flags.parse(["hvdkit.bench", *fixed, *flags]), callbacks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks = collectives.allgather_object((max(peak, clock.peak), clock.peak), name="peaks")
    if world.rank() != 0:
        return {}
    phases = {
        "python": _LOADING - _STARTED,
        "imports": _LOADED - _LOADING,
        "data_and_model": clock.began - _LOADED,
        "first_step": clock.first_step - clock.began,
    }
    return {
        "ranks": world.size(),
        "replicas": result["size"],
        "global_batch": result["global_batch"],
        "samples_per_second": [rate * result["global_batch"] for rate in clock.rates()],
        "step_seconds": clock.step_times(),
        "mean_samples_per_second": clock.means()[0] * result["global_batch"],
        "sent_bytes_per_step": clock.means()[1],
        "startup_seconds": {name: round(value, 2) for name, value in phases.items()},
        "peak_bytes": [whole for whole, _ in peaks],
        "training_peak_bytes": [training for _, training in peaks],
        "facts": {**clock.facts(), "zero_share": zeros.share()},
        **_exchange(),
    }


def _exchange() -> dict[str, Any]:
    """Return the transport of the gradient allreduce and, if the transport counts them, its seconds per collective."""
    if world.size() == 1:
        return {"exchange": "none"}
    transport = transports.choose("allreduce", tf.float32, world.horovod().global_process_set)
    usage = transport.usage()
    if usage is None:
        return {"exchange": transport.name}
    return {
        "exchange": transport.name,
        "exchange_seconds": usage.seconds / usage.collectives,
        "waiting_seconds": usage.waiting_seconds / usage.collectives,
    }


def main(argv: list[str]) -> None:
    """Measure each training; rank 0 writes the results to a file."""
    found: list[dict[str, Any]] = []
    first = argv.index("---")
    for is_separator, flags in itertools.groupby(argv[first:], "---".__eq__):
        if not is_separator:
            found.append(measure(float(argv[1]), list(flags), "--count-zeros" in argv[3:first]))
            keras.backend.clear_session()
    if world.rank() == 0:
        Path(argv[2]).write_text(json.dumps(found))
    runtime.shutdown()


if __name__ == "__main__":
    main(sys.argv)
