"""Selects the GPU of this rank, and limits its threads to its share of the CPU cores."""

import logging
import os
from typing import Any

from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)


def usable_cores() -> int:
    """Returns the number of CPU cores in this process's affinity mask, which containers and `taskset` restrict."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_available(ext_base_name: str = "tensorflow", verbose: bool = False) -> bool:
    """Returns whether TensorFlow sees a GPU.

    Args:
        ext_base_name: ignored, accepted for compatibility with Horovod, which serves several frameworks.
        verbose: likewise.
    """
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def take_devices(local_rank: int, local_size: int, host: str) -> None:
    """Makes this rank's GPU the only visible one; without GPUs, limits TensorFlow to this rank's share of the cores.

    Raises:
        UsageError: the host has GPUs, but fewer than ranks.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    try:
        if gpus:
            _pin_gpu(tf, gpus, local_rank, local_size, host)
        else:
            # The launcher may have bound this rank to its cores: then no other rank uses them.
            share_cores(tf, 1 if os.environ.get("HVDKIT_OWN_CORES") == "1" else local_size)
    except RuntimeError:  # TensorFlow has already started: its devices and threads can no longer be changed
        _log.warning(
            "hvdkit.init() was called after TensorFlow had started, so this rank keeps TensorFlow's default devices "
            "and threads; call hvdkit.init() before the first tensor or model."
        )


def _pin_gpu(tf: Any, gpus: list[Any], local_rank: int, local_size: int, host: str) -> None:
    # A launcher may already hide the GPUs of the other ranks (CUDA_VISIBLE_DEVICES, Slurm's --gpus-per-task).
    number = 0 if len(gpus) == 1 and local_size > 1 and _one_gpu_each() else local_rank
    if number >= len(gpus):
        raise UsageError(
            f"{local_size} ranks were started on host {host}, which has {len(gpus)} visible GPU(s): each rank "
            f"needs its own. Start at most {len(gpus)} ranks on this host (for example -H {host}:"
            f"{len(gpus)}), or hide the GPUs with CUDA_VISIBLE_DEVICES='' to train on the CPU."
        )
    tf.config.set_visible_devices(gpus[number], "GPU")
    for gpu in gpus:  # on all GPUs: scripts that set it again, as Horovod's examples do, then change nothing
        tf.config.experimental.set_memory_growth(gpu, True)


def _one_gpu_each() -> bool:
    return len([g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]) == 1


def share_cores(tf: Any, processes: int) -> None:
    """Limits TensorFlow's threads to one of `processes` equal shares of the usable cores, unless the user set them."""
    threads = max(1, usable_cores() // processes)
    if "TF_NUM_INTRAOP_THREADS" not in os.environ:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
    if "TF_NUM_INTEROP_THREADS" not in os.environ:
        # At least two: a collective that waits for other ranks must not block the input pipeline.
        tf.config.threading.set_inter_op_parallelism_threads(max(2, threads))
