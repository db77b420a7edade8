"""HVD403 and HVD404: files and progress bars, which one rank should write."""

import ast
from collections.abc import Iterator

from hvdkit.lint.finding import Problem
from hvdkit.lint.ranks import depends_on_rank, on_root_only
from hvdkit.lint.script import Script, end, start
from hvdkit.lint.training import callbacks, fits, hides_arguments, is_model, last_part

_WRITERS = {"ModelCheckpoint": "filepath", "CSVLogger": "filename", "TensorBoard": "log_dir"}
_SAVES = ("save", "save_weights", "export")
_QUIET = ("standard", "RootOutputCallback")


def written_by_all(script: Script) -> Iterator[Problem]:
    """All ranks write the same file.

    Ranks that write one file at the same time corrupt it, or mix the lines of their logs. Wrong:

        callbacks.append(keras.callbacks.ModelCheckpoint("best.keras"))
        model.save("model.keras")

    Right:

        if hvd.rank() == 0:
            callbacks.append(keras.callbacks.ModelCheckpoint("best.keras"))
        if hvd.rank() == 0:
            model.save("model.keras")

    Not reported if the path depends on the rank, or if only rank 0 uses the callback that all ranks create.
    """
    if "hvd" not in script.libraries:
        return
    for call in script.calls:
        writer = last_part(script.called(call))
        if script.called(call) == f"keras.callbacks.{writer}" and writer in _WRITERS:
            path = script.argument(call, _WRITERS[writer], 0)
            shown = f"keras.callbacks.{writer}"
            fix = f"[{writer}(...)] if hvd.rank() == 0 else [], or append it under `if hvd.rank() == 0:`."
        elif isinstance(call.func, ast.Attribute) and call.func.attr in _SAVES and _saves(script, call.func):
            path = script.argument(call, "filepath", 0)
            shown = f"{ast.unparse(call.func)}()"
            fix = f"if hvd.rank() == 0: {ast.unparse(call.func)}(...)"
        else:
            continue
        if not _by_one(script, call) and not (path and depends_on_rank(script, path)):
            yield Problem(call, f"{shown} writes the same file on every rank.", fix)


def shown_by_all(script: Script) -> Iterator[Problem]:
    """Every rank shows a progress bar.

    The bars of all ranks mix on one screen, or fill the log. Wrong:

        model.fit(dataset, epochs=5)

    Right, either of:

        model.fit(dataset, epochs=5, verbose=1 if hvd.rank() == 0 else 0)
        model.fit(dataset, epochs=5, callbacks=hvd.callbacks.standard())

    Not reported if `verbose` is not a literal, or if callbacks come from another file.
    """
    if "hvd" not in script.libraries:
        return
    for fit in fits(script):
        verbose = script.argument(fit, "verbose", 4)
        if verbose is None and hides_arguments(fit):
            continue
        values = script.values(verbose) if verbose else [ast.Constant("auto")]
        if not all(isinstance(v, ast.Constant) and v.value in (1, 2, "auto") for v in values):
            continue
        if depends_on_rank(script, verbose) if verbose else False:
            continue
        given = callbacks(script, fit)
        if not given.complete or given.named(script, *_QUIET) or on_root_only(script, fit):
            continue
        shown = f"verbose={ast.unparse(verbose)}" if verbose else "no verbose, which defaults to 1,"
        yield Problem(
            verbose or fit,
            f"fit() gets {shown} on every rank, so the progress bars of all ranks mix.",
            "verbose=1 if hvd.rank() == 0 else 0, or hvd.callbacks.standard() in the callbacks.",
        )


def _saves(script: Script, method: ast.Attribute) -> bool:
    if ast.unparse(method.value).startswith("self.model"):  # in a callback or class that perhaps only rank 0 uses
        return False
    checkpoints = ("tf.train.Checkpoint", "tf.train.CheckpointManager")
    made = any(script.called(value) in checkpoints for value in script.values(method.value) if value)
    return made or is_model(script, method.value)


def _by_one(script: Script, call: ast.Call) -> bool:
    """Whether only one rank reaches the call, or only one rank uses its result."""
    if on_root_only(script, call):
        return True
    statement = script.statement(call)
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return False
    target = statement.targets[0]
    if not isinstance(target, ast.Name):
        return False
    uses = [
        node
        for node in script.nodes
        if isinstance(node, ast.Name)
        and node.id == target.id
        and isinstance(node.ctx, ast.Load)
        and start(node) > end(statement)
        and script.scope(node) is script.scope(statement)
    ]
    return bool(uses) and all(on_root_only(script, use) for use in uses)
