"""Looks up a private name, and creates the error for a Keras or TensorFlow version without it."""

from typing import Any

import keras
import tensorflow as tf

from hvdkit.errors import UsageError
from hvdkit.versions import NEWEST_KERAS, OLDEST_KERAS


class MissingNameError(UsageError):
    """The installed Keras or TensorFlow lacks a private name that hvdkit uses."""


def private(owner: Any, name: str) -> Any:
    """Returns the attribute `name` of a Keras object or class.

    Call this before you replace the attribute, too: assigning to a name that Keras never reads has no effect.

    Raises:
        MissingNameError: this Keras has no such name.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        kind = owner if isinstance(owner, type) else owner.__class__
        raise missing_in_keras(f"{kind.__name__}.{name}") from error


def private_of(owner: Any, name: str, library: str) -> Any:
    """Returns the attribute `name` of an object of another library.

    Raises:
        MissingNameError: the installed version has no such name.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise MissingNameError(
            f"The installed {library} has no {type(owner).__name__}.{name}, which hvdkit uses to divide its data. "
            f"Divide the data yourself, by hvd.rank() and hvd.size(), and give fit the result."
        ) from error


def missing_in_keras(what: str) -> MissingNameError:
    """Returns the error for a private name that this Keras does not have."""
    major, minor = NEWEST_KERAS
    return MissingNameError(
        f"Keras {keras.__version__} has no {what}, which hvdkit uses. hvdkit is proven with Keras up to "
        f"{major}.{minor}: pip install 'keras<{major}.{minor + 1}'."
    )


def missing_in_tensorflow(what: str) -> MissingNameError:
    """Returns the error for a private name that this TensorFlow does not have."""
    oldest, newest = (".".join(map(str, version)) for version in (min(OLDEST_KERAS), max(OLDEST_KERAS)))
    return MissingNameError(
        f"TensorFlow {tf.__version__} has no {what}, which hvdkit uses. hvdkit is proven with TensorFlow {oldest} to "
        f"{newest}: pip install 'tensorflow=={newest}.*'."
    )
