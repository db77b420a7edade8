"""The program that a probe starts with the job's Python: reports versions, loads TensorFlow, and forks the ranks.

Loading TensorFlow takes seconds, so each host loads it once, while the other checks run, and forks its ranks from this
process. Do not call TensorFlow before the fork: its threads and GPU contexts do not survive a fork.

Like the probe, this program comes through a pipe and must stay a single file. It needs hvdkit only to open a data set.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import selectors
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PACKAGES = ("tensorflow", "keras", "horovod", "numpy", "hvdkit")
_OPTIONS = ("gloo", "mpi", "nccl", "cuda", "rocm", "ccl", "ddl")
_SMALL, _LARGE = 1 << 18, 1 << 24  # elements of 4 bytes: 1 MiB, 64 MiB
_AIM_SECONDS = 0.3  # target duration of one allreduce of the large buffer
_PR_SET_PDEATHSIG = 1


# ---- What is installed -----------------------------------------------------------------------------------------------


def versions() -> dict[str, Any]:
    """Versions from the packages' metadata, which is fast, and a fingerprint of hvdkit's sources."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    home = _folder("hvdkit")
    if home:
        stated = re.search(r'^__version__ = "(.+)"', (home / "__init__.py").read_text(), re.MULTILINE)
        digest = hashlib.sha256()
        for file in sorted(home.rglob("*.py")):
            digest.update(str(file.relative_to(home)).encode() + b"\0" + file.read_bytes())
        found["hvdkit"] = f"{stated[1] if stated else found['hvdkit']} ({digest.hexdigest()[:8]})"
    return {
        "python": platform.python_version(),
        "packages": found,
        "prefix": sys.prefix,
        "executable": sys.executable,
        "hvdkit_at": str(home) if home else None,
    }


def _folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def load() -> dict[str, Any]:
    """Loads TensorFlow and Horovod, and returns the options with which Horovod was built."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    built = {name: int(getattr(hvd, f"{name}_built")()) for name in _OPTIONS}
    by = _folder("horovod")
    metadata = by / "metadata.json" if by else None
    against = json.loads(metadata.read_text()) if metadata and metadata.is_file() else {}
    return {
        "tensorflow": tf.__version__,
        "built": built,
        "built_with": against.get("tensorflow"),
        "cuda": bool(tf.test.is_built_with_cuda()),
    }


# ---- In child processes ----------------------------------------------------------------------------------------------


def visible_gpus() -> list[str]:
    """The GPUs that TensorFlow can use."""
    import tensorflow as tf

    return [device.name for device in tf.config.list_physical_devices("GPU")]


def read_dataset(dataset: str, data_dir: str | None, schema: dict[str, Any]) -> dict[str, Any]:
    """Opens a data set as the training job does, and reads the first and last example of each split."""
    from hvdkit.data.sources import Schema, open_source

    source = open_source(dataset, data_dir, schema=Schema(**schema))
    sizes = {split: source.size(split) for split in ("train", "test")}
    for split, size in sizes.items():
        for place in {0, size - 1}:
            ((encoded, _),) = source.read(split, place, place + 1).as_numpy_iterator()
            source.decode(encoded)
    return {"sizes": sizes}


def allreduce(env: dict[str, str]) -> dict[str, Any]:
    """Runs one rank: sums numbers over all ranks, and measures the allreduce of a large buffer."""
    os.environ.update(env)
    import horovod.tensorflow as hvd
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        tf.config.set_visible_devices(gpus[int(env["HOROVOD_LOCAL_RANK"]) % len(gpus)], "GPU")
    hvd.init()
    rank, size = hvd.rank(), hvd.size()

    def total(elements: int) -> tuple[float, bool]:
        pattern = tf.range(elements, dtype=tf.float32) % 7 + 1  # sums of small integers are exact
        mine = pattern * (rank + 1)
        began = time.perf_counter()
        summed = hvd.allreduce(mine, op=hvd.Sum, name=f"hvdkit.doctor.{elements}").numpy()
        seconds = time.perf_counter() - began
        return seconds, bool((summed == pattern.numpy() * (size * (size + 1) // 2)).all())

    tries = [total(_SMALL) for _ in range(3)]
    slowest = hvd.allreduce(tf.constant(min(seconds for seconds, _ in tries)), op=hvd.Max, name="hvdkit.doctor.time")
    elements = max(_SMALL, min(_LARGE, int(_SMALL * _AIM_SECONDS / float(slowest))))  # the same on all ranks
    large = [total(elements) for _ in range(3)]
    answer = {
        "rank": rank,
        "size": size,
        "right": all(right for _, right in tries + large),
        "bytes": elements * 4,
        "seconds": min(seconds for seconds, _ in large),
        "device": "GPU" if gpus else "CPU",
    }
    hvd.shutdown()
    return answer


def in_children(work: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], limit: float) -> list[dict[str, Any]]:
    """Calls a function in parallel forked processes; returns each one's answer, or why there is none."""
    children = [_Child(work, each) for each in arguments]
    until = time.monotonic() + limit
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.pipe, selectors.EVENT_READ, child)
        while selector.get_map() and time.monotonic() < until:
            for key, _ in selector.select(until - time.monotonic()):
                if not key.data.listen():
                    selector.unregister(key.fd)
    return [child.end(limit) for child in children]


class _Child:
    """A forked process that calls a function and sends its result."""

    def __init__(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.pipe, theirs = os.pipe()
        self._said = b""
        self._is_over = False
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - stays open as long as the process runs
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            os.dup2(self._complaints.fileno(), 2)
            _die_with(parent)
            try:
                answer: dict[str, Any] = {"answer": work(*arguments)}
            except BaseException as error:  # report it to the doctor
                answer = {"problem": f"{type(error).__name__}: {error}".partition("\n")[0]}
            with os.fdopen(theirs, "wb") as pipe:
                pipe.write(json.dumps(answer).encode())
            os._exit(0)  # skip the exit handlers of TensorFlow and Horovod
        os.close(theirs)

    def listen(self) -> bool:
        """Reads the available output; returns whether more may follow."""
        data = os.read(self.pipe, 1 << 16)
        self._said += data
        self._is_over = not data
        return bool(data)

    def end(self, limit: float) -> dict[str, Any]:
        """Ends the process and returns its answer, or why there is none."""
        os.close(self.pipe)
        if not self._is_over:
            os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        if self._is_over and self._said:
            return dict(json.loads(self._said))
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        last = next((line.strip() for line in reversed(lines) if "what():" in line or "rror" in line), "")
        code = os.waitstatus_to_exitcode(status)
        how = f"it ended with {code}" if self._is_over else f"it did not finish within {limit:g} s"
        return {"problem": f"{how}: {last[-400:]}" if last else how}


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


# ---- The doctor's orders ---------------------------------------------------------------------------------------------


def obey(order: dict[str, Any]) -> Any:
    """Carries out one order."""
    if order["do"] == "gpus":
        return in_children(visible_gpus, [()], order["limit"])[0]
    if order["do"] == "dataset":
        return in_children(read_dataset, [(order["dataset"], order["data_dir"], order["schema"])], order["limit"])[0]
    return in_children(allreduce, [(env,) for env in order["ranks"]], order["limit"])


def main() -> None:
    """Reports what is installed, loads it, and carries out orders until the input closes."""
    _die_with(os.getppid())
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps the output of libraries out of the answers

    def say(content: Any) -> None:
        channel.write(json.dumps(content) + "\n")
        channel.flush()

    say(versions())
    if "--versions" in sys.argv:
        return
    try:
        say({"answer": load()})
    except Exception as error:  # a broken installation can raise anything
        say({"problem": f"{type(error).__name__}: {error}".partition("\n")[0]})
    for line in sys.stdin.buffer:
        say(obey(json.loads(line)))


if __name__ == "__main__":
    main()
