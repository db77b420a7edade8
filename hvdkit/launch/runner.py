"""Horovod's runner, as `hvdkit.launch` starts it in place of `horovodrun`. Two things differ.

`horovodrun` asks whether Gloo is there by importing TensorFlow in a process of its own, for seconds, before the first
rank starts. A rank without Gloo says so itself, and `launch/bootstrap.sh` always builds it.

`horovodrun` ends all ranks in the instant in which it sees the first one fail. That one is often not the cause: a rank
that was killed takes the others' connections with it, and which end is seen first is chance. Here the others have
GRACE_SECONDS to end by themselves and to say why, and each rank that does is told to the launcher.
"""

import sys
import threading
from collections.abc import Callable
from typing import Any

from horovod.runner import gloo_run, launch

from hvdkit.launch.console import ended_by_itself

GRACE_SECONDS = 2.0


class Grace:
    """Stands before `safe_shell_exec.execute`, which runs one rank and returns its exit code."""

    def __init__(self, execute: Callable[..., int]) -> None:
        self._execute = execute
        self._running = 0
        self._changed = threading.Condition()

    def __call__(self, command: str, **options: Any) -> int:
        """Runs a rank; after a failure of its own returns when no other rank runs, or when the grace is over."""
        with self._changed:
            self._running += 1
        try:
            code = self._execute(command, **options)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()
        if code != 0 and not any(event.is_set() for event in options.get("events") or ()):
            print(ended_by_itself(options["index"], code), flush=True)
            with self._changed:
                self._changed.wait_for(lambda: self._running == 0, GRACE_SECONDS)
        return code


if __name__ == "__main__":
    launch.gloo_built = lambda verbose=False: True
    gloo_run.safe_shell_exec.execute = Grace(gloo_run.safe_shell_exec.execute)
    sys.exit(launch.run_commandline())
