"""HVD5: exchanges in which all ranks must take part."""

import ast
from collections.abc import Iterator

from hvdkit.lint.finding import Problem
from hvdkit.lint.ranks import Guard, guards, leaves_in_peace, tests_rank
from hvdkit.lint.script import Script
from hvdkit.lint.training import callbacks, compiles, fits, is_wrapped, last_part

_EXCHANGES = {
    "allgather", "allgather_object", "allreduce", "alltoall", "average_variables", "barrier", "broadcast",
    "broadcast_global_variables", "broadcast_object", "broadcast_variables", "evaluate", "grouped_allgather",
    "grouped_allreduce", "grouped_reducescatter", "join", "predict", "reducescatter",
}  # fmt: skip
_EXCHANGING = ("MetricAverageCallback", "AverageStateCallback", "standard", "BroadcastGlobalVariablesCallback")


def on_some_ranks(script: Script) -> Iterator[Problem]:
    """An exchange is reached by some ranks only.

    An exchange ends when all ranks have called it: a rank that calls it alone waits for the others until the job is
    ended. Wrong:

        if hvd.rank() == 0:
            total = hvd.allreduce(value)

    Right:

        total = hvd.allreduce(value)
        if hvd.rank() == 0:
            print(total)

    So is `return` under `if hvd.rank() != 0:` before an exchange. fit() with a DistributedOptimizer exchanges, too, and
    so does a function of this file that contains an exchange. Silent where the other branch calls the same function,
    where a `process_set` is given, and where the ranks that leave early leave with an error, which ends the job.
    """
    if "hvd" not in script.libraries:
        return
    exchanges = {call: name for call in script.calls if (name := _exchange(script, call))}
    _add_functions(script, exchanges)
    for call, name in exchanges.items():
        guard = next((g for g in guards(script, call) if _parts_ranks(script, g, name, exchanges)), None)
        if guard is None:
            continue
        if guard.exit is None:
            how = f"on the ranks that the test in line {guard.test.lineno} chooses"  # type: ignore[attr-defined]
            mend = f"call {name}() on all ranks, outside of that test."
        else:
            how = f"on the ranks that have not left in line {guard.exit.lineno}"  # type: ignore[attr-defined]
            mend = f"let no rank leave before {name}()."
        yield Problem(call, f"{name}() exchanges with all ranks, but runs only {how}, which wait for ever.", mend)


def _exchange(script: Script, call: ast.Call) -> str:
    """The name of what exchanges, or an empty string."""
    if script.argument(call, "process_set") is not None:
        return ""
    name = script.called(call)
    if name.startswith("hvd.") and name.count(".") == 1 and last_part(name) in _EXCHANGES:
        return ast.unparse(call.func)
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if method == "evaluate" and script.argument(call, "callbacks") is not None:
        return ast.unparse(call.func) if callbacks(script, call).named(script, *_EXCHANGING) else ""
    if method in ("fit", "fit_generator", "train_on_batch") and _fits_together(script, call):
        return ast.unparse(call.func)
    return ""


def _fits_together(script: Script, call: ast.Call) -> bool:
    """Whether the model that is fitted was compiled, in this file, with an optimizer that exchanges."""
    if callbacks(script, call).named(script, *_EXCHANGING):
        return True
    model = ast.unparse(call.func.value)  # type: ignore[attr-defined]
    compiled = [c for c in compiles(script) if ast.unparse(c.func.value) == model]  # type: ignore[attr-defined]
    if call.func.attr != "train_on_batch" and call not in fits(script):  # type: ignore[attr-defined]
        return False
    return bool(compiled) and all(is_wrapped(script, script.argument(c, "optimizer", 0)) for c in compiled)


def _add_functions(script: Script, exchanges: dict[ast.Call, str]) -> None:
    """Adds the calls of this file's functions that exchange, and of functions that call those."""
    grown = True
    while grown:
        functions = {script.scope(call) for call in exchanges} - {script.tree}
        more = [call for f in functions for call in script.callers(f) if call not in exchanges]
        exchanges.update({call: ast.unparse(call.func) for call in more})
        grown = bool(more)


def _parts_ranks(script: Script, guard: Guard, name: str, exchanges: dict[ast.Call, str]) -> bool:
    """Whether the guard keeps some ranks from the exchange, which they do not meet on their own way."""
    if not tests_rank(script, guard.test) or (guard.exit and not leaves_in_peace(guard.exit)):
        return False
    # The way of the other ranks: the other branch, or the one that ends with the exit.
    other = getattr(guard.owner, "orelse" if guard.truth else "body", [])
    nodes = [n for part in (other if isinstance(other, list) else [other]) for n in ast.walk(part)]
    return not any(exchanges.get(node) == name for node in nodes)  # type: ignore[call-overload]
