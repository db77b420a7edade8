"""HVD401 and HVD402: the callbacks that a distributed `fit` needs, and their order."""

import ast
from collections.abc import Iterator

from hvdkit.lint.finding import Problem
from hvdkit.lint.ranks import depends_on_rank, on_root_only
from hvdkit.lint.script import Script, is_constant
from hvdkit.lint.training import callbacks, fits, last_part

# Each of these gives all ranks the same weights.
_BROADCASTS = {
    "BroadcastGlobalVariablesCallback",
    "BroadcastGlobalVariablesHook",
    "KerasState",
    "TensorFlowKerasState",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_variables",
    "create",
    "load_model",
    "load_weights",
    "restore",
    "standard",
}
_SEEDS = ("keras.utils.set_random_seed", "tf.random.set_seed")
_DECIDERS = ("EarlyStopping", "ReduceLROnPlateau", "ModelCheckpoint")
_AVERAGES = ("MetricAverageCallback", "standard")


def nothing_broadcast(script: Script) -> Iterator[Problem]:
    """Each rank starts from different weights.

    Keras initialises the weights at random, differently on each rank. Averaging gradients does not make them equal.
    Wrong:

        model.fit(dataset, epochs=5)

    Right, either of:

        model.fit(dataset, epochs=5, callbacks=hvd.callbacks.standard())
        model.fit(dataset, epochs=5, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])

    Not reported if the script broadcasts or loads weights anywhere, if all ranks set the same seed, or if callbacks
    come from another file.
    """
    if "hvd" not in script.libraries or _broadcasts(script):
        return
    for fit in fits(script):
        if not on_root_only(script, fit) and callbacks(script, fit).complete:
            yield Problem(
                fit,
                "fit() starts from different weights on each rank, since nothing broadcasts those of rank 0.",
                "callbacks=hvd.callbacks.standard(), or hvd.callbacks.BroadcastGlobalVariablesCallback(0) in the list.",
            )
            return


def metrics_not_averaged(script: Script) -> Iterator[Problem]:
    """A callback decides by the metrics of one rank.

    Each rank computes its metrics on its own shard of the data. hvdkit stops all ranks together once one asks to, but
    when that happens then depends on one shard. ReduceLROnPlateau gives each rank a different learning rate, and the
    weights diverge. Wrong:

        callbacks=[keras.callbacks.EarlyStopping(), hvd.callbacks.MetricAverageCallback()]

    Right, since callbacks run in list order:

        callbacks=[*hvd.callbacks.standard(), keras.callbacks.EarlyStopping()]

    Not reported if this file does not show which callbacks come before it in the list.
    """
    if "hvd" not in script.libraries:
        return
    reported = set()
    for fit in fits(script):
        given = callbacks(script, fit)
        averages = given.named(script, *_AVERAGES)
        for i in given.named(script, *_DECIDERS):
            item = given.items[i]
            if any(a < i for a in averages) or not given.complete or item in reported or not _decides(script, item):
                continue
            reported.add(item)
            where = "before" if averages else "without"
            yield Problem(
                item,
                f"{last_part(script.called(item))} is {where} MetricAverageCallback in the list, so each rank decides "
                f"by the metrics of its own shard.",
                "put hvd.callbacks.MetricAverageCallback(), or *hvd.callbacks.standard(), before it in the list.",
            )


def _broadcasts(script: Script) -> bool:
    if any(call.args and not depends_on_rank(script, call.args[0]) for call in script.calls_of(*_SEEDS)):
        return True
    return any(last_part(ast.unparse(call.func)) in _BROADCASTS for call in script.calls)


def _decides(script: Script, item: ast.AST) -> bool:
    if not script.called(item).startswith("keras.callbacks.") or not isinstance(item, ast.Call):
        return False
    if last_part(script.called(item)) != "ModelCheckpoint":
        return True
    return is_constant(script.argument(item, "save_best_only", 3), True)
