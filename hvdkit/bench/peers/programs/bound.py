"""Run a command on the cores of its rank: bound.py 0,1 command...

The list names the cores of all ranks in the order of the ranks, and each gets the same number of neighbours in it. A
command that is no rank gets all of them.
"""

import os
import sys
from collections.abc import Sequence


def share(cores: Sequence[int], rank: int, size: int) -> Sequence[int]:
    """Return the cores of one of `size` ranks."""
    each = len(cores) // size
    return cores[rank * each : (rank + 1) * each]


def main() -> None:
    """Bind this process and become the command."""
    rank, size = (int(os.environ.get(f"HOROVOD_{name}", usual)) for name, usual in (("RANK", 0), ("SIZE", 1)))
    os.sched_setaffinity(0, share([int(core) for core in sys.argv[1].split(",")], rank, size))
    os.environ["HVDKIT_OWN_CORES"] = "1"  # hvdkit then uses all visible cores instead of a local rank's part of them
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
