"""TensorFlow operations in C++, compiled for the installed TensorFlow.

`launch/bootstrap.sh` compiles them; to do it by hand, run `python -m hvdkit.native`. hvdkit also works without them.
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
_HEADERS = sorted(_FOLDER.glob("*.h"))
# -fno-math-errno: a loop with square roots that may set errno is not vectorized. -ffp-contract=off: a fused
# multiply-add rounds once, but Keras' operations round twice.
_FLAGS = ["-O3", "-fno-math-errno", "-ffp-contract=off", "-w", "-fPIC", "-shared"]


@functools.lru_cache(maxsize=1)
def library() -> Path:
    """Returns the path of the compiled library. Its name contains a hash of sources, flags and TensorFlow version."""
    key = hashlib.sha256(b"".join(file.read_bytes() for file in [*_SOURCES, *_HEADERS]))
    key.update(" ".join([*_FLAGS, tf.version.VERSION, tf.version.COMPILER_VERSION]).encode())
    return _FOLDER / f"operations-{key.hexdigest()[:12]}.so"


def is_built() -> bool:
    """Returns whether the library is compiled, as `load` needs it."""
    return library().is_file()


@functools.lru_cache(maxsize=1)
def load() -> Any:
    """Loads the library and returns its operations, as `tf.load_op_library` does."""
    return tf.load_op_library(str(library()))


def build() -> Path:
    """Compiles the library with `$CXX` or `g++`, in about 30 seconds, unless it exists.

    Raises:
        UsageError: there is no compiler, TensorFlow's headers are missing, or the folder cannot be written to.
    """
    made = library()
    if made.is_file():
        return made
    compiler = os.environ.get("CXX") or "g++"
    flags, sources = [*tf.sysconfig.get_compile_flags(), *_FLAGS], map(str, _SOURCES)
    try:
        # Compile in a temporary folder, then rename: a file with the final name is always complete.
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
            f"TensorFlow's headers must be installed, and {made.parent} writable. Without it, ranks of one host "
            f"communicate over the loopback network, and Adam takes two to six times as long."
        ) from None
    return made


@functools.lru_cache(maxsize=1)
def _functions() -> ctypes.CDLL:
    """Returns the library's C functions."""
    load()  # before CDLL: TensorFlow finds no operations in a library that is already open
    return ctypes.CDLL(str(library()))


def exchange_times() -> tuple[int, int, int, int]:
    """Returns what this process has spent in collectives through shared memory.

    Returns:
        Total nanoseconds, nanoseconds of waiting for other ranks, number of collectives, and bytes of their inputs.
    """
    return _four_numbers(_functions().hvdkit_exchange_times)


def sockets_times() -> tuple[int, int, int, int]:
    """Returns what this process has spent in collectives through sockets.

    Returns:
        Total nanoseconds, nanoseconds of waiting for other ranks, number of collectives, and bytes sent.
    """
    return _four_numbers(_functions().hvdkit_sockets_times)


def start_sockets(files: dict[int, int], packing: int) -> None:
    """Hands connected sockets to the operations that use them.

    Args:
        files: the file descriptor of the connection to each other rank.
        packing: whether to leave out zeros: 0 never, 1 always, 2 where it saves time.
    """
    numbers = ctypes.c_int * len(files)
    _functions().hvdkit_sockets_start(len(files), numbers(*files), numbers(*files.values()), packing)


def stop_sockets() -> None:
    """Closes the connections; operations that wait for them fail."""
    _functions().hvdkit_sockets_stop()


def _four_numbers(function: Any) -> tuple[int, int, int, int]:
    values = [ctypes.c_uint64() for _ in range(4)]
    function(*map(ctypes.byref, values))
    first, second, third, fourth = (value.value for value in values)
    return first, second, third, fourth
