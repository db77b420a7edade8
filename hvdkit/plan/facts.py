"""What is measured of the user's model: seconds by batch, bytes of all kinds, and what compression costs to compute."""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from hvdkit.bench import jobs
from hvdkit.plan.cost import Compute


def measure(
    flags: Sequence[str], local_batch: int, threads: int, beside: int, seconds: float
) -> tuple[Compute, dict[str, Any]]:
    """Trains the model for some seconds at half, one and two times its batch, in processes that exchange nothing.

    Ranks of one host share its memory's bandwidth and its caches, so as many processes train side by side.

    Args:
        flags: of hvdkit.train, without a batch.
        local_batch: samples a step of a rank.
        threads: that each rank has.
        beside: ranks that run at the same time on one machine, each on cores of its own.
        seconds: of each measurement.
    """
    batches = sorted({max(1, local_batch // 2), local_batch, 2 * local_batch})
    usable = jobs.usable_cores()
    places = [usable[i * threads : (i + 1) * threads] for i in range(max(1, min(beside, len(usable) // threads)))]
    runs = {}
    for batch in batches:
        own = [*flags, f"--global_batch={batch}", "--strategy=single", f"--threads={threads}"]
        with ThreadPoolExecutor(len(places)) as pool:
            all_ = list(pool.map(lambda cores, own=own: jobs.train(["-np", "1"], own, seconds, cores=cores), places))
        together = [rate for run in all_ for rate in run["samples_per_second"]]
        runs[batch] = {**all_[0], "samples_per_second": together}
    return from_runs(runs, threads), {"shapes": runs[local_batch]["facts"]["shapes"]}


def from_runs(runs: dict[int, dict[str, Any]], threads: int) -> Compute:
    """Fits the line through what was measured, by batch."""
    steps = {batch: [batch / rate for rate in run["samples_per_second"]] for batch, run in runs.items()}
    batches = np.array(sorted(steps), float)
    middle = np.array([statistics.median(steps[int(b)]) for b in batches])
    slope, start = (0.0, float(middle[0]))
    if len(batches) > 1:
        slope, start = np.polyfit(batches, middle, 1, w=1 / middle)
    if start < 0 or slope < 0:  # noise: then the line goes through the origin, or is level
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
        gradient_bytes=facts["gradient_bytes"],
        state_bytes=facts["state_bytes"],
        activation_bytes=activations,
        base_bytes=max(0.0, max(least["peak_bytes"]) - known - activations * batches[0]),
    )


def compression_seconds(spec: str, shapes: Sequence[Sequence[int]], threads: int, tries: int = 10) -> float:
    """Seconds that a compressor computes for gradients of these shapes, in this process, without any exchange."""
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit import world
    from hvdkit.compression import ErrorFeedback, by_name

    compressor = by_name(spec)
    if not isinstance(compressor, ErrorFeedback):
        return 0.0
    if not world.is_initialized():
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        hvd.init()
    everyone = world.horovod().global_process_set
    gradients = [tf.random.normal(shape) for shape in shapes]
    payload = tf.zeros([3])

    @tf.function
    def once() -> tf.Tensor:
        averages, _ = compressor.reduce(gradients, payload, f"plan.{spec}", everyone)
        return tf.add_n([tf.reduce_sum(a) for a in averages])

    once()
    seconds = []
    for _ in range(tries):
        began = time.perf_counter()
        once().numpy()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
