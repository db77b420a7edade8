"""`DistributedGradientTape`: a `tf.GradientTape` whose gradients are averaged over the ranks, for custom loops."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import wrapt

from hvdkit.compat import call_stack
from hvdkit.compression import Compression
from hvdkit.optimizers import weighing
from hvdkit.optimizers.gradients import Gradient, GradientExchange, weights_of


class ExchangingTape(wrapt.ObjectProxy):
    """A tape whose `gradient` reduces over ranks; everything else is forwarded to the user's tape."""

    def __init__(self, tape: tf.GradientTape, exchange: GradientExchange) -> None:
        super().__init__(tape)
        self._self_exchange = exchange

    def __enter__(self) -> "ExchangingTape":
        self.__wrapped__.__enter__()
        return self

    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        use_generic_names: bool = False,
        unconnected_gradients: tf.UnconnectedGradients = tf.UnconnectedGradients.NONE,
    ) -> Any:
        """Returns the gradient of `target` for each of `sources`, reduced over the ranks.

        Args:
            target: as for `tf.GradientTape.gradient`.
            sources: a variable or tensor, or any nest of them; the same on all ranks.
            output_gradients: as for `tf.GradientTape.gradient`.
            use_generic_names: ignored, accepted for compatibility with Horovod: names never depend on variables here.
            unconnected_gradients: as for `tf.GradientTape.gradient`.

        Returns:
            A gradient (`tf.Tensor`, `tf.IndexedSlices` or None) for each source, in the structure of `sources`.
        """
        gradients = self.__wrapped__.gradient(target, sources, output_gradients, unconnected_gradients)
        if not self._self_exchange.is_alone():
            call_stack.refuse_xla()
            weighing.warn_of_unweighed()
        flat_sources = tf.nest.flatten(sources)
        flat = self._self_exchange.complete(tf.nest.flatten(gradients), flat_sources)  # keeps IndexedSlices whole
        reduced = self._self_exchange(flat, flat_sources)
        return tf.nest.pack_sequence_as(gradients, reduced)

    def register_local_source(self, source: Any) -> None:
        """Keeps the gradient of `source` (a variable) on this rank."""
        self._self_exchange.register_local(source)

    def get_local_and_global_gradients(
        self, target: Any, sources: Sequence[Any], output_gradients: Any = None, use_generic_names: bool = False
    ) -> tuple[list[tuple[Any, Gradient]], list[tuple[Any, Gradient]]]:
        """Returns two lists of `(source, gradient)` pairs: the local sources, and those with reduced gradients."""
        gradients = self.gradient(target, list(sources), output_gradients, use_generic_names)
        pairs = list(zip(sources, gradients, strict=True))
        local = [(s, g) for s, g in pairs if self._self_exchange.is_local(s)]
        return local, [(s, g) for s, g in pairs if not self._self_exchange.is_local(s)]


def DistributedGradientTape(  # noqa: N802 - Horovod's name
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: Any = None,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[Any]] | None = None,
    process_set: Any = None,
    scale_local_gradients: bool = True,
) -> ExchangingTape:
    """Wraps a `tf.GradientTape`, before or after it has recorded, so that `gradient` averages over the ranks.

    Use it with a plain optimizer: a `DistributedOptimizer` would reduce the gradients a second time. Where ranks count
    different amounts (masks, weights, batches of different sizes), wrap the loss in `hvdkit.shard_loss`. The arguments
    are those of `hvdkit.DistributedOptimizer`; `op=hvdkit.Adasum` combines the gradients themselves here.

    Raises:
        TypeError: `gradtape` is not a `tf.GradientTape`.
        ValueError: an argument is invalid.

    Reference: `horovod.tensorflow.DistributedGradientTape` 0.28.1.
    """
    if not isinstance(gradtape, tf.GradientTape) or isinstance(gradtape, ExchangingTape):
        raise TypeError(f"DistributedGradientTape needs a tf.GradientTape, but was given {gradtape!r}.")
    exchange = GradientExchange(
        "DistributedGradientTape",
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        op=op,
        process_set=process_set,
        gradient_predivide_factor=gradient_predivide_factor,
        groups=groups if groups is not None else num_groups or None,
        scale_local_gradients=scale_local_gradients,
    )
    return ExchangingTape(gradtape, exchange)


def PartialDistributedGradientTape(  # noqa: N802 - Horovod's name
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: Any = None,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[Any]] | None = None,
    process_set: Any = None,
    local_layers: Any = None,
    scale_local_gradients: bool = True,
) -> ExchangingTape:
    """Returns a `DistributedGradientTape` that keeps the gradients of some layers' weights local to each rank.

    Args:
        local_layers: one or several layers, already built, whose gradients stay on this rank.

    The other arguments are those of `DistributedGradientTape`.

    Raises:
        TypeError: `local_layers` contains something other than layers.
        ValueError: a local layer is not built yet.
    """
    tape = DistributedGradientTape(
        gradtape,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        op,
        gradient_predivide_factor,
        num_groups,
        groups,
        process_set,
        scale_local_gradients,
    )
    for variable in weights_of(local_layers):
        tape.register_local_source(variable)
    return tape
