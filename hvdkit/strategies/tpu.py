"""`tpu`: one process, one replica per TPU core, with `tf.distribute.TPUStrategy`. All else is as in `mirrored`."""

import os

import tensorflow as tf

from hvdkit.errors import UsageError
from hvdkit.strategies.mirrored import MirroredStrategy

_LOCAL = "local"  # TensorFlow's name for the TPU of this virtual machine


class TPUStrategy(MirroredStrategy):
    """Data parallelism over the cores of a TPU; see `Strategy` for the attributes.

    The TPU is the one that the environment variable `TPU_NAME` names, or that of this virtual machine. The main job
    keeps the shapes of batches fixed while it trains, which XLA needs for TPUs.

    Args:
        replicas: number of cores. It can only confirm how many the TPU has.
    """

    name = "tpu"

    def _over_devices(self, replicas: int | None) -> tf.distribute.Strategy:
        strategy = tf.distribute.TPUStrategy(_connected(os.environ.get("TPU_NAME") or _LOCAL))
        if replicas not in (None, strategy.num_replicas_in_sync):
            raise UsageError(
                f"--replicas={replicas}, but this TPU has {strategy.num_replicas_in_sync} cores, and all train. Leave "
                f"--replicas out."
            )
        return strategy


def _connected(name: str) -> tf.distribute.cluster_resolver.TPUClusterResolver:
    """Connects to a TPU and initializes it.

    Raises:
        UsageError: there is no such TPU, or this TensorFlow is not built for TPUs.
    """
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        if name != _LOCAL:
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (tf.errors.OpError, OSError, ValueError, RuntimeError) as error:
        asked = "this machine has none" if name == _LOCAL else f"TPU_NAME={name} cannot be reached"
        why = str(error).splitlines()[0].split(" Failed in initialization")[0].rstrip(".")
        raise UsageError(
            f"--strategy=tpu needs a TPU, and {asked}, or this TensorFlow is not built for TPUs ({why}). On a TPU "
            f"virtual machine install tensorflow-tpu in place of tensorflow; elsewhere use --strategy=horovod."
        ) from error
    return resolver
