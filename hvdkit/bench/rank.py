"""The rank of a measurement: `hvdkit.train` for some seconds, with a clock beside.

    python -m hvdkit.launch -np 2 -- python -m hvdkit.bench.rank SECONDS RESULT.json [flags of hvdkit.train]

What is timed is the main job itself, with its input pipeline, metrics and guards; no checkpoints are written.
"""

import itertools
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

_STARTED = psutil.Process().create_time()
_LOADING = time.time()  # imports that take seconds come after it

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from hvdkit import collectives, parallel, runtime, world  # noqa: E402
from hvdkit.collectives import transports  # noqa: E402
from hvdkit.optimizers import local_sgd  # noqa: E402
from hvdkit.train import flags as train_flags  # noqa: E402
from hvdkit.train.run import run  # noqa: E402

_LOADED = time.time()
_WINDOWS = 20  # into which the measured time is cut
_FIRST_STEPS = 3  # in which graphs are traced, and memory is not yet what it will be
_WARM_UP = 0.2  # of it, dropped: caches, and threads that find their cores


class Clock(keras.callbacks.Callback):
    """Notes the time at the end of each execution, and ends training when there are enough.

    Args:
        seconds: from the first execution's end to the last's; longer if two exchanges do not fit into it.
    """

    checkpointed = False

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.ends: list[tuple[float, int, int]] = []  # time, steps done by then, bytes that left this host
        self.began = self.first_step = 0.0
        self.peak = 0  # bytes resident at most in steps, without what is checked and written at the end
        self._seconds = seconds
        self._epoch = 0
        self._every = 1

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Training begins: everything before was start-up."""
        self.began = time.time()
        self._every = max(exchanges_every(self.model.optimizer), 1)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Counts on."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Notes the time."""
        self.first_step = self.first_step or time.time()
        if len(self.ends) == _FIRST_STEPS:
            _forget_peak()
        self.peak = _peak()
        sent = psutil.net_io_counters().bytes_sent
        self.ends.append((time.perf_counter(), self._epoch * self.params["steps"] + batch + 1, sent))
        # The rank that reports decides: another one's time may have begun before its own.
        is_over = self.ends[-1][0] - self.ends[0][0] > self._seconds and len(self._whole()) > 1
        if world.rank() == 0 and is_over:
            self.model.stop_training = True

    def facts(self) -> dict[str, Any]:
        """Shapes and bytes of the model that was trained."""
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
        """Steps a second, of windows of about equal length after the warm-up."""
        kept = self._kept()
        marks = kept[:: max(1, len(kept) // _WINDOWS)]
        return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(marks)]

    def means(self) -> tuple[float, float]:
        """Steps a second, and bytes that leave this host a step, over whole rounds of steps and their exchange."""
        first, *_, last = self._whole()
        return (last[1] - first[1]) / (last[0] - first[0]), (last[2] - first[2]) / (last[1] - first[1])

    def _kept(self) -> list[tuple[float, int, int]]:
        begin = self.ends[0][0] + _WARM_UP * self._seconds
        return [end for end in self.ends if end[0] >= begin]

    def _whole(self) -> list[tuple[float, int, int]]:
        return [end for end in self._kept() if end[1] % self._every == 0]


def _forget_peak() -> None:
    """Begins anew to look for the most memory (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The most bytes that were resident since then."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def _bytes(variables: Sequence[Any]) -> int:
    return sum(int(np.prod(v.shape)) * tf.as_dtype(v.dtype).size for v in variables)


def exchanges_every(optimizer: Any) -> int:
    """Steps from one exchange of this optimizer to the next: those of local SGD, or of accumulation."""
    local = optimizer.local_steps if isinstance(optimizer, local_sgd.LocalSGD) else 1
    return int(max(local, getattr(optimizer, "gradient_accumulation_steps", None) or 1))


def measure(seconds: float, flags: list[str]) -> dict[str, Any]:
    """Trains, and returns what was measured: samples a second, seconds to the first step, bytes; on rank 0 alone."""
    clock = Clock(seconds)
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["--checkpoint_every=never", "--notensorboard", f"--workdir={folder}/run", "--steps=1000000000"]
        result = run(train_flags.parse(["hvdkit.bench", *fixed, *flags]), [clock])
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
        "mean_samples_per_second": clock.means()[0] * result["global_batch"],
        "sent_bytes_per_step": clock.means()[1],
        "startup_seconds": {name: round(value, 2) for name, value in phases.items()},
        "peak_bytes": [whole for whole, _ in peaks],
        "training_peak_bytes": [training for _, training in peaks],
        "facts": clock.facts(),
        **_exchange(),
    }


def _exchange() -> dict[str, Any]:
    """How the gradients travelled and, where that is counted, what an exchange took."""
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
    """Measures, and leaves the result in a file on rank 0."""
    found = measure(float(argv[1]), argv[3:])
    if world.rank() == 0:
        Path(argv[2]).write_text(json.dumps(found))
    runtime.shutdown()


if __name__ == "__main__":
    main(sys.argv)
