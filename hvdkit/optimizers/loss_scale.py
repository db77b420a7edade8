"""Dynamic loss scaling on many ranks: either all ranks skip a step, or none.

`LossScaleOptimizer` skips a step in which gradients overflow float16, and halves the scale. If one rank skipped alone,
its replica would diverge, and the other ranks would hang in the allreduce.
"""

import keras
import tensorflow as tf

from hvdkit.compat import call_stack
from hvdkit.optimizers.gradients import Gradient, GradientExchange, any_rank

_MARK = "_hvdkit_judges_together"


def with_loss_scale(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Wraps an optimizer in a `LossScaleOptimizer` if the global dtype policy is `mixed_float16`."""
    half = keras.config.dtype_policy().name == "mixed_float16"
    if half and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def judge_overflow_together(outer: keras.optimizers.LossScaleOptimizer, exchange: GradientExchange) -> None:
    """Makes a `LossScaleOptimizer` around a gradient reduction skip a step if any rank's gradients overflow.

    This costs one more allreduce per step, of a few numbers. Without it, only some ranks would take the "gradients are
    finite" branch, which contains the gradient reduction, and would hang.
    """
    if hasattr(outer, _MARK):
        return
    check_finite = outer.check_finite

    def check_finite_on_all_ranks(grads: list[Gradient]) -> tf.Tensor:
        finite = check_finite(grads)
        if exchange.is_alone():
            return finite
        return ~any_rank(~finite, "overflow", exchange.process_set)

    outer.check_finite = check_finite_on_all_ranks
    setattr(outer, _MARK, True)


def refuse_a_branch_of_this_rank(wrapped: keras.optimizers.Optimizer, exchange: GradientExchange) -> None:
    """Prevents a hang: raises if a `LossScaleOptimizer` decides for this rank alone whether gradients are reduced.

    Args:
        wrapped: the optimizer inside the `DistributedOptimizer`.
        exchange: its gradient reduction.

    Raises:
        RuntimeError: such a `LossScaleOptimizer` is around it, and did not build it.
    """
    outer = call_stack.loss_scale_in_branch()
    if outer is not None and outer is not wrapped and not hasattr(outer, _MARK):
        raise RuntimeError(
            "A DistributedOptimizer that was built by itself is inside a LossScaleOptimizer, where ranks would wait "
            "for each other for ever when the gradients of one overflow. Put it outside: "
            "hvdkit.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer))."
        )
