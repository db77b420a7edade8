"""HVD2: the optimizer, which must average gradients, and whose learning rate must fit the global batch."""

import ast
from collections.abc import Iterator

from hvdkit.lint.finding import Problem
from hvdkit.lint.ranks import depends_on_size, on_root_only
from hvdkit.lint.script import Script, is_constant
from hvdkit.lint.training import WRAPPERS, compiles, fits, hides_arguments, is_optimizer, is_wrapped


def not_distributed(script: Script) -> Iterator[Problem]:
    """The optimizer of compile() does not average gradients.

    Without hvd.DistributedOptimizer each rank trains its own model, without an error. Wrong:

        model.compile("adam", loss=loss)

    Right:

        model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(hvd.scaled(1e-3))), loss=loss)

    Not reported if the optimizer comes from another file, if a DistributedGradientTape averages the gradients, or if
    the model is compiled on one rank only or is only evaluated.
    """
    if "hvd" not in script.libraries or not fits(script) or _averages_otherwise(script):
        return
    for call in compiles(script):
        optimizer = script.argument(call, "optimizer", 0)
        if optimizer is None and hides_arguments(call):
            continue
        if is_wrapped(script, optimizer) is not False or on_root_only(script, call) or _evaluated_only(script, call):
            continue
        shown = ast.unparse(optimizer) if optimizer else "Keras' default, rmsprop,"
        inner = shown
        if optimizer is None or isinstance(optimizer, ast.Constant):
            inner = f"keras.optimizers.get({optimizer.value if optimizer else 'rmsprop'!r})"
        yield Problem(
            optimizer or call,
            f"compile() gets the optimizer {_short(shown)} unwrapped, so gradients are not averaged and each rank "
            f"trains its own model.",
            f"hvd.DistributedOptimizer({_short(inner)}).",
        )


def learning_rate_not_scaled(script: Script) -> Iterator[Problem]:
    """The learning rate of the distributed optimizer is that of one process.

    With the same local batch, N ranks have a global batch that is N times as large, and an epoch has N times fewer
    steps. With the learning rate of one process, the model learns less in each epoch. Wrong:

        hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))

    Right, together with a warm-up (hvd.callbacks.standard(warmup_epochs=5)):

        hvd.DistributedOptimizer(keras.optimizers.SGD(hvd.scaled(0.1)))

    Not reported if the rate is not a literal, if `hvd.size()` divides the batch size (the global batch then stays the
    same), with op=hvd.Sum or hvd.Adasum, or if the rate is set later. Linear scaling is a rule of thumb
    (https://arxiv.org/abs/1706.02677). If you chose the rate for the global batch, write `# noqa: HVD202`.
    """
    if _batch_is_divided(script) or _rate_is_set_later(script):
        return
    for wrapper in script.calls_of(*WRAPPERS):
        operation = script.argument(wrapper, "op")
        if operation is not None and script.name(operation) != "hvd.Average":
            continue
        optimizer = script.argument(wrapper, "optimizer", 0)
        for value in script.values(optimizer) if optimizer else []:
            if isinstance(value, ast.Call) and is_optimizer(script, value) and not _is_scaled(script, value):
                yield _unscaled(script, value)


def _unscaled(script: Script, optimizer: ast.Call) -> Problem:
    rate = _rate(script, optimizer)
    shown = ast.unparse(rate) if rate else "Keras' default"
    schedule = any(isinstance(value, ast.Call) for value in (script.values(rate) if rate else []))
    fix = f"hvd.scaled({shown}) as the learning rate"
    if rate is None or schedule:
        fix = f"hvd.scaled(...) of the rate{' inside the schedule' if schedule else ' of one process'}"
    return Problem(
        rate or optimizer,
        f"The learning rate ({_short(shown)}) is for one process, but the global batch grows with the number of ranks.",
        f"{fix}, or `# noqa: HVD202` if you chose it for the global batch.",
    )


def clipped_too_early(script: Script) -> Iterator[Problem]:
    """Gradients are clipped on each rank, before the optimizer averages them.

    One process clips the gradient of the whole batch. The mean of gradients that each rank has clipped is another one.
    Wrong:

        optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(hvd.scaled(1e-3)))
        gradients, norm = tf.clip_by_global_norm(tape.gradient(loss, weights), 1.0)
        optimizer.apply_gradients(zip(gradients, weights))

    Right, since the optimizer clips what it has averaged:

        optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(hvd.scaled(1e-3), global_clipnorm=1.0))
        gradients = tape.gradient(loss, weights)
        optimizer.apply_gradients(zip(gradients, weights))

    Not reported if a DistributedGradientTape averages the gradients, or if what is clipped comes from another file.
    """
    if not script.calls_of(*WRAPPERS) or _averages_otherwise(script):
        return
    for call in script.calls_of("tf.clip_by_global_norm", "tf.clip_by_norm"):
        clipped = script.argument(call, "t_list", 0) or script.argument(call, "t", 0)
        made_from = script.derivation(clipped).calls() if clipped else []
        if any(isinstance(made.func, ast.Attribute) and made.func.attr == "gradient" for made in made_from):
            option = "clipnorm" if script.called(call).endswith("clip_by_norm") else "global_clipnorm"
            yield Problem(
                call,
                f"{ast.unparse(call.func)} clips this rank's gradients, and the optimizer averages what is left: "
                f"another gradient than one process has.",
                f"leave the clipping to the optimizer: hvd.DistributedOptimizer(keras.optimizers.Adam({option}=...)).",
            )


def _rate(script: Script, optimizer: ast.Call) -> ast.expr | None:
    return script.argument(optimizer, "learning_rate", 0) or script.argument(optimizer, "lr")


def _is_scaled(script: Script, optimizer: ast.Call) -> bool:
    """Whether the rate depends on the number of ranks, or this file does not show it."""
    if script.called(optimizer) == "keras.optimizers.get":
        return True
    rate = _rate(script, optimizer)
    if rate is None:
        return hides_arguments(optimizer)
    if is_constant(rate, 0) or depends_on_size(script, rate):
        return True
    made_from = script.derivation(rate)
    foreign = [call for call in made_from.calls() if not script.called(call).startswith("keras.optimizers.schedules.")]
    objects = [node for node in made_from.nodes if isinstance(node, ast.Attribute) and not script.name(node)]
    return made_from.unknown or bool(foreign or objects)


def _averages_otherwise(script: Script) -> bool:
    tapes = ("hvd.DistributedGradientTape", "hvd.PartialDistributedGradientTape")
    return bool(script.calls_of(*tapes, "hvd.strategies.create"))


def _evaluated_only(script: Script, call: ast.Call) -> bool:
    """Whether the function that compiles the model only evaluates it or predicts with it."""
    scope, model = script.scope(call), ast.unparse(call.func.value)  # type: ignore[attr-defined]
    used = {
        other.func.attr
        for other in script.calls
        if isinstance(other.func, ast.Attribute)
        and ast.unparse(other.func.value) == model
        and script.scope(other) is scope
    }
    return bool(used & {"evaluate", "predict"}) and not used & {"fit", "fit_generator", "train_on_batch"}


def _batch_is_divided(script: Script) -> bool:
    batches = [script.argument(call, "batch_size") for call in script.calls]
    batches += [
        script.argument(call, "batch_size", 0)
        for call in script.calls
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("batch", "padded_batch")
    ]
    return any(depends_on_size(script, batch) for batch in batches if batch)


def _rate_is_set_later(script: Script) -> bool:
    return any(
        isinstance(node, ast.Attribute)
        and node.attr in ("learning_rate", "lr")
        and (isinstance(node.ctx, ast.Store) or _is_assigned_to(script, node))
        for node in script.nodes
    )


def _is_assigned_to(script: Script, node: ast.AST) -> bool:
    """Whether it is `optimizer.learning_rate.assign(...)` or `set_value(optimizer.lr, ...)`."""
    parent = next(script.ancestors(node))[0]
    if isinstance(parent, ast.Attribute):
        return parent.attr == "assign"
    return isinstance(parent, ast.Call) and ast.unparse(parent.func).endswith("set_value")


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
