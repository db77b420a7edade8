"""The Python environments of the peers, created in the cache folder at first use and kept.

`python -m hvdkit.bench.peers.environments NAME` creates one, as the bench does on other hosts.
"""

import contextlib
import dataclasses
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hvdkit.errors import UsageError

_HOROVOD = {
    "HOROVOD_WITH_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_PYTORCH": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITHOUT_MPI": "1",
}


@dataclasses.dataclass(frozen=True)
class Environment:
    """The Python environment of a peer.

    Attributes:
        name: name of its folder.
        installs: arguments of each `pip install` call.
        newest_python: newest minor version of Python 3 for which its packages have wheels.
    """

    name: str
    installs: tuple[tuple[str, ...], ...]
    newest_python: int = 99

    def python(self) -> Path:
        """Return the path of its interpreter; create the environment if it is missing.

        Raises:
            UsageError: the environment cannot be created; the message gives the reason.
        """
        folder = cache() / "peers" / self.name
        python, ready = folder / "bin" / "python", folder / ".hvdkit-ready"
        wanted = repr(self.installs)
        with _lock(folder):  # hosts may share the folder
            if ready.is_file() and ready.read_text() == wanted:
                return python
            if sys.version_info[1] > self.newest_python:
                raise UsageError(f"needs Python 3.{self.newest_python} or older, and this is 3.{sys.version_info[1]}")
            print(f"making the environment {folder} (minutes, once)", file=sys.stderr, flush=True)
            self._call([sys.executable, "-m", "venv", str(folder)])
            for arguments in self.installs:
                self._call([str(python), "-m", "pip", "install", "-q", *arguments])
            ready.write_text(wanted)
        return python

    def _call(self, command: list[str]) -> None:
        done = subprocess.run(command, env={**os.environ, **_HOROVOD}, capture_output=True, text=True, check=False)
        if done.returncode:
            last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise UsageError(f"`{' '.join(command)}` failed: {last}")


def cache() -> Path:
    """Return hvdkit's cache folder."""
    return Path(os.environ.get("HVDKIT_CACHE") or Path.home() / ".cache" / "hvdkit")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


TORCH = Environment("torch", (("torch==2.13.0", "numpy"),))
KERAS_2 = Environment(
    "horovod-keras2",
    (
        ("tensorflow==2.15.1", "setuptools<81", "wheel", "cloudpickle", "psutil", "pyyaml", "packaging", "cffi"),
        ("--no-build-isolation", "horovod==0.28.1"),
    ),
    newest_python=11,
)
TF_KERAS = Environment("tf_keras", (("tensorflow==2.21.0", "tf_keras==2.21.0"),))
KERAS_JAX = Environment("keras_jax", (("jax==0.10.2", "keras==3.15.1"),))
ENVIRONMENTS = {each.name: each for each in (TORCH, KERAS_2, TF_KERAS, KERAS_JAX)}

if __name__ == "__main__":
    try:
        ENVIRONMENTS[sys.argv[1]].python()
    except UsageError as error:
        sys.exit(str(error))
