"""No module outside of hvdkit/compat touches a private name of Keras or TensorFlow: an AST scan proves it."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMPAT = ROOT / "hvdkit" / "compat"
OTHERS = sorted(set((ROOT / "hvdkit").rglob("*.py")) - set(COMPAT.glob("*.py")))
# Private names of others than Keras and TensorFlow, and what they are asked of.
FOREIGN = {
    "_exit": "os",
    "_current_frames": "sys",
    "_getframe": "sys",
    "_grouped_reducescatter": "hvd.mpi_ops",
    "_replace": "binding",  # of a named tuple
    "_trial_id": "trial",  # Optuna's
    "_saved_state": "self",  # of Horovod's ObjectState
    "_option_string_actions": "self",  # argparse's
    "_actions": "parser",
    "_SubParsersAction": "argparse",
}
PRIVATE_MODULES = re.compile(r"^(keras\.src|tensorflow\.python)\b")
PATHS = {"seed_generator_state", "gradient_accumulator"}  # of variables
SPEAKS_OF_THEM = {ROOT / "hvdkit" / "lint" / "script.py"}  # to find them in the user's script


def is_private(name):
    magic = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and not magic and name.strip("_").isidentifier()


def owned(tree):
    """Private names that a module's classes make: methods, class attributes, attributes of self."""
    names = set()
    for cls in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
        for node in cls.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {t.id for t in targets if isinstance(t, ast.Name)}
        for node in ast.walk(cls):
            stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if stored and ast.unparse(node.value) == "self":
                names.add(node.attr)
    return {name for name in names if is_private(name)}


def of_compat():
    """Every private name that compat uses, as an attribute or a text."""
    names = set()
    for path in COMPAT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    return {name for name in names if is_private(name)}


def violations(source, ours, known):
    """Lines of a module that touch a private name which is no attribute of hvdkit's own.

    Args:
        source: the module's.
        ours: private names that hvdkit's classes make.
        known: those that compat uses.
    """
    tree = ast.parse(source)
    mine = owned(tree)
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(tree):
        found = None
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            # Of a class of this module, or of another under a name that compat does not know. Whether a class of
            # Keras' kind has a name that Keras has, too, is for the last test.
            own = (owner in ("self", "cls", "super()") and node.attr in mine) or node.attr in ours - known
            marked = node.attr.startswith(("_hvdkit_", "_self_"))
            found = None if own or marked or FOREIGN.get(node.attr) == owner else node.attr
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("keras.src", "tf.python", "tensorflow.python"):
            found = ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            text = node.value
            found = text if PRIVATE_MODULES.match(text) or text in known | PATHS else None
        elif isinstance(node, ast.ImportFrom) and node.module:
            theirs = re.match(r"^(keras|tensorflow)\b", node.module) and any(is_private(a.name) for a in node.names)
            found = node.module if theirs or PRIVATE_MODULES.match(node.module) else None
        elif isinstance(node, ast.Import):
            found = next((a.name for a in node.names if PRIVATE_MODULES.match(a.name)), None)
        if found:
            yield f"{node.lineno}: {found}"


@pytest.fixture(scope="module")
def ours():
    return set().union(*(owned(ast.parse(path.read_text())) for path in OTHERS))


@pytest.fixture(scope="module")
def known():
    return of_compat()


def test_no_other_module_touches_a_private_name(ours, known):
    found = [
        f"{path.relative_to(ROOT)}:{place}"
        for path in OTHERS
        if path not in SPEAKS_OF_THEM
        for place in violations(path.read_text(), ours, known)
    ]
    assert not found, "give each a function and a test in hvdkit/compat"


@pytest.mark.parametrize(
    "line",
    [
        "model._flatten_layers()",
        "model.optimizer._iterations.numpy()",
        "optimizer._clip_gradients = clip",
        "model._never_heard_of",
        "getattr(model, '_distribute_strategy', None)",
        "vars(model)['_initial_epoch'] = 1",
        "class Mine(keras.Variable):\n    def f(self):\n        return self._value",
        "class Mine(keras.Model):\n    def f(self):\n        return self._clear_losses()",
        "class Mine(keras.Model):\n    def f(self):\n        return super()._get_metrics_result_or_logs({})",
        "from keras.src.backend.common import global_state",
        "import tensorflow.python.distribute.values",
        "from keras import _tf_keras",
        "importlib.import_module('keras.src.random')",
        "keras.src.backend.config",
        "variable.path.endswith('seed_generator_state')",
    ],
)
def test_the_scan_can_fail(line, ours, known):
    assert list(violations(line, ours, known))


@pytest.mark.parametrize(
    "line",
    [
        "class Mine:\n    def __init__(self):\n        self._own = 1\n    def f(self):\n        return self._own",
        "optimizer._self_gradients",
        "os._exit(1)",
        "model.__dict__",
        "model.train_step",
    ],
)
def test_the_scan_lets_pass_what_is_hvdkits_own(line, ours, known):
    assert not list(violations(line, ours, known))


def classes_of_keras_kind():
    """hvdkit's classes with a base of Keras'."""
    for path in OTHERS:
        source = path.read_text()
        named = [n.name for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.bases]
        if not named or "keras" not in source or "peers" in path.parts:  # those run in environments of their own
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
        for cls in (getattr(module, name) for name in named):
            if isinstance(cls, type) and any(is_of_keras(base) for base in cls.__mro__):
                yield cls


def is_of_keras(cls):
    return cls.__module__.split(".")[0] == "keras"


def private_in(cls):
    return owned(ast.parse(textwrap.dedent(inspect.getsource(cls))))


def test_no_subclass_of_keras_has_a_private_name_that_keras_has_too():
    """Neither by chance nor to override it: that is for hvdkit/compat."""
    classes = list(classes_of_keras_kind())
    assert {"HeadsAttention", "BestModelCheckpoint", "PipelinedModel", "FitGuard"} <= {cls.__name__ for cls in classes}
    found = []
    for cls in classes:
        theirs = set().union(*(private_in(base) for base in cls.__mro__ if is_of_keras(base)))
        assert theirs
        found += [f"{cls.__module__}.{cls.__name__}: {name}" for name in sorted(private_in(cls) & theirs)]
    assert not found
