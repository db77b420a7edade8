"""The one exception that means "the user can mend this": shown as a sentence, without a traceback, exit code 2."""


class UsageError(ValueError):
    """A mistake in what the user gave: the message says what was given, what was expected and how to mend it."""


class UnfitSizeError(UsageError):
    """This number of ranks cannot be used, and a smaller one could: an elastic job is started again with one less."""


class ReplicasDiverged(RuntimeError):  # noqa: N818 - says what happened, as Horovod's own exceptions do
    """Replicas that must hold the same weights do not: the message names the ranks and the first variable."""
