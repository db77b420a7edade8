"""The GPU or the CPU cores of a host that are this rank's own."""

import logging
import os
from typing import Any

from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)


def usable_cores() -> int:
    """CPU cores that this process may run on (its affinity mask, which containers and `taskset` narrow)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def take_devices(local_rank: int, local_size: int, host: str) -> None:
    """Makes this rank's GPU the only visible one, or gives TensorFlow this rank's share of the cores.

    Raises:
        UsageError: the host has GPUs, but fewer than ranks.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    try:
        if gpus:
            _pin_gpu(tf, gpus, local_rank, local_size, host)
        else:
            # A rank that the launcher bound to cores of its own sees those alone.
            share_cores(tf, 1 if os.environ.get("HVDKIT_OWN_CORES") == "1" else local_size)
    except RuntimeError:  # TensorFlow has already started: its devices and threads can no longer be changed
        _log.warning(
            "hvdkit.init() was called after TensorFlow had started, so this rank keeps TensorFlow's default devices "
            "and threads; call hvdkit.init() before the first tensor or model is made."
        )


def _pin_gpu(tf: Any, gpus: list[Any], local_rank: int, local_size: int, host: str) -> None:
    # A launcher that already hides the other ranks' GPUs (CUDA_VISIBLE_DEVICES, Slurm's --gpus-per-task) leaves one.
    number = 0 if len(gpus) == 1 and local_size > 1 and _one_gpu_each() else local_rank
    if number >= len(gpus):
        raise UsageError(
            f"{local_size} ranks were started on host {host}, which shows {len(gpus)} GPU(s): each rank "
            f"needs one of its own. Start at most {len(gpus)} ranks on this host (for example -H {host}:"
            f"{len(gpus)}), or hide the GPUs with CUDA_VISIBLE_DEVICES='' to train on the CPU."
        )
    tf.config.set_visible_devices(gpus[number], "GPU")
    for gpu in gpus:  # all, so that a script that says so of each, as Horovod's examples do, changes nothing
        tf.config.experimental.set_memory_growth(gpu, True)


def _one_gpu_each() -> bool:
    return len([g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]) == 1


def share_cores(tf: Any, processes: int) -> None:
    """Gives TensorFlow one of `processes` equal shares of the usable cores, unless the user set threads himself."""
    threads = max(1, usable_cores() // processes)
    if "TF_NUM_INTRAOP_THREADS" not in os.environ:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
    if "TF_NUM_INTEROP_THREADS" not in os.environ:
        # Two at least: an exchange that waits for other ranks must not hold up the input pipeline.
        tf.config.threading.set_inter_op_parallelism_threads(max(2, threads))
