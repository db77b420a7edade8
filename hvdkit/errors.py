"""Exceptions for users. `UsageError` means "the user can fix this": shown without a traceback, exit code 2."""

from typing import TYPE_CHECKING


class UsageError(ValueError):
    """An error in the user's input: the message says what was given, what was expected and how to fix it."""

    if not TYPE_CHECKING:  # AutoGraph raises such errors again as they are, with the user's line, and others as its own
        __init__ = Exception.__init__


class NotInitializedError(UsageError, RuntimeError):
    """`hvdkit.init` was not called. A `ValueError`, as in Horovod."""


class UnfitSizeError(UsageError):
    """This number of ranks is not usable, but a smaller one may be: an elastic job restarts with one rank less."""


class UnreadableExampleError(UsageError):
    """An example cannot be read in the middle of a training: raised on the rank that reads it, and on no other."""


class ReplicasDiverged(RuntimeError):  # noqa: N818 - says what happened, as Horovod's own exceptions do
    """Replicas that must hold the same weights differ: the message names the ranks and the first variable."""
