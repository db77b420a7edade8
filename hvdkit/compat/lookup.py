"""Looking up a private name, and the sentence for a Keras or TensorFlow that does not have it."""

from typing import Any

import keras
import tensorflow as tf

from hvdkit.errors import UsageError
from hvdkit.versions import NEWEST_KERAS, OLDEST_KERAS


class MissingNameError(UsageError):
    """The installed Keras or TensorFlow lacks a private name that hvdkit uses."""


def private(owner: Any, name: str) -> Any:
    """The attribute `name` of a Keras object or class.

    Ask for it before you replace it, too: assigning to a name that Keras never reads would change nothing.

    Raises:
        MissingNameError: this Keras has no such name.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        kind = owner if isinstance(owner, type) else owner.__class__
        raise missing_in_keras(f"{kind.__name__}.{name}") from error


def missing_in_keras(what: str) -> MissingNameError:
    """The error for something private that this Keras does not have."""
    major, minor = NEWEST_KERAS
    return MissingNameError(
        f"Keras {keras.__version__} has no {what}, which hvdkit uses. hvdkit is proven with Keras up to "
        f"{major}.{minor}: pip install 'keras<{major}.{minor + 1}'."
    )


def missing_in_tensorflow(what: str) -> MissingNameError:
    """The error for something private that this TensorFlow does not have."""
    oldest, newest = (".".join(map(str, version)) for version in (min(OLDEST_KERAS), max(OLDEST_KERAS)))
    return MissingNameError(
        f"TensorFlow {tf.__version__} has no {what}, which hvdkit uses. hvdkit is proven with TensorFlow {oldest} to "
        f"{newest}: pip install 'tensorflow=={newest}.*'."
    )
