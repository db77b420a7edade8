"""HVD5: collective operations, which all ranks must call."""

import ast
from collections.abc import Iterator

from hvdkit.lint.finding import Problem
from hvdkit.lint.ranks import Guard, exits_without_error, guards, tests_rank
from hvdkit.lint.script import Script
from hvdkit.lint.training import callbacks, compiles, fits, is_wrapped, last_part

_COLLECTIVES = {
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "average_variables",
    "barrier",
    "broadcast",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_variables",
    "evaluate",
    "grouped_allgather",
    "grouped_allreduce",
    "grouped_reducescatter",
    "join",
    "predict",
    "reducescatter",
    "whole_batch",
}
_COLLECTIVE_CALLBACKS = (
    "MetricAverageCallback",
    "AverageStateCallback",
    "standard",
    "BroadcastGlobalVariablesCallback",
)


def on_some_ranks(script: Script) -> Iterator[Problem]:
    """Only some ranks call a collective operation.

    A collective ends when all ranks have called it. A rank that calls it alone waits for the others until the job is
    ended. Wrong:

        if hvd.rank() == 0:
            total = hvd.allreduce(value)

    Right:

        total = hvd.allreduce(value)
        if hvd.rank() == 0:
            print(total)

    `return` under `if hvd.rank() != 0:` before a collective is also wrong. fit() with a DistributedOptimizer is a
    collective, too, and so is a function of this file that calls one. Not reported if the other branch calls the same
    function, if a `process_set` is given, or if the ranks that exit early exit with an error, which ends the job.
    """
    if "hvd" not in script.libraries:
        return
    collectives = {call: name for call in script.calls if (name := _collective(script, call))}
    _add_functions(script, collectives)
    for call, name in collectives.items():
        guard = next((g for g in guards(script, call) if _excludes_ranks(script, g, name, collectives)), None)
        if guard is None:
            continue
        if guard.exit is None:
            which = f"the ranks selected by the test in line {guard.test.lineno}"  # type: ignore[attr-defined]
            fix = f"call {name}() on all ranks, outside of that test."
        else:
            which = f"the ranks that do not exit in line {guard.exit.lineno}"  # type: ignore[attr-defined]
            fix = f"let no rank exit before {name}()."
        yield Problem(call, f"{name}() is a collective operation, but only {which} call it and then hang.", fix)


def _collective(script: Script, call: ast.Call) -> str:
    """The name of the collective that is called, or an empty string."""
    if script.argument(call, "process_set") is not None:
        return ""
    name = script.called(call)
    if name.startswith("hvd.") and name.count(".") == 1 and last_part(name) in _COLLECTIVES:
        return ast.unparse(call.func)
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if method == "evaluate" and script.argument(call, "callbacks") is not None:
        return ast.unparse(call.func) if callbacks(script, call).named(script, *_COLLECTIVE_CALLBACKS) else ""
    if method in ("fit", "fit_generator", "train_on_batch") and _is_distributed_fit(script, call):
        return ast.unparse(call.func)
    return ""


def _is_distributed_fit(script: Script, call: ast.Call) -> bool:
    """Whether this file compiles the fitted model with a distributed optimizer."""
    if callbacks(script, call).named(script, *_COLLECTIVE_CALLBACKS):
        return True
    model = ast.unparse(call.func.value)  # type: ignore[attr-defined]
    compiled = [c for c in compiles(script) if ast.unparse(c.func.value) == model]  # type: ignore[attr-defined]
    if call.func.attr != "train_on_batch" and call not in fits(script):  # type: ignore[attr-defined]
        return False
    return bool(compiled) and all(is_wrapped(script, script.argument(c, "optimizer", 0)) for c in compiled)


def _add_functions(script: Script, collectives: dict[ast.Call, str]) -> None:
    """Adds the calls of this file's functions that call a collective, directly or through each other."""
    grown = True
    while grown:
        functions = {script.scope(call) for call in collectives} - {script.tree}
        more = [call for f in functions for call in script.callers(f) if call not in collectives]
        collectives.update({call: ast.unparse(call.func) for call in more})
        grown = bool(more)


def _excludes_ranks(script: Script, guard: Guard, name: str, collectives: dict[ast.Call, str]) -> bool:
    """Whether the guard keeps some ranks from the collective, and they do not call it elsewhere."""
    if not tests_rank(script, guard.test) or (guard.exit and not exits_without_error(guard.exit)):
        return False
    # The other ranks run the other branch, or the one that ends with the exit.
    other = getattr(guard.owner, "orelse" if guard.truth else "body", [])
    nodes = [n for part in (other if isinstance(other, list) else [other]) for n in ast.walk(part)]
    return not any(collectives.get(node) == name for node in nodes)  # type: ignore[call-overload]
