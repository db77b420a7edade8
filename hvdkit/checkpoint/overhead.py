"""How much of the training time checkpoints may take, and whether the next one is within it."""

import time


class Overhead:
    """Decides whether a checkpoint is due, so that checkpoints take at most a share of the training time.

    The last checkpoint tells what the next one will cost: the time that training waited for its snapshot, and the
    processor time of the thread that wrote it. Time that the thread waited for the disk costs training nothing.

    After J. Mohan, A. Phanishayee and V. Chidambaram, "CheckFreq: Frequent, Fine-Grained DNN Checkpointing", 2021,
    which chooses the frequency of checkpoints by a limit to their overhead.

    Args:
        most: the largest share of the training time, over 0; None for no limit.
    """

    def __init__(self, most: float | None) -> None:
        self._most = most
        self._began: float | None = None  # when the last checkpoint began
        self._waited = 0.0  # seconds that training waited for it

    def add(self, began: float, waited: float) -> None:
        """Notes a checkpoint: when it began, by `time.perf_counter`, and the seconds that training waited for it."""
        self._began, self._waited = began, waited

    def allows(self, writing: float) -> bool:
        """Returns whether another checkpoint is within the limit. The first one is.

        Args:
            writing: processor time that writing the last one took, in seconds.
        """
        if self._most is None or self._began is None:
            return True
        return time.perf_counter() - self._began >= (self._waited + writing) / self._most
