"""The part of hvdkit that is compiled: TensorFlow operations in C++, built against the TensorFlow that is installed.

`launch/bootstrap.sh` builds it; by hand, `python -m hvdkit.native`. Where it is not built, hvdkit does without.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import tensorflow as tf

from hvdkit.errors import UsageError

_FOLDER = Path(__file__).parent
_SOURCES = sorted(_FOLDER.glob("*.cc"))
# No errno for a square root below zero: with it a loop that takes roots is not vectorised. And no fused multiply-adds,
# which round once where Keras' operations round twice.
_FLAGS = ["-O3", "-fno-math-errno", "-ffp-contract=off", "-w", "-fPIC", "-shared"]


@functools.lru_cache(maxsize=1)
def library() -> Path:
    """Where the compiled library is, or would be: its name tells sources, flags and TensorFlow apart."""
    key = hashlib.sha256(b"".join(source.read_bytes() for source in _SOURCES))
    key.update(" ".join([*_FLAGS, tf.version.VERSION, tf.version.COMPILER_VERSION]).encode())
    return _FOLDER / f"operations-{key.hexdigest()[:12]}.so"


def is_built() -> bool:
    """Whether `load` will find it."""
    return library().is_file()


@functools.lru_cache(maxsize=1)
def load() -> Any:
    """The operations, as `tf.load_op_library` gives them."""
    return tf.load_op_library(str(library()))


def build() -> Path:
    """Compiles the library with `$CXX`, or `g++`, in about 25 seconds; one that is there stays.

    Raises:
        UsageError: there is no compiler, TensorFlow's headers are missing, or the folder cannot be written to.
    """
    made = library()
    if made.is_file():
        return made
    compiler = os.environ.get("CXX") or "g++"
    flags, sources = [*tf.sysconfig.get_compile_flags(), *_FLAGS], map(str, _SOURCES)
    try:
        # Made aside, then renamed: what stands under its name is whole.
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            aside = Path(folder, made.name)
            command = [*shlex.split(compiler), *flags, "-o", str(aside), *sources, *tf.sysconfig.get_link_flags()]
            subprocess.run(command, check=True, capture_output=True, text=True)
            aside.rename(made)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        line = next((line for line in said.splitlines() if "error" in line.lower()), said.strip())
        raise UsageError(
            f"hvdkit.native cannot be compiled with {compiler}: {line}. Install g++, or name a compiler in CXX; "
            f"TensorFlow's headers must be there, and {made.parent} writable. Without it ranks of one host exchange "
            f"over the loopback network, and Adam takes two to six times as long."
        ) from None
    return made


def exchange_times() -> tuple[int, int, int, int]:
    """What this process has spent in exchanges through shared memory.

    Returns:
        Nanoseconds in all, of these waiting for others, the number of exchanges, and the bytes brought to them.
    """
    load()  # first: TensorFlow finds no operations in a library that somebody else has opened
    values = [ctypes.c_uint64() for _ in range(4)]
    ctypes.CDLL(str(library())).hvdkit_exchange_times(*map(ctypes.byref, values))
    in_all, waiting, number, brought = (value.value for value in values)
    return in_all, waiting, number, brought
