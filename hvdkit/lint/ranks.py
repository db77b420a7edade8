"""Which code runs on some ranks only: tests of the rank and the blocks that they guard."""

import ast
from collections.abc import Iterator
from typing import NamedTuple

from hvdkit.lint.script import Function, Script, is_constant

# These collectives return the same value on all ranks.
_SAME_ON_ALL_RANKS = {
    "hvd.allgather",
    "hvd.allgather_object",
    "hvd.allreduce",
    "hvd.broadcast",
    "hvd.broadcast_object",
    "hvd.grouped_allgather",
    "hvd.whole_batch",
    "hvd.grouped_allreduce",
}
_RANKS = {"hvd.rank", "hvd.local_rank", "hvd.cross_rank"}
_RANK_NAMES = {"rank", "local_rank", "is_root", "is_chief", "is_main", "is_master"}  # usual names of variables
_ENVIRONMENT = {"HOROVOD_RANK", "HOROVOD_LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "RANK"}


class Guard(NamedTuple):
    """A test that must equal `truth` for a node to be reached; `exit` is the statement that exits otherwise."""

    test: ast.AST
    truth: bool
    owner: ast.AST
    exit: ast.AST | None = None


def is_rank(script: Script, node: ast.AST) -> bool:
    """Whether a node reads the rank: `hvd.rank()`, `world.rank`, a name such as `local_rank`, HOROVOD_RANK."""
    if isinstance(node, ast.Name):
        return node.id in _RANK_NAMES or script.name(node) in _RANKS
    if isinstance(node, ast.Attribute):
        return node.attr in _RANK_NAMES and not ast.unparse(node.value).endswith("shape")  # a tensor's rank
    return is_constant(node, *_ENVIRONMENT)


def depends_on_rank(script: Script, node: ast.AST) -> bool:
    """Whether a value is computed from the rank and may therefore differ between ranks."""
    made_from = script.derivation(node, cut=lambda n: script.called(n) in _SAME_ON_ALL_RANKS)
    return any(is_rank(script, n) for n in made_from.nodes)


def tests_rank(script: Script, test: ast.AST) -> bool:
    """Whether a test reads the rank, and its result may therefore differ between ranks.

    This is narrower than `depends_on_rank`: the length of a shard depends on the rank, but does not test it.
    """
    values = script.values(test)
    if values and values != [test]:
        unknown = None in values and is_rank(script, test)
        return unknown or any(value is not None and tests_rank(script, value) for value in values)
    if isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.BinOp):
        return any(tests_rank(script, part) for part in ast.iter_child_nodes(test) if isinstance(part, ast.expr))
    if isinstance(test, ast.Call) and script.called(test) not in _SAME_ON_ALL_RANKS:
        return any(is_rank(script, n) for n in ast.walk(test))
    return is_rank(script, test) or (isinstance(test, ast.Subscript) and is_rank(script, test.slice))


def depends_on_size(script: Script, node: ast.AST) -> bool:
    """Whether a value is computed from the number of ranks."""
    return any(script.name(n) in ("hvd.size", "hvd.scaled") or _is_size(n) for n in script.derivation(node).nodes)


def _is_size(node: ast.AST) -> bool:
    # `world.size`, or a usual name for it. Arrays also have a `.size`: at worst the rule misses a finding.
    names = {"world_size", "num_workers", "num_ranks", "num_replicas"}
    if isinstance(node, ast.Name):
        return node.id in names
    return isinstance(node, ast.Attribute) and node.attr in {*names, "size"}


def guards(script: Script, node: ast.AST) -> Iterator[Guard]:
    """Yields the tests in a node's function that decide whether the node is reached, innermost first."""
    for parent, field, child in script.ancestors(node):
        if isinstance(parent, ast.If | ast.While | ast.IfExp) and field in ("body", "orelse"):
            yield Guard(parent.test, field == "body", parent)
        block = getattr(parent, field, None)
        if isinstance(block, list) and isinstance(child, ast.stmt):
            yield from _early_exits(block[: block.index(child)])
        if isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return


def _early_exits(before: list[ast.stmt]) -> Iterator[Guard]:
    for statement in before:
        if isinstance(statement, ast.If):
            for block, truth in ((statement.body, False), (statement.orelse, True)):
                if block and _exits(block[-1]):
                    yield Guard(statement.test, truth, statement, block[-1])


def _exits(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Return | ast.Continue | ast.Break | ast.Raise):
        return True
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func) in ("sys.exit", "exit", "quit", "os._exit")


def exits_without_error(statement: ast.AST) -> bool:
    """Whether an early exit is not an error. A rank that raises or exits with an error ends the whole job."""
    if isinstance(statement, ast.Raise):
        return False
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return not statement.value.args or is_constant(statement.value.args[0], 0, None)
    return True


def on_root_only(script: Script, node: ast.AST, _seen: frozenset = frozenset()) -> bool:
    """Whether a node is reached on one rank only (or one rank per host), directly or through all callers."""
    if any(_implies_root(script, guard.test, guard.truth) for guard in guards(script, node)):
        return True
    for parent, _, _ in script.ancestors(node):
        if isinstance(parent, Function | ast.ClassDef) and parent not in _seen:
            if _decorated(script, parent):
                return True
            callers = script.callers(parent)
            if callers and all(on_root_only(script, call, _seen | {parent}) for call in callers):
                return True
    return False


def _decorated(script: Script, function: ast.AST) -> bool:
    """Whether an unknown decorator, such as `@only_on_root`, may select the rank."""
    decorators = [d.func if isinstance(d, ast.Call) else d for d in getattr(function, "decorator_list", [])]
    known = ("tf.", "keras.", "hvd.", "dataclasses.", "property", "staticmethod", "classmethod")
    return any(not (script.name(d) or "").startswith(known) for d in decorators)


def _implies_root(script: Script, test: ast.AST, truth: bool) -> bool:
    """Whether the test equals `truth` on rank 0 only."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _implies_root(script, test.operand, not truth)
    if isinstance(test, ast.BoolOp):
        every = isinstance(test.op, ast.And) != truth
        return (all if every else any)(_implies_root(script, value, truth) for value in test.values)
    if isinstance(test, ast.Compare):
        return len(test.ops) == 1 and _compares_to_root(script, test, truth)
    values = script.values(test)
    if values and values != [test]:
        return all(value is not None and _implies_root(script, value, truth) for value in values)
    if isinstance(test, ast.Name | ast.Attribute) and (last := ast.unparse(test).rpartition(".")[2]).startswith("is_"):
        return truth and last in _RANK_NAMES
    return not truth and _is_rank_value(script, test)


def _compares_to_root(script: Script, test: ast.Compare, truth: bool) -> bool:
    left, operator, right = test.left, type(test.ops[0]), test.comparators[0]
    if isinstance(left, ast.Constant):  # 0 == hvd.rank()
        left, right = right, left
        operator = {ast.Lt: ast.Gt, ast.Gt: ast.Lt}.get(operator, operator)
    if not _is_rank_value(script, left):
        return False
    root = {(ast.Eq, 0), (ast.Lt, 1), (ast.Is, 0)} if truth else {(ast.NotEq, 0), (ast.Gt, 0), (ast.GtE, 1)}
    return any(operator is kind and is_constant(right, number) for kind, number in root)


def _is_rank_value(script: Script, node: ast.AST) -> bool:
    made_from = [node, *(value for value in script.values(node) if value)]
    return any(is_rank(script, n) for part in made_from for n in ast.walk(part))
