"""HVD40: callbacks that a distributed `fit` needs, and their order."""

import ast
from collections.abc import Iterator

from hvdkit.lint.finding import Problem
from hvdkit.lint.ranks import depends_on_rank, on_root_only
from hvdkit.lint.script import Script, is_constant
from hvdkit.lint.training import callbacks, fits, last_part

# Any of these gives all ranks the same weights.
_BROADCASTS = {
    "BroadcastGlobalVariablesCallback", "BroadcastGlobalVariablesHook", "standard", "broadcast_variables",
    "broadcast_global_variables", "broadcast_object", "load_model", "load_weights", "KerasState",
    "TensorFlowKerasState", "restore", "create",
}  # fmt: skip
_SEEDS = ("keras.utils.set_random_seed", "tf.random.set_seed")
_DECIDERS = ("EarlyStopping", "ReduceLROnPlateau", "ModelCheckpoint")
_AVERAGES = ("MetricAverageCallback", "standard")


def nothing_broadcast(script: Script) -> Iterator[Problem]:
    """Ranks start from weights of their own.

    Keras initialises the weights at random, differently on each rank; averaged gradients do not make them equal.
    Wrong:

        model.fit(dataset, epochs=5)

    Right, either of:

        model.fit(dataset, epochs=5, callbacks=hvd.callbacks.standard())
        model.fit(dataset, epochs=5, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])

    Silent where the script broadcasts or loads weights anywhere, where all ranks set the same seed, and where callbacks
    come from another file.
    """
    if "hvd" not in script.libraries or _broadcasts(script):
        return
    for fit in fits(script):
        if not on_root_only(script, fit) and callbacks(script, fit).complete:
            yield Problem(
                fit,
                "fit() starts from weights of this rank's own, since nothing broadcasts those of rank 0.",
                "callbacks=hvd.callbacks.standard(), or hvd.callbacks.BroadcastGlobalVariablesCallback(0) in the list.",
            )
            return


def decides_alone(script: Script) -> Iterator[Problem]:
    """A callback decides by the metrics of its own rank.

    Each rank has metrics of its own, over its share of the data. hvdkit sees to it that all ranks stop together once
    one asks to, but which one does, and when, then depends on one share; and ReduceLROnPlateau gives each rank another
    learning rate, so that their weights part. Wrong:

        callbacks=[keras.callbacks.EarlyStopping(), hvd.callbacks.MetricAverageCallback()]

    Right, since callbacks act in their order:

        callbacks=[*hvd.callbacks.standard(), keras.callbacks.EarlyStopping()]

    Silent where what comes before it in the list is not known from this file.
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
                f"{last_part(script.called(item))} stands {where} MetricAverageCallback in the list, so on each rank "
                f"it decides by the metrics of that rank's share of the data.",
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
