"""HVD1: `hvd.init()`, which every script must call first."""

import ast
from collections.abc import Iterator

from hvdkit.lint.finding import Problem
from hvdkit.lint.script import Script, start
from hvdkit.lint.training import WRAPPERS, fits

# These create a variable or tensor, and so initialise TensorFlow's devices and threads.
_KERAS_STARTERS = (
    "keras.Sequential",
    "keras.Model",
    "keras.models.load_model",
    "keras.applications.",
    "keras.metrics.",
    "keras.optimizers.",
)
_TENSORS = ("tf.Variable", "tf.constant", "tf.convert_to_tensor", "tf.cast", "tf.zeros", "tf.ones", "tf.range")
_SOURCES = ("tf.random.uniform", "tf.random.normal", "tf.data.Dataset.", "tf.io.", "tfds.load")
_STARTERS = (*_KERAS_STARTERS, *_TENSORS, *_SOURCES)
_NEED_INIT = ("hvd.rank", "hvd.size", "hvd.local_rank", "hvd.local_size", "hvd.scaled", "hvd.data.shard", *WRAPPERS)


def not_initialised(script: Script) -> Iterator[Problem]:
    """The script uses hvdkit or Horovod, but never calls hvd.init().

    Before hvd.init(), a process does not know its rank and has no GPU of its own. Wrong:

        import hvdkit as hvd
        dataset = hvd.data.shard(dataset)

    Right:

        import hvdkit as hvd
        hvd.init()
        dataset = hvd.data.shard(dataset)

    Not reported in a module that only defines functions, which may run after hvd.init(). Not reported either if the
    script calls a function of another file that may call hvd.init() according to its name (`setup...`, `init...`).
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


def uses_no_hvdkit(script: Script) -> Iterator[Problem]:
    """The script trains a Keras model, but uses no hvdkit.

    Started on N ranks, it trains N models that know nothing of each other, each on all the data. Wrong:

        import keras
        model.compile(keras.optimizers.Adam(1e-3), loss="mse")
        model.fit(dataset, epochs=5)

    Right:

        import hvdkit as hvd
        import keras
        hvd.init()
        dataset = hvd.data.shard(dataset)
        model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(hvd.scaled(1e-3))), loss="mse")
        model.fit(dataset, epochs=5, callbacks=hvd.callbacks.standard())

    Not reported if it uses Horovod or tf.distribute, in a module that only defines functions, or if the script calls a
    function of another file that may use hvdkit according to its name (`setup...`, `init...`).
    """
    others = {"hvd", "horovod"} & script.libraries or any(
        script.called(call).startswith("tf.distribute.") for call in script.calls
    )
    trains = [*fits(script), *_steps(script)]
    if others or not trains or not _is_program(script) or _may_start(script):
        return
    imports = [node for node in script.nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    yield Problem(
        min([*imports, *trains], key=start),
        "The script trains a Keras model, but uses no hvdkit: started on N ranks, it trains N models, each on all the "
        "data.",
        "import hvdkit as hvd, call hvd.init() right after the imports, wrap the optimizer in "
        "hvd.DistributedOptimizer(...), and check the script again.",
    )


def _steps(script: Script) -> list[ast.Call]:
    """The calls that train a step in a loop of the script's own."""
    if not {"keras", "tf"} & script.libraries:
        return []
    methods = (call for call in script.calls if isinstance(call.func, ast.Attribute))
    return [call for call in methods if call.func.attr in ("train_on_batch", "apply_gradients")]  # type: ignore[attr-defined]


def initialised_late(script: Script) -> Iterator[Problem]:
    """hvd.init() comes after the first tensor, optimizer or model.

    TensorFlow fixes its devices and threads when it creates the first tensor or variable. After that, hvd.init() cannot
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
                f"hvd.init() comes after {ast.unparse(earlier.func)}() in line {earlier.lineno}, which fixes "
                f"TensorFlow's devices and threads, so this rank cannot get its own.",
                "call hvd.init() right after the imports.",
            )


def _before(script: Script, call: ast.Call) -> Iterator[ast.Call]:
    """The calls that run before this one: earlier in its scope, or before the call of its function."""
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
    """Whether the script calls a function of another file whose name suggests that it calls `hvd.init`."""
    names = [ast.unparse(call.func).lower() for call in script.calls if not script.function_of(call)]
    return any(name.startswith(("init", "setup", "set_up")) or name.endswith((".setup", ".set_up")) for name in names)


def _is_program(script: Script) -> bool:
    """Whether the file does more than define functions and classes when it runs."""
    statements = [script.statement(call) for call in script.calls if script.scope(call) is script.tree]
    return any(isinstance(statement, ast.Expr) for statement in statements)
