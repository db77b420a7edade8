"""What `launch/local.sh` starts: the main job on ranks, with the launcher's options and the training's flags mixed.

    python -m hvdkit.train.local -np 4 --bind cores --model=cifar_cnn --workdir=DIR

The launcher's own parser takes its options; the rest are flags of the training, and are checked before any rank starts.
`--workdir` is for both. Without `-np` and hosts there are two ranks, or one where one process trains. Without any flag
of the training, it is the quick start: a training that gains by a second rank on two cores.
"""

import argparse
import sys

from hvdkit import outcome
from hvdkit.errors import UsageError
from hvdkit.launch import options
from hvdkit.launch.__main__ import launch
from hvdkit.train import flags
from hvdkit.train.settings import Config

# A small GPT on texts that come with Python. Its many small operations keep one core busy, but not two, and its batch
# is large enough that the gradients' exchange and the update, which each rank makes, are a small part of a step.
QUICK_START = ("--model=gpt", "--model-args=width=64", "--global-batch=32", "--epochs=4")


def main(argv: list[str]) -> int:
    """Trains, and returns the exit code: 2 for a wrong flag, else the launcher's."""
    arguments, given = options.divide(argv, "launch/local.sh")
    given = given or [*QUICK_START]
    if arguments.workdir:  # what ranks print is kept where the run writes
        given.append(f"--workdir={arguments.workdir}")
    try:
        config = flags.parse(["", *given])
    except UsageError as error:
        print(f"hvdkit.train: {error}", file=sys.stderr)
        return outcome.USAGE
    arguments.np = arguments.np or _ranks(arguments, config)
    arguments.command = [sys.executable, "-m", "hvdkit.train", *given]
    return launch(arguments)


def _ranks(arguments: argparse.Namespace, config: Config) -> int | None:
    """How many ranks there are where the user did not say; None for all places of the hosts."""
    if arguments.hosts or arguments.hostfile or arguments.hosts_from or arguments.host_discovery_script:
        return None
    return 1 if config.strategy in ("single", "mirrored", "tpu") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
