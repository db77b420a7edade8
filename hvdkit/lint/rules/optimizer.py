"""HVD2: the optimizer, which must exchange gradients, and whose learning rate belongs to the global batch."""

import ast
from collections.abc import Iterator

from hvdkit.lint.finding import Problem
from hvdkit.lint.ranks import depends_on_size, on_root_only
from hvdkit.lint.script import Script, is_constant
from hvdkit.lint.training import WRAPPERS, compiles, fits, hides_arguments, is_optimizer, is_wrapped


def not_distributed(script: Script) -> Iterator[Problem]:
    """An optimizer that exchanges nothing is given to compile().

    Without hvd.DistributedOptimizer each rank trains a model of its own, and no error says so. Wrong:

        model.compile("adam", loss=loss)

    Right:

        model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(hvd.scaled(1e-3))), loss=loss)

    Silent where the optimizer comes from another file, where a DistributedGradientTape exchanges the gradients, and for
    a model that is compiled on one rank, or to be evaluated only.
    """
    if "hvd" not in script.libraries or not fits(script) or _exchanges_otherwise(script):
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
            f"compile() is given the optimizer {_short(shown)} as it is, so gradients are not averaged and each rank "
            f"trains a model of its own.",
            f"hvd.DistributedOptimizer({_short(inner)}).",
        )


def learning_rate_not_scaled(script: Script) -> Iterator[Problem]:
    """The learning rate of the distributed optimizer is one for a single process.

    N ranks with the same local batch take steps on a global batch that is N times as large, and an epoch has N times
    fewer steps: with the learning rate of one process the model learns less in each epoch. Wrong:

        hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))

    Right, together with a warm-up (hvd.callbacks.standard(warmup_epochs=5)):

        hvd.DistributedOptimizer(keras.optimizers.SGD(hvd.scaled(0.1)))

    Silent where the rate is no literal, where `hvd.size()` divides the batch size (the global batch is then the old
    one), with op=hvd.Sum or hvd.Adasum, and where the rate is set later. The linear scaling rule is one of thumb
    (https://arxiv.org/abs/1706.02677): `# noqa: HVD202` says that you chose the rate for the global batch.
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
    mend = f"hvd.scaled({shown}) as the learning rate"
    if rate is None or schedule:
        mend = f"hvd.scaled(...) of the rate{' inside the schedule' if schedule else ' of one process'}"
    return Problem(
        rate or optimizer,
        f"The learning rate ({_short(shown)}) is that of a single process, though the global batch grows with the "
        f"number of ranks.",
        f"{mend}, or `# noqa: HVD202` if it was chosen for the global batch.",
    )


def _rate(script: Script, optimizer: ast.Call) -> ast.expr | None:
    return script.argument(optimizer, "learning_rate", 0) or script.argument(optimizer, "lr")


def _is_scaled(script: Script, optimizer: ast.Call) -> bool:
    """Whether the rate depends on the number of ranks, or is not known from this file."""
    rate = _rate(script, optimizer)
    if rate is None:
        return hides_arguments(optimizer) or script.called(optimizer) == "keras.optimizers.get"
    if is_constant(rate, 0) or depends_on_size(script, rate):
        return True
    made_from = script.derivation(rate)
    foreign = [call for call in made_from.calls() if not script.called(call).startswith("keras.optimizers.schedules.")]
    objects = [node for node in made_from.nodes if isinstance(node, ast.Attribute) and not script.name(node)]
    return made_from.unknown or bool(foreign or objects)


def _exchanges_otherwise(script: Script) -> bool:
    tapes = ("hvd.DistributedGradientTape", "hvd.PartialDistributedGradientTape")
    return bool(script.calls_of(*tapes, "hvd.strategies.create"))


def _evaluated_only(script: Script, call: ast.Call) -> bool:
    """Whether the model is evaluated or asked, but not fitted, in the function that compiles it."""
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
    """`optimizer.learning_rate.assign(...)`, or `set_value(optimizer.lr, ...)`."""
    parent = next(script.ancestors(node))[0]
    if isinstance(parent, ast.Attribute):
        return parent.attr == "assign"
    return isinstance(parent, ast.Call) and ast.unparse(parent.func).endswith("set_value")


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
