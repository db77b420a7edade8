"""The rank of a comparison: `hvdkit.train` to its end, with meters beside.

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
    """What the host's cores, and its network, did while `fit` ran."""

    checkpointed = False

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Starts to look."""
        psutil.cpu_percent(percpu=True)
        self._sent, self._steps = sent_bytes(), 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Counts on."""
        self._steps = batch + 1 if batch >= self._steps else self._steps + batch + 1

    def on_train_end(self, logs: dict | None = None) -> None:
        """Looks for the last time."""
        self.cores = psutil.cpu_percent(percpu=True)
        self.sent = sent_bytes() - self._sent


def sent_bytes() -> int:
    """Bytes that left this process past all networks so far, or this host by any network, its own loopback included."""
    used = [transport.usage() for transport in transports.in_use()]
    hidden = sum(usage.hidden_bytes for usage in used if usage is not None)
    return int(hidden + psutil.net_io_counters().bytes_sent)


def main(argv: list[str]) -> int:
    """Trains, and leaves what was measured in a file on rank 0."""
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
