"""Where a script trains Keras models: its calls of `compile` and `fit`, and the callbacks of each `fit`."""

import ast
import functools
from typing import NamedTuple

from hvdkit.lint.script import Script, end, is_constant, is_variable, start

_OF_FIT = {"epochs", "steps_per_epoch", "callbacks", "validation_data", "batch_size", "initial_epoch"}
_OF_COMPILE = {"optimizer", "loss", "metrics"}
_MODELS = ("keras.Sequential", "keras.Model", "keras.models.", "keras.applications.", "hvd.load_model")
WRAPPERS = ("hvd.DistributedOptimizer", "hvd.PartialDistributedOptimizer")


class Callbacks(NamedTuple):
    """The callbacks of a `fit`, in order, as expressions; `complete` is false if some may be unknown."""

    items: list[ast.AST]
    complete: bool

    def named(self, script: Script, *names: str) -> list[int]:
        """The positions of the callbacks whose class or function has one of these names, ignoring its module."""
        return [i for i, item in enumerate(self.items) if last_part(script.called(item)) in names]


def last_part(name: str) -> str:
    """The name without its module."""
    return name.rpartition(".")[2]


@functools.lru_cache(maxsize=4)
def fits(script: Script) -> list[ast.Call]:
    """The calls of `fit` on Keras models. Other libraries also have a `fit`, but without epochs and callbacks."""
    compiled = {ast.unparse(call.func.value) for call in compiles(script)}  # type: ignore[attr-defined]
    return [
        call
        for call in _methods(script, "fit", "fit_generator")
        if any(k.arg in _OF_FIT for k in call.keywords) or ast.unparse(call.func.value) in compiled  # type: ignore[attr-defined]
    ]


@functools.lru_cache(maxsize=4)
def compiles(script: Script) -> list[ast.Call]:
    """The calls of `compile` on Keras models."""
    return [
        call for call in _methods(script, "compile") if any(k.arg in _OF_COMPILE for k in call.keywords) or call.args
    ]


def is_model(script: Script, node: ast.AST) -> bool:
    """Whether an expression is a Keras model: constructed as one, or compiled or fitted in this file."""
    trained = {ast.unparse(call.func.value) for call in [*compiles(script), *fits(script)]}  # type: ignore[attr-defined]
    made = any(script.called(value).startswith(_MODELS) for value in script.values(node) if value)
    return made or ast.unparse(node) in trained


def _methods(script: Script, *names: str) -> list[ast.Call]:
    """Calls of methods, without a module's functions such as `re.compile`."""
    return [
        call
        for call in script.calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in names
        and not (script.name(call.func.value) or "").islower()
    ]


def hides_arguments(call: ast.Call) -> bool:
    """Whether `*args` or `**kwargs` may pass arguments that the call does not show."""
    return any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords)


def is_wrapped(script: Script, optimizer: ast.AST | None) -> bool | None:
    """Whether an optimizer averages gradients over the ranks; None if this file does not show it."""
    answers: set[bool | None] = set()
    for value in script.values(optimizer) if optimizer else [ast.Constant("rmsprop")]:
        called = script.called(value) if value else ""
        if called in WRAPPERS:
            answers.add(True)
        elif called.endswith("LossScaleOptimizer") and isinstance(value, ast.Call):
            inner = script.argument(value, "inner_optimizer", 0)
            answers.add(is_wrapped(script, inner) if inner else None)
        elif is_optimizer(script, value) or isinstance(value, ast.Constant | ast.Dict):
            answers.add(False)
        else:
            answers.add(None)
    return answers.pop() if len(answers) == 1 else None


def is_optimizer(script: Script, node: ast.AST | None) -> bool:
    """Whether an expression creates one of Keras' own optimizers."""
    called = script.called(node) if node else ""
    return called == "keras.optimizers.get" or (
        called.startswith("keras.optimizers.") and not called.startswith("keras.optimizers.schedules.")
    )


def callbacks(script: Script, fit: ast.Call) -> Callbacks:
    """The callbacks that are passed to a call of `fit` or `evaluate`."""
    given = script.argument(fit, "callbacks")
    if given is None:
        return Callbacks([], not hides_arguments(fit))
    return _sequence(script, given, frozenset())


def _sequence(script: Script, node: ast.AST, seen: frozenset) -> Callbacks:
    """The content of a list of callbacks at the place where it is used."""
    if node in seen:
        return Callbacks([], False)
    seen = seen | {node}
    if isinstance(node, ast.List | ast.Tuple):
        return _join(*[_element(script, element, seen) for element in node.elts])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _join(_sequence(script, node.left, seen), _sequence(script, node.right, seen))
    if isinstance(node, ast.IfExp):
        return _join(_sequence(script, node.body, seen), _sequence(script, node.orelse, seen))
    if isinstance(node, ast.Call):
        return _made_by(script, node, seen)
    if is_constant(node, None):
        return Callbacks([], True)
    # Take the latest assignment. It contains an earlier one only in `callbacks += ...`.
    values = script.values(node)
    value = values[0] if values else None
    if value is None or value is node:
        return Callbacks([], False)
    sure = Callbacks([], len(values) == 1 or isinstance(value, ast.BinOp))
    return _join(_sequence(script, value, seen), _later(script, node, value, seen), sure)


def _made_by(script: Script, call: ast.Call, seen: frozenset) -> Callbacks:
    called = script.called(call)
    if called in ("list", "tuple", "keras.callbacks.CallbackList") and call.args:
        return _sequence(script, call.args[0], seen)
    if called.startswith(("keras.callbacks.", "hvd.callbacks.")):
        return Callbacks([call], True)
    returned = script.returned(script.function_of(call))
    if len(returned) != 1:
        return Callbacks([], False)
    return _sequence(script, returned[0], seen)


def _element(script: Script, node: ast.AST, seen: frozenset) -> Callbacks:
    if isinstance(node, ast.Starred):
        return _sequence(script, node.value, seen)
    values = script.values(node)
    return Callbacks([value or node for value in values[:1]], None not in values)


def _later(script: Script, use: ast.AST, value: ast.AST, seen: frozenset) -> Callbacks:
    """The callbacks that are added between the list's assignment and its use: `callbacks.append(...)`."""
    if not is_variable(use):
        return Callbacks([], True)
    parts = []
    for call in script.calls:
        method = call.func
        if not isinstance(method, ast.Attribute) or ast.unparse(method.value) != ast.unparse(use) or not call.args:
            continue
        if script.scope(call) is script.scope(use) and not end(value) <= start(call) <= start(use):
            continue
        if method.attr == "append":
            parts.append(_element(script, call.args[0], seen))
        elif method.attr == "extend":
            parts.append(_sequence(script, call.args[0], seen))
        elif method.attr == "insert":
            parts.append(Callbacks([], False))
    return _join(*parts)


def _join(*parts: Callbacks) -> Callbacks:
    return Callbacks([item for part in parts for item in part.items], all(part.complete for part in parts))
