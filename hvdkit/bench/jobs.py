"""Start the measured jobs the way a user does, and read their results."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvdkit.errors import UsageError

_LIMIT = 600  # seconds for one measurement


def usable_cores() -> list[int]:
    """Return the numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def bound_to(cores: Sequence[int] | None) -> list[str]:
    """Return the command prefix that binds a command to these cores."""
    return ["taskset", "-c", ",".join(map(str, cores))] if cores else []


def run(command: Sequence[str], environment: dict[str, str] | None = None, limit: float = _LIMIT) -> str:
    """Run a command and return its output.

    Raises:
        UsageError: the command failed or timed out; the message contains the last lines of its output.
    """
    everything = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1", **(environment or {})}
    process = subprocess.Popen(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=everything
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher then stops its ranks
        output, _ = process.communicate()
        raise UsageError(f"{' '.join(command)} was not done within {limit:g} s:\n{_end(output)}") from None
    if process.returncode:
        raise UsageError(f"{' '.join(command)} ended with {process.returncode}:\n{_end(output)}")
    return output


def train(
    launcher: Sequence[str],
    flags: Sequence[str],
    seconds: float,
    environment: dict[str, str] | None = None,
    cores: Sequence[int] | None = None,
    prefix: Sequence[str] = (),
    *,
    counts_zeros: bool = False,
) -> dict[str, Any]:
    """Measure one training job.

    Args:
        launcher: arguments of hvdkit.launch, such as `-np 2`; empty for one process without a launcher.
        flags: flags of hvdkit.train.
        seconds: duration of the measurement.
        environment: additional environment variables.
        cores: cores of this host that the job may use; None for all.
        prefix: command that starts each rank's program, if not the launcher itself.
        counts_zeros: whether to count the zeros of gradients, too, which takes time in each step.
    """
    return train_each(launcher, [flags], seconds, environment, cores, prefix, counts_zeros=counts_zeros)[0]


def train_each(
    launcher: Sequence[str],
    several: Sequence[Sequence[str]],
    seconds: float,
    environment: dict[str, str] | None = None,
    cores: Sequence[int] | None = None,
    prefix: Sequence[str] = (),
    *,
    counts_zeros: bool = False,
) -> list[dict[str, Any]]:
    """Measure several trainings in one job, one after the other: processes start only once.

    Args:
        launcher: see `train`.
        several: flags of hvdkit.train for each training.
        seconds: duration of each measurement.
        environment: see `train`.
        cores: see `train`.
        prefix: see `train`.
        counts_zeros: see `train`.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        program = [*prefix, sys.executable, "-m", "hvdkit.bench.rank", str(seconds), str(result)]
        program += ["--count-zeros"] if counts_zeros else []
        program += [flag for flags in several for flag in ("---", *flags)]
        start = [sys.executable, "-m", "hvdkit.launch", *launcher, "--"] if launcher else []
        run([*bound_to(cores), *start, *program], environment, limit=_LIMIT * len(several))
        return list(json.loads(result.read_text()))


def _end(output: str) -> str:
    return "\n".join(output.strip().splitlines()[-15:])
