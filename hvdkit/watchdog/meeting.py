"""The execution after which all ranks leave the training together, agreed between the watchdogs.

Where every step exchanges gradients, a rank's wish to leave travels with them. In local SGD, hundreds of steps may pass
until the next exchange, and under `tf.distribute` nothing of hvdkit's is exchanged. Then

1. a rank that was told to leave tells the hub, which asks all ranks how many executions they have done;
2. a rank answers at once, although its training goes on, and waits after the execution that it is in, at the latest;
3. so no rank passes the execution after the most that any has done: the hub names it, and all go on until there.
"""

import threading

_PATIENCE = 30.0  # seconds for the hub's answer, which takes milliseconds: without a hub the job fails anyway


class Meeting:
    """What the training thread and the watchdog's thread of this rank know about the meeting.

    Attributes:
        done: how many executions of the running `fit` this rank has done; the training thread counts them.
        is_called: whether a rank was told to leave.
    """

    def __init__(self) -> None:
        self.done = 0
        self.is_called = False
        self._after: int | None = None
        self._is_agreed = threading.Event()

    def is_now(self, done: int) -> bool:
        """Returns whether all ranks leave after this execution; the training thread asks after each.

        Args:
            done: number of executions that this rank has done.
        """
        self.done = done  # before the flag is read: see `call`
        if not self.is_called:
            return False
        self._is_agreed.wait(_PATIENCE)
        return self._after is not None and done >= self._after

    def call(self) -> int:
        """Makes the training thread wait, and returns how many executions it has done, or is about to have done."""
        self.is_called = True  # before the number is read: the training thread does at most one more
        return self.done

    def agree(self, after: int) -> None:
        """Records the execution after which all leave."""
        self._after = after
        self._is_agreed.set()

    def clear(self) -> None:
        """Forgets the meeting, when the training has ended."""
        self.is_called, self.done, self._after = False, 0, None
        self._is_agreed.clear()
