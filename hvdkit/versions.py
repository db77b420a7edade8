"""The versions that hvdkit is tested with: for any other, `import hvdkit` says what it found and how to fix it.

With untested versions, training usually runs but may silently give other results than one process. So hvdkit rejects
them. This module reads package metadata and imports neither TensorFlow nor Keras. So the launcher starts at once, also
on a host without TensorFlow. `tests/versions.py` tests the table.
"""

import importlib.machinery
import importlib.metadata
import json
import os
import platform
import re
import sys
import warnings
from importlib import metadata
from pathlib import Path

# TensorFlow's minor versions, each with the oldest Keras that it allows, but at least 3.10: with 3.6, training under
# `mirrored` gives other weights than one process, and with 3.8, sharded slots cannot be distinguished by their names.
OLDEST_KERAS: dict[tuple[int, ...], tuple[int, ...]] = {
    (2, 16): (3, 10, 0),
    (2, 17): (3, 10, 0),
    (2, 18): (3, 10, 0),
    (2, 19): (3, 10, 0),
    (2, 20): (3, 10, 0),
    (2, 21): (3, 12, 0),
}
NEXT_KERAS = (4,)
NEWEST_KERAS = (3, 15)  # the newest minor version that tests/versions.py has tested
HOROVOD = (0, 28)
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)

# Distributions that contain the package tensorflow/; any other is looked up, which takes longer.
_TENSORFLOW = (
    "tensorflow",
    "tensorflow-cpu",
    "tensorflow-cpu-aws",
    "tensorflow-gpu",
    "tensorflow-intel",
    "tensorflow-macos",
    "tensorflow-rocm",
    "tf-nightly",
    "tf-nightly-cpu",
)
MISSING = "not installed"  # in place of a version
_KERAS = ("keras", "keras-nightly")


def check() -> None:
    """Rejects versions and settings that hvdkit is not tested with.

    A development version counts as the version that it precedes: 2.21.0rc1 and 2.21.0.dev20260101 are 2.21.

    Warns:
        UserWarning: Keras is newer than the newest tested version. It may work: Keras' public API is stable, and
            `hvdkit.compat` raises a clear error for a private name that was removed.

    Raises:
        ImportError: Python, TensorFlow, Keras or Horovod has a version out of range, TensorFlow is installed without
            Keras or twice, or Keras is set to another backend or to Keras 2. Without TensorFlow only Python is checked.
    """
    check_python(sys.version_info[:2])
    tensorflow = _installed("tensorflow", _TENSORFLOW)
    if not tensorflow:
        return
    minor = _check_tensorflow(tensorflow)
    _check_keras(_installed("keras", _KERAS), minor)
    _check_horovod(_installed("horovod", ("horovod",)))
    _check_settings()


def check_python(minor: tuple[int, ...]) -> None:
    """Rejects a Python version, given as (major, minor), without a TensorFlow that hvdkit is tested with.

    Raises:
        ImportError: `minor` is out of range.
    """
    if not OLDEST_PYTHON <= minor <= NEWEST_PYTHON:
        raise ImportError(
            f"hvdkit runs on Python {_dotted(OLDEST_PYTHON)} to {_dotted(NEWEST_PYTHON)}, and {sys.executable} is "
            f"Python {_dotted(minor)}: make an environment with another one, as in python{_dotted(NEWEST_PYTHON)} -m "
            f"venv .venv."
        )


def _check_tensorflow(found: dict[str, str]) -> tuple[int, ...]:
    oldest, newest = min(OLDEST_KERAS), max(OLDEST_KERAS)
    if len(set(found.values())) > 1:
        raise ImportError(
            f"{_listed(found)} are installed side by side in {sys.prefix}, and each overwrites parts of the other: "
            f"uninstall them all, then install one of TensorFlow {_dotted(oldest)} to {_dotted(newest)}."
        )
    minor = _release(next(iter(found.values())))[:2]
    if minor not in OLDEST_KERAS:
        raise ImportError(
            f"hvdkit is proven with TensorFlow {_dotted(oldest)} to {_dotted(newest)}, and {sys.prefix} has "
            f"{_listed(found)}: pip install 'tensorflow=={_dotted(newest)}.*', then build Horovod for it with "
            f"launch/bootstrap.sh --into {sys.prefix}."
        )
    return minor


def _check_keras(found: dict[str, str], tensorflow: tuple[int, ...]) -> None:
    oldest = OLDEST_KERAS[tensorflow]
    if not found:
        if importlib.machinery.PathFinder.find_spec("keras"):  # a checkout of Keras, whose version is unknown
            return
    elif all(oldest <= _release(version) < NEXT_KERAS for version in found.values()):
        _warn_of_newer_keras(found)
        return
    raise ImportError(
        f"hvdkit is proven with Keras {_dotted(oldest)} or newer, below {NEXT_KERAS[0]}, on TensorFlow "
        f"{_dotted(tensorflow)}, and {sys.prefix} has {_listed(found) or 'none'}: "
        f"pip install 'keras>={_dotted(oldest)},<{NEXT_KERAS[0]}'."
    )


def _warn_of_newer_keras(found: dict[str, str]) -> None:
    if any(_release(version)[:2] > NEWEST_KERAS for version in found.values()):
        major, minor = NEWEST_KERAS
        warnings.warn(
            f"hvdkit is proven with Keras up to {_dotted(NEWEST_KERAS)}, and {sys.prefix} has {_listed(found)}, with "
            f"which nobody has tried it: compare a short run with one process's, or pip install "
            f"'keras<{major}.{minor + 1}'.",
            stacklevel=5,  # of `import hvdkit`
        )


def _check_horovod(found: dict[str, str]) -> None:
    for version in found.values():
        if _release(version)[:2] != HOROVOD:
            raise ImportError(
                f"hvdkit is proven with Horovod {_dotted(HOROVOD)}, and {sys.prefix} has {version}: "
                f"launch/bootstrap.sh --into {sys.prefix} builds the right one."
            )


def _check_settings() -> None:
    backend, source = _backend()
    if backend != "tensorflow":
        raise ImportError(
            f"hvdkit needs Keras' backend 'tensorflow', and {source} says {backend!r}: set KERAS_BACKEND=tensorflow "
            f"before Keras and hvdkit are imported."
        )
    legacy = os.environ.get("TF_USE_LEGACY_KERAS", "")
    if legacy in ("true", "True", "1"):  # as TensorFlow reads it
        raise ImportError(
            f"hvdkit needs Keras 3, and TF_USE_LEGACY_KERAS={legacy} makes tf.keras Keras 2: unset TF_USE_LEGACY_KERAS."
        )


def _backend() -> tuple[str, str]:
    """Returns the backend that Keras will use, and where it is set; as in keras/src/backend/config.py."""
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"], "the environment variable KERAS_BACKEND"
    home = os.path.expanduser("~")  # noqa: PTH111 - Path.home() raises for a user without a home
    home = home if os.access(home, os.W_OK) else "/tmp"
    file = Path(os.path.expanduser(os.environ.get("KERAS_HOME", f"{home}/.keras"))) / "keras.json"  # noqa: PTH111
    try:
        return json.loads(file.read_text()).get("backend", "tensorflow"), str(file)
    except (OSError, ValueError, AttributeError):  # no such file, or no such JSON: Keras ignores it
        return "tensorflow", "Keras"


def _installed(module: str, names: tuple[str, ...]) -> dict[str, str]:
    """Returns the distributions that contain a top-level module, with their versions; empty if it is not installed."""
    found = _versions(names)
    if not found and importlib.machinery.PathFinder.find_spec(module):
        found = _versions(tuple(importlib.metadata.packages_distributions().get(module, ())))
    return found


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version:  # None: an empty folder left by an interrupted uninstall
            found[name] = version
    return found


def _release(version: str) -> tuple[int, ...]:
    """Returns the numbers of a version: 2.21.0.dev1 and 2.21.0+nv25.2 are (2, 21, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _listed(found: dict[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in found.items())


def of(module: str) -> str:
    """Returns the version of `tensorflow`, `keras` or `horovod`, whatever the name of its distribution."""
    names = {"tensorflow": _TENSORFLOW, "keras": _KERAS}.get(module, (module,))
    return ", ".join(_installed(module, names).values()) or MISSING


def installed() -> dict[str, str]:
    """Returns the versions of everything that affects the numbers of a run."""
    packages = ("hvdkit", "horovod", "tensorflow", "keras", "numpy", "tensorflow-datasets", "scikit-learn")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = MISSING
    return found
