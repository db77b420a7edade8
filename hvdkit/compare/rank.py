"""The rank program of a comparison: run `hvdkit.train` to its end and measure CPU, memory and network use.

python -m hvdkit.launch -np 2 -- python -m hvdkit.compare.rank RESULT.json [flags of hvdkit.train]
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import keras
import psutil

from hvdkit import collectives, outcome, runtime, world
from hvdkit.collectives import transports
from hvdkit.errors import UsageError
from hvdkit.train import flags
from hvdkit.train.run import run


class Meters(keras.callbacks.Callback):
    """Measure the use of the host's cores and network during `fit`."""

    checkpointed = False

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Start measuring."""
        psutil.cpu_percent(percpu=True)
        self._sent, self._steps = sent_bytes(), 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Count steps; `batch` starts again from 0 in each epoch."""
        self._steps = batch + 1 if batch >= self._steps else self._steps + batch + 1

    def on_train_end(self, logs: dict | None = None) -> None:
        """Store the core percentages and the bytes sent since the start."""
        self.cores = psutil.cpu_percent(percpu=True)
        self.sent = sent_bytes() - self._sent


def sent_bytes() -> int:
    """Return the bytes sent so far, by this host over all network interfaces and by this process without a network.

    The interfaces include loopback. The rest is what transports send in other ways, such as shared memory.
    """
    used = [transport.usage() for transport in transports.in_use()]
    hidden = sum(usage.hidden_bytes for usage in used if usage is not None)
    return int(hidden + psutil.net_io_counters().bytes_sent)


def main(argv: list[str]) -> int:
    """Train and return the exit code; rank 0 writes the measurements to a file."""
    meters = Meters()
    try:
        result = run(flags.parse(["hvdkit.compare", *argv[2:]]), [meters])
    except UsageError as error:
        if world.launched_rank() == 0:
            print(f"hvdkit.compare: {error}", file=sys.stderr, flush=True)
        return outcome.USAGE
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mine = {"peak": peak, "sent": meters.sent, "cores": meters.cores}
    everyone: list[dict[str, Any]] = collectives.allgather_object(mine, name="meters")
    if world.rank() == 0:
        found = {
            **result,
            "ranks": world.size(),
            "peak_bytes": [rank["peak"] for rank in everyone],
            "core_percent": everyone[0]["cores"],
            "sent_bytes_per_step": max(rank["sent"] for rank in everyone) / result["steps"],
        }
        Path(argv[1]).write_text(json.dumps(found))
    runtime.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
