"""Trains a Keras model on real data, on any number of ranks: see `hvdkit.train.run`."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hvdkit import outcome, signals, world
from hvdkit.errors import ReplicasDiverged, UnfitSizeError, UnreadableExampleError, UsageError
from hvdkit.train import flags
from hvdkit.train.flags import parser as parser  # for completion in shells
from hvdkit.train.settings import Config

if TYPE_CHECKING:
    import keras

    from hvdkit.train.run import Tap


def main(argv: list[str], more_callbacks: Sequence["keras.callbacks.Callback"] = (), tap: "Tap | None" = None) -> int:
    """Runs the job; `more_callbacks` and `tap` as for `run`.

    Returns:
        0 on success, 2 for an error that the user can fix, 1 if the replicas diverged, 85 if a signal preempted the
        job (the same command resumes it), and in an elastic job 86 if it needs another number of ranks.
    """
    try:
        config = flags.parse_for_one_strategy(argv)
    except UsageError as error:
        return _fail(error)
    return _train(config, more_callbacks, tap)


def _train(config: Config, more_callbacks: Sequence["keras.callbacks.Callback"], tap: "Tap | None") -> int:
    # Imported here because they load TensorFlow, which takes seconds: --help and a wrong flag must not wait for it.
    with signals.exiting_at_once():
        from hvdkit import runtime, watchdog
        from hvdkit.train.run import run

    try:
        with signals.leaving_at_once():
            run(config, more_callbacks, tap)
    except signals.Preempted as left:
        signals.ignore()  # a scheduler and a launcher may both send one
        if not left.agreed:
            watchdog.fail(left, outcome.PREEMPTED)
        return outcome.PREEMPTED
    except UnreadableExampleError as error:
        # The other ranks do not know of it yet. The watchdog tells them, and shows it once.
        return outcome.USAGE if watchdog.fail(error, outcome.USAGE) else _fail(error)
    except (UsageError, ReplicasDiverged) as error:
        return _fail(error)
    except Exception as error:
        if world.launched_size() == 1:  # with more ranks, the watchdog reports it
            outcome.tell(outcome.Failed("error", 1, f"{type(error).__name__}: {error}", rank=0))
        raise
    finally:
        runtime.shutdown()
    return 0


def _fail(error: UsageError | ReplicasDiverged) -> int:
    logging.getLogger("hvdkit").debug("left with", exc_info=True)
    code = _exit_code(error)
    if world.launched_rank() == 0:  # all ranks exit with the same message; show it once
        print(f"hvdkit.train: {error}", file=sys.stderr, flush=True)
        outcome.tell(outcome.Failed("usage" if code != 1 else "diverged", code, str(error), rank=0))
    return code


def _exit_code(error: UsageError | ReplicasDiverged) -> int:
    if isinstance(error, UnfitSizeError) and os.environ.get("HVDKIT_ELASTIC"):
        return outcome.UNFIT_SIZE
    return outcome.USAGE if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
