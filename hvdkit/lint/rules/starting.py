"""HVD1: `hvd.init()`, which must be there, and come first."""

import ast
from collections.abc import Iterator

from hvdkit.lint.finding import Problem
from hvdkit.lint.script import Script, start
from hvdkit.lint.training import WRAPPERS, fits

# These start TensorFlow's devices and threads: they hold a variable, or make a tensor.
_STARTERS = (
    "keras.Sequential", "keras.Model", "keras.models.load_model", "keras.applications.", "keras.metrics.",
    "keras.optimizers.", "tf.Variable", "tf.constant", "tf.convert_to_tensor", "tf.cast", "tf.zeros", "tf.ones",
    "tf.range", "tf.random.uniform", "tf.random.normal", "tf.data.Dataset.", "tf.io.", "tfds.load",
)  # fmt: skip
_NEED_INIT = ("hvd.rank", "hvd.size", "hvd.local_rank", "hvd.local_size", "hvd.scaled", "hvd.data.shard", *WRAPPERS)


def not_initialised(script: Script) -> Iterator[Problem]:
    """The script uses hvdkit or Horovod, but never calls hvd.init().

    Until hvd.init() is called a process does not know its rank, and has no GPU of its own. Wrong:

        import hvdkit as hvd
        dataset = hvd.data.shard(dataset)

    Right:

        import hvdkit as hvd
        hvd.init()
        dataset = hvd.data.shard(dataset)

    Silent in a module that only defines functions, which may be called after hvd.init(), and where a function of
    another file that may call it (by its name: `setup...`, `init...`) is called.
    """
    if "hvd" not in script.libraries or script.calls_of("hvd.init", "hvd.strategies.create") or _may_start(script):
        return
    users = script.calls_of(*_NEED_INIT) or fits(script)
    if users and _is_program(script):
        first = users[0]
        yield Problem(
            first,
            f"{ast.unparse(first.func)}() is called, but hvd.init() is not, so this process has no rank and no device "
            f"of its own.",
            "call hvd.init() once, right after the imports.",
        )


def initialised_late(script: Script) -> Iterator[Problem]:
    """hvd.init() comes after the first tensor, optimizer or model.

    TensorFlow fixes its devices and threads when it makes the first tensor or variable. Later hvd.init() can no longer
    give this process its GPU: all ranks of a host allocate memory on all of its GPUs. Wrong:

        model = keras.Sequential([...])
        hvd.init()

    Right:

        hvd.init()
        model = keras.Sequential([...])
    """
    for init in script.calls_of("hvd.init")[:1]:
        earlier = next((call for call in _before(script, init) if _starts(script, call, frozenset())), None)
        if earlier:
            yield Problem(
                init,
                f"hvd.init() comes after line {earlier.lineno} has called {ast.unparse(earlier.func)}(), when "
                f"TensorFlow's devices and threads are fixed already, so this rank cannot be given its own.",
                "call hvd.init() right after the imports.",
            )


def _before(script: Script, call: ast.Call) -> Iterator[ast.Call]:
    """The calls that run before this one: earlier in its scope, and before the call of its function."""
    scope = script.scope(call)
    for other in script.calls:
        if script.scope(other) is scope and start(other) < start(call) and other not in _ancestors(script, call):
            yield other
    callers = script.callers(scope)
    if len(callers) == 1 and scope is not script.scope(callers[0]):
        yield from _before(script, callers[0])


def _ancestors(script: Script, node: ast.AST) -> list[ast.AST]:
    return [parent for parent, _, _ in script.ancestors(node)]


def _starts(script: Script, call: ast.Call, seen: frozenset) -> bool:
    name = script.called(call)
    if name.startswith(_STARTERS) and not name.startswith("keras.optimizers.schedules."):
        return True
    function = script.function_of(call)
    if function is None or function in seen or isinstance(function, ast.ClassDef):
        return False
    return any(
        _starts(script, inner, seen | {function})
        for inner in ast.walk(function)
        if isinstance(inner, ast.Call) and script.scope(inner) is function
    )


def _may_start(script: Script) -> bool:
    """Whether a function of another file is called that, by its name, may call `hvd.init`."""
    names = [ast.unparse(call.func).lower() for call in script.calls if not script.function_of(call)]
    return any(name.startswith(("init", "setup", "set_up")) or name.endswith((".setup", ".set_up")) for name in names)


def _is_program(script: Script) -> bool:
    """Whether the file does something when it is run, and does not only define."""
    statements = [script.statement(call) for call in script.calls if script.scope(call) is script.tree]
    return any(isinstance(statement, ast.Expr) for statement in statements)
