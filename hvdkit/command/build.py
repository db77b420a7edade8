"""The installed versions and how Horovod was built, for `hvdkit --version`."""

import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from hvdkit import versions

_BACKENDS = {"gloo": "Gloo", "mpi": "MPI", "nccl": "NCCL"}
_SECONDS = 60
# Asks Horovod's library without importing TensorFlow. This runs in a separate process, because loading TensorFlow's
# shared libraries may log or crash.
_ASK = """
import ctypes, json, sys
library = ctypes.CDLL(sys.argv[1])
print(json.dumps({name: getattr(library, f"horovod_{name}_built")() for name in sys.argv[2:]}))
"""


def versions_text() -> str:
    """Return the versions of hvdkit, Python, TensorFlow, Keras and Horovod in three lines."""
    found = {name: versions.of(name) for name in ("tensorflow", "keras", "horovod")}
    own = importlib.import_module("hvdkit").__version__
    built = "" if found["horovod"] == versions.MISSING else f", {how_horovod_was_built()}"
    return (
        f"hvdkit {own}, Python {platform.python_version()}\n"
        f"TensorFlow {found['tensorflow']}, Keras {found['keras']}\n"
        f"Horovod {found['horovod']}{built}"
    )


def how_horovod_was_built() -> str:
    """Return how Horovod was built, as in: built with Gloo and MPI, without NCCL."""
    tensorflow, library = _folder("tensorflow"), next(_folder("horovod").glob("tensorflow/mpi_lib*.so"), None)
    if library is None:
        return "built without TensorFlow: build it with launch/bootstrap.sh"
    paths = [str(tensorflow), str(tensorflow / "python"), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths))}
    command = [sys.executable, "-c", _ASK, str(library), *_BACKENDS]
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS)
        built = json.loads(ended.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return "which cannot be loaded: build it with launch/bootstrap.sh"
    parts = {
        "built with": [title for name, title in _BACKENDS.items() if built[name]],
        "without": [title for name, title in _BACKENDS.items() if not built[name]],
    }
    return ", ".join(f"{word} {' and '.join(titles)}" for word, titles in parts.items() if titles)


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    return Path(next(iter(spec.submodule_search_locations or [""]))) if spec else Path("/nonexistent")
