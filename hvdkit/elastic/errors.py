"""The error from which a rank recovers: a collective failed because a rank is lost."""

import contextlib
import re
from collections.abc import Iterator

import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

# The errors that TensorFlow raises if an operation of Horovod fails, and a pattern for their text.
_BROKEN = (
    tf.errors.AbortedError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
    tf.errors.UnknownError,
)
_OF_HOROVOD = re.compile(r"horovod|gloo|nccl|hvdkit\.", re.IGNORECASE)


@contextlib.contextmanager
def horovod_errors() -> Iterator[None]:
    """Turns TensorFlow's error from a failed collective into a `HorovodInternalError`, from which a rank can recover.

    Horovod's own `run` recognizes such an error only by the name of the failed node, and ignores all others.
    """
    try:
        yield
    except _BROKEN as error:
        if _OF_HOROVOD.search(str(error)):
            raise HorovodInternalError(str(error)) from error
        raise
