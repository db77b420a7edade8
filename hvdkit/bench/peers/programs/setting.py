"""What the bench has told this program: its workloads, threads, cores and addresses."""

import os
import sys


def chosen() -> list[str]:
    """Return the names of the workloads to measure, from the command line."""
    return sys.argv[-1].split(",")


def ranks() -> int:
    """Return the number of ranks or replicas."""
    return int(os.environ["HVDKIT_BENCH_RANKS"])


def threads() -> int:
    """Return the number of threads for this rank."""
    return int(os.environ["HVDKIT_BENCH_THREADS"])


def pin(local_rank: int) -> None:
    """Bind this rank to its own cores if HVDKIT_BENCH_PIN is 1."""
    if os.environ.get("HVDKIT_BENCH_PIN") == "1":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[local_rank * threads() : (local_rank + 1) * threads()])


def addresses() -> list[str]:
    """Return an address of each rank, `host:port`, at which a tool without Horovod's rendezvous may listen."""
    return os.environ["HVDKIT_BENCH_ADDRESSES"].split(",")


def rank_and_size() -> tuple[int, int, int]:
    """Return the rank, the number of ranks and the local rank, as hvdkit.launch and horovodrun set them."""
    rank, size, local_rank = (int(os.environ[f"HOROVOD_{name}"]) for name in ("RANK", "SIZE", "LOCAL_RANK"))
    return rank, size, local_rank
