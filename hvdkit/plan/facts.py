"""Measure the user's model: step time by batch size, memory, and the compute time of compression."""

import contextlib
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from hvdkit.bench import jobs
from hvdkit.errors import UsageError
from hvdkit.plan.cost import Compute

_MANY_STEPS = 10  # steps per execution for short steps
_SHORT = 0.2  # seconds of a step


def measure(
    flags: Sequence[str], local_batch: int, threads: int, beside: int, bound: bool, seconds: float
) -> tuple[Compute, dict[str, Any]]:
    """Train the model for some seconds at 1 and 2 times its batch size, in processes that do not communicate.

    If its steps are short, several run per execution, as in training (see `hvdkit.model.executions`). A short first run
    tells, and counts the zeros of the gradients. As many processes train in parallel as one machine has ranks, because
    ranks share memory bandwidth and caches.

    Args:
        flags: flags of hvdkit.train, without a batch size.
        local_batch: samples per step of a rank.
        threads: threads of each rank.
        beside: ranks that run in parallel on one machine.
        bound: whether each rank is bound to its own cores.
        seconds: duration of each measurement.

    Returns:
        The compute cost of a rank, and a dictionary with `shapes`, `divisions`, `one_process` and an empty
        `compression_seconds`. `one_process` is the samples per second of one process that has all cores and the batch
        of all ranks of this machine. It is None if one rank runs alone or ranks are not bound to their own cores.
    """

    def train(batch: int, many: int, seconds: float, counts_zeros: bool = False) -> dict[str, Any]:
        own = [*flags, f"--global_batch={batch}", "--strategy=single", f"--threads={threads}"]
        own.append(f"--steps_per_execution={many}")

        def alone(cores: list[int] | None) -> dict[str, Any]:
            return jobs.train(["-np", "1"], own, seconds, cores=cores, counts_zeros=counts_zeros)

        found = _side_by_side(alone, threads, beside, bound)
        return {**found[0], "samples_per_second": [rate for run in found for rate in run["samples_per_second"]]}

    first = train(local_batch, 1, seconds / 4, counts_zeros=True)
    many = together(local_batch / statistics.median(first["samples_per_second"]))

    def train_as_ranks_do(batch: int) -> dict[str, Any]:
        try:
            return train(batch, many, seconds)
        except UsageError:
            if many == 1:
                raise
            return train(batch, 1, seconds)  # the steps of an epoch are no multiple

    runs = {batch: train_as_ranks_do(batch) for batch in (local_batch, 2 * local_batch)}
    known = {name: runs[local_batch]["facts"][name] for name in ("shapes", "divisions")}
    known |= {"one_process": None, "compression_seconds": {}}
    if bound and beside > 1:
        own = [*flags, f"--global_batch={local_batch * beside}", "--strategy=single"]
        with contextlib.suppress(UsageError):  # the batch may exceed the data set
            known["one_process"] = statistics.median(jobs.train(["-np", "1"], own, seconds)["samples_per_second"])
    zeros = first["facts"]["zero_share"]
    return dataclasses.replace(from_runs(runs, threads, beside), zero_share=zeros), known


def together(step_seconds: float) -> int:
    """Return the number of steps per execution for steps of this duration, so Python's overhead is negligible."""
    return _MANY_STEPS if step_seconds < _SHORT else 1


def from_runs(runs: dict[int, dict[str, Any]], threads: int, beside: int = 1) -> Compute:
    """Fit step time as a linear function of the batch size.

    Args:
        runs: measurements by batch size.
        threads: threads of each rank.
        beside: ranks that ran in parallel on one machine.
    """
    steps = {batch: [batch / rate for rate in run["samples_per_second"]] for batch, run in runs.items()}
    batches = np.array(sorted(steps), float)
    middle = np.array([statistics.median(steps[int(b)]) for b in batches])
    slope, start = (0.0, float(middle[0]))
    if len(batches) > 1:
        slope, start = np.polyfit(batches, middle, 1, w=1 / middle)
    if start < 0 or slope < 0:  # noise: force the line through the origin, or make it constant
        slope, start = (float(np.mean(middle / batches)), 0.0) if start < 0 else (0.0, float(np.mean(middle)))
    spreads = [np.subtract(*np.quantile(s, [0.75, 0.25])) / 1.349 / np.median(s) for s in steps.values()]
    least, most = runs[int(batches[0])], runs[int(batches[-1])]
    facts = most["facts"]
    per_sample = (max(most["peak_bytes"]) - max(least["peak_bytes"])) / max(1.0, batches[-1] - batches[0])
    activations = max(0.0, per_sample)
    known = facts["state_bytes"] + facts["gradient_bytes"]
    return Compute(
        fixed=float(start),
        sample=float(slope),
        deviation=float(np.median(spreads)),
        threads=threads,
        beside=beside,
        gradient_bytes=facts["gradient_bytes"],
        state_bytes=facts["state_bytes"],
        activation_bytes=activations,
        base_bytes=max(0.0, max(least["peak_bytes"]) - known - activations * batches[0]),
    )


def compression_seconds(
    names: Sequence[str], shapes: Sequence[Sequence[int]], threads: int, beside: int, bound: bool
) -> dict[str, float]:
    """Measure the compute seconds of each compressor for gradients of these shapes; see `hvdkit.plan.compressing`.

    Args:
        names: names of compressors.
        shapes: shapes of the gradients.
        threads: threads of each rank.
        beside: processes that run in parallel.
        bound: whether each process is bound to its own cores.
    """
    program = [sys.executable, "-m", "hvdkit.plan.compressing", ",".join(names), json.dumps(shapes), str(threads)]

    def one(cores: list[int] | None) -> dict[str, float]:
        return dict(json.loads(jobs.run([*jobs.bound_to(cores), *program]).splitlines()[-1]))

    found = _side_by_side(one, threads, beside, bound)
    return {name: statistics.mean(times[name] for times in found) for name in names}


def _side_by_side(one: Callable[[list[int] | None], Any], threads: int, beside: int, bound: bool) -> list[Any]:
    """Call `one` `beside` times in parallel, each time with its own cores if `bound`."""
    usable = jobs.usable_cores()
    places = [usable[i * threads : (i + 1) * threads] if bound else None for i in range(beside)]
    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, places))
