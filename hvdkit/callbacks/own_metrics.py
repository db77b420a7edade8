"""Metrics of the user's own whose result over ranks is not that of one process: they are named in a warning.

Results over ranks are computed from the sums of the metrics' states (see `metric_average`). That is exact for Keras'
own metrics, but not for a metric that

- returns one number for a batch, such as a Dice coefficient: a rank's batch is a part of that of one process;
- sets its variables to something else than a sum, such as a maximum;
- keeps its state in Python, where no rank sees that of another.
"""

import ast
import functools
import inspect
import logging
import textwrap
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from hvdkit import world
from hvdkit.compat.keras3 import function_of_metric

_log = logging.getLogger(__name__)

_LIBRARIES = {"keras", "keras_hub", "keras_rs", "hvdkit"}
_looked_at: weakref.WeakSet[Any] = weakref.WeakSet()  # metrics of functions
_warned: weakref.WeakSet[Any] = weakref.WeakSet()


def look_at_results(update_state: Callable) -> Callable:
    """Returns `MeanMetricWrapper.update_state`, which the first time looks at what the metric's function returns."""

    @functools.wraps(update_state)
    def update(self: Any, y_true: Any, y_pred: Any, *args: Any, **kwargs: Any) -> Any:
        if world.size() > 1 and self not in _looked_at:
            _looked_at.add(self)
            function, options = function_of_metric(self)
            if not _is_of_library(function) and not len(keras.ops.shape(function(y_true, y_pred, **options))):
                _warn(
                    self,
                    "returns one number for a batch. In fit, a rank's batch is a part of that of one process, whose "
                    "result is another. Return a value for each example, or measure by hvd.evaluate(model, ...), which "
                    "has the batches of one process.",
                )
        return update_state(self, y_true, y_pred, *args, **kwargs)

    return update


def without_variables(metrics: Iterable[Any]) -> list[Any]:
    """Returns the metrics that keep no state in variables."""
    return [metric for metric in _leaves(metrics) if not metric.variables and not _is_of_library(type(metric))]


def result_of(metric: Any) -> float:
    """Returns what a metric without variables shows on this rank."""
    return float(np.mean(np.nan_to_num(keras.ops.convert_to_numpy(metric.result()))))


def warn_if_differs(metric: Any, mine: float, total: float, ranks: int) -> None:
    """Warns of a metric without variables whose results add up to a total that is not `ranks` times this rank's."""
    if not np.isclose(ranks * mine, total, rtol=1e-6, atol=1e-12):
        _warn(
            metric,
            "keeps its state in Python, so that each rank shows the result of its own data alone. Keep it in variables "
            "(add_variable), which are added up over the ranks.",
        )


def warn_of_assignments(metrics: Iterable[Any]) -> None:
    """Warns of metrics whose `update_state` sets a variable to something else than a sum with what it was."""
    for metric in _leaves(metrics):
        update = type(metric).update_state
        names = () if _is_of_library(update) else assigned(update)
        if wrong := [name for name in names if getattr(getattr(metric, name, None), "aggregation", "") == "sum"]:
            _warn(
                metric,
                f"sets {' and '.join(wrong)} to something else than a sum with what it was, and the ranks' states are "
                f"added up. Use assign_add, or add_variable(..., aggregation='mean') or 'only_first_replica', or "
                f"evaluate on one rank.",
            )


def _warn(metric: Any, what: str) -> None:
    if world.rank() == 0 and metric not in _warned:
        _warned.add(metric)
        _log.warning("Metric %r is not that of one process over %d ranks: it %s", metric.name, world.size(), what)


def _leaves(metrics: Iterable[Any]) -> Iterator[Any]:
    for metric in metrics:
        parts = getattr(metric, "metrics", None)  # of all that `compile` was given
        yield from parts or [metric]


def _is_of_library(thing: Any) -> bool:
    module = getattr(thing, "__module__", None) or type(thing).__module__
    return str(module).partition(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=1024)
def assigned(update: Callable) -> tuple[str, ...]:
    """Returns the attributes that a method assigns something to that is no sum with themselves."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(update)))
    except (OSError, TypeError, SyntaxError):
        return ()
    values = {
        target.id: node.value for node in ast.walk(tree) if isinstance(node, ast.Assign) for target in _names(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "assign":
            variable, value = node.func.value, node.args[0] if node.args else None
            value = values.get(value.id) if isinstance(value, ast.Name) else value
            if isinstance(variable, ast.Attribute) and value is not None and not _adds_to(variable, value):
                found.append(variable.attr)
    return tuple(dict.fromkeys(found))


def _names(assignment: ast.Assign) -> list[ast.Name]:
    return [target for target in assignment.targets if isinstance(target, ast.Name)]


def _adds_to(variable: ast.Attribute, value: ast.expr) -> bool:
    """Returns whether an expression is a sum, or difference, of which the variable itself is a part."""
    if ast.unparse(value) == ast.unparse(variable):
        return True
    if isinstance(value, ast.BinOp) and isinstance(value.op, (ast.Add, ast.Sub)):
        return _adds_to(variable, value.left) or _adds_to(variable, value.right)
    if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] in ("add", "cast"):
        return any(_adds_to(variable, argument) for argument in value.args)
    return False
