"""Starts and ends this process's part in the job: `init` and `shutdown`."""

from typing import Any

from hvdkit import watchdog, world
from hvdkit.collectives import transports, wire
from hvdkit.collectives.mesh import Mesh
from hvdkit.compat import keras2
from hvdkit.model import batch_normalization, fit
from hvdkit.world import standard_input
from hvdkit.world.ranks import World


def init(*args: Any, mesh: Mesh | None = None, **kwargs: Any) -> World:
    """Starts Horovod, assigns this rank its part of the host's resources, and installs the guards.

    Call it before TensorFlow creates its first tensor: this fixes devices and threads (see `hvdkit.world.init`). With
    several ranks it also installs

    - a watchdog, which reports a job that hangs and ends it (see `hvdkit.watchdog`);
    - a guarded `keras.Model.fit` (see `hvdkit.model.fit`);
    - `BatchNormalization(synchronized=True)` over all ranks (see `hvdkit.model.batch_normalization`).

    Args:
        *args: passed to `horovod.tensorflow.init` (process sets, for example).
        mesh: the layout of the ranks, for model parallelism (see `hvdkit.parallel`).
        **kwargs: as `args`.

    Returns:
        The `World` of this process. Calling `init` again returns the same world.

    Raises:
        ImportError: Horovod is not installed, or was built for another TensorFlow.
        UsageError: this host has GPUs, but fewer than ranks; its own name does not resolve; or the mesh does not fit
            the number of ranks.
    """
    first = not world.is_initialized()
    keras2.explain_in_keras()
    if mesh is not None and first:
        kwargs["process_sets"] = [*(kwargs.get("process_sets") or []), *mesh.process_sets(world.launched_size())]
    me = world.init(*args, **kwargs)
    if first and me.size > 1:
        try:
            watchdog.start(me)
            transports.start(me)
        except BaseException:
            world.shutdown()  # a second `init` must start everything again
            raise
        standard_input.explain_if_empty()
        fit.install()
        batch_normalization.honour_flag()
    return me


def shutdown() -> None:
    """Leaves the job: no collective may follow. A second `init` starts from scratch."""
    fit.uninstall()
    keras2.leave_keras_alone()
    watchdog.stop()
    transports.stop()
    wire.forget()
    world.shutdown()
