"""HVD6: remains of Keras 2 that Keras 3 refuses, or that make it train wrongly."""

import ast
from collections.abc import Iterator

from hvdkit.lint.finding import Problem
from hvdkit.lint.script import Script, is_constant
from hvdkit.lint.training import WRAPPERS, compiles, fits, is_optimizer, last_part

_OPTIMIZER_ARGUMENTS = {
    "lr": ("Keras 3's optimizers refuse the argument lr", "learning_rate={value}."),
    "decay": (
        "Keras 3's optimizers ignore the argument decay",
        "learning_rate=keras.optimizers.schedules.InverseTimeDecay(rate, 1, {value}).",
    ),
}
_COMPILE_ARGUMENTS = {"experimental_run_tf_function": "leave it out."}
_FIT_ARGUMENTS = dict.fromkeys(
    ("workers", "use_multiprocessing", "max_queue_size"),
    "leave it out; a keras.utils.PyDataset takes it in its constructor.",
)
_CALLBACK_ARGUMENTS = {
    ("ModelCheckpoint", "period"): 'save_freq="epoch", or a number of batches.',
    ("TensorBoard", "write_grads"): "leave it out.",
    ("TensorBoard", "batch_size"): "leave it out.",
}
_METHODS = {"fit_generator": "fit", "evaluate_generator": "evaluate", "predict_generator": "predict"}
_DEVICES = "leave it out: hvd.init() gives each rank its GPU, with memory growth."
_NAMES = {
    "tf.ConfigProto": _DEVICES,
    "tf.GPUOptions": _DEVICES,
    "tf.Session": _DEVICES,
    "tf.InteractiveSession": _DEVICES,
    "keras.backend.set_session": _DEVICES,
    "keras.backend.get_session": "leave it out: there are no sessions in TensorFlow 2.",
    "tf.global_variables_initializer": "leave it out: variables are initialised when they are created.",
    "tf.set_random_seed": "keras.utils.set_random_seed(...).",
    "keras.mixed_precision.experimental": 'keras.mixed_precision.set_global_policy("mixed_float16").',
    "keras.utils.multi_gpu_model": "start one rank per GPU.",
}
# Missing in `keras`, but present in `tf.keras`.
_NAMES_OF_KERAS = {
    "keras.preprocessing.image.ImageDataGenerator": "keras.utils.image_dataset_from_directory, or use tf.keras.",
    "keras.backend.get_value": "keras.ops.convert_to_numpy(...).",
    "keras.backend.set_value": "variable.assign(...).",
}


def horovods_keras_layer(script: Script) -> Iterator[Problem]:
    """The script uses Horovod's own Keras layer, which averages nothing on Keras 3.

    Keras 3 (tf.keras since TensorFlow 2.16) updates weights through a method that Horovod's DistributedOptimizer does
    not override. Gradients are not averaged, and each rank trains its own model without an error
    (https://github.com/horovod/horovod/issues/4290). Its broadcast callback raises an AttributeError. Wrong:

        import horovod.tensorflow.keras as hvd

    Right, with the rest of the script unchanged:

        import hvdkit as hvd

    Not reported in scripts that run Keras 2 on purpose (TF_USE_LEGACY_KERAS, tf_keras).
    """
    if _is_legacy(script):
        return
    for node in script.nodes:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        module = next((m for m in modules if m.startswith(("horovod.keras", "horovod.tensorflow.keras"))), None)
        if module:
            yield Problem(node, f"{module} averages no gradients on Keras 3 and raises no error.", _FIX_IMPORT)
    for call in script.calls_of(*WRAPPERS):
        raw = script.raw_name(call.func) or ""
        if raw.startswith("horovod.tensorflow.") and ".keras." not in raw:
            what = f"horovod.tensorflow.{last_part(raw)} averages no gradients of a Keras 3 optimizer."
            yield Problem(call, what, _FIX_IMPORT)


_FIX_IMPORT = "import hvdkit as hvd."


def removed_arguments(script: Script) -> Iterator[Problem]:
    """The script passes an argument that Keras 3 does not have.

    Keras 3 raises `Argument(s) not recognized` or a TypeError. It ignores `decay` with a warning. Wrong:

        keras.optimizers.Adam(lr=0.001)
        model.compile(optimizer, loss=loss, experimental_run_tf_function=False)

    Right:

        keras.optimizers.Adam(learning_rate=0.001)
        model.compile(optimizer, loss=loss)

    Not reported in scripts that run Keras 2 on purpose (TF_USE_LEGACY_KERAS, tf_keras), or under a version test.
    """
    if _is_legacy(script):
        return
    for call, keyword, what, fix in _removed(script):
        if not _tests_version(script, call):
            value = ast.unparse(keyword.value)
            yield Problem(keyword, f"{what}.", fix.format(value=value))


def _removed(script: Script) -> Iterator[tuple[ast.Call, ast.keyword, str, str]]:
    compiled, fitted = compiles(script), fits(script)
    for call in script.calls:
        callback = last_part(script.called(call)) if script.called(call).startswith("keras.callbacks.") else ""
        for keyword in call.keywords:
            name = keyword.arg or ""
            refused = f"Keras 3 refuses the argument {name}"
            if is_optimizer(script, call) and name in _OPTIMIZER_ARGUMENTS:
                yield call, keyword, *_OPTIMIZER_ARGUMENTS[name]
            elif call in compiled and name in _COMPILE_ARGUMENTS:
                yield call, keyword, f"{refused} of compile()", _COMPILE_ARGUMENTS[name]
            elif call in fitted and name in _FIT_ARGUMENTS:
                yield call, keyword, f"{refused} of fit()", _FIT_ARGUMENTS[name]
            elif (callback, name) in _CALLBACK_ARGUMENTS:
                yield call, keyword, f"{refused} of {callback}", _CALLBACK_ARGUMENTS[callback, name]


def removed_names(script: Script) -> Iterator[Problem]:
    """The script uses a name that Keras 3 or TensorFlow 2 does not have.

    keras.optimizers.legacy raises when it is used. `optimizer.lr` and `fit_generator` are removed, and so are the
    sessions of TensorFlow 1, with which Horovod scripts selected a GPU. Wrong:

        model.fit_generator(batches)
        model.optimizer.lr

    Right:

        model.fit(batches)
        model.optimizer.learning_rate

    Not reported in scripts that run Keras 2 on purpose (TF_USE_LEGACY_KERAS, tf_keras), or under a version test.
    """
    if _is_legacy(script):
        return
    for node in script.nodes:
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load | ast.Store):
            gone = _gone(script, node)
            if gone and not _tests_version(script, node):
                yield Problem(node, f"{gone[0]} is not in Keras 3 or TensorFlow 2.", gone[1])


def _gone(script: Script, node: ast.Attribute | ast.Name) -> tuple[str, str] | None:
    name = script.name(node) or ""
    if name in _NAMES:
        return ast.unparse(node), _NAMES[name]
    if name in _NAMES_OF_KERAS and (raw := script.raw_name(node)) in _NAMES_OF_KERAS:
        return ast.unparse(node), _NAMES_OF_KERAS[raw]
    if name.startswith("keras.optimizers.legacy.") and name.count(".") == 3:
        return ast.unparse(node), f"keras.optimizers.{last_part(name)}."
    return _gone_attribute(script, node) if isinstance(node, ast.Attribute) else None


def _gone_attribute(script: Script, node: ast.Attribute) -> tuple[str, str] | None:
    parent = next(script.ancestors(node))[0]
    called = isinstance(parent, ast.Call) and parent.func is node
    if node.attr in _METHODS and called:
        return f"{node.attr}()", f"{_METHODS[node.attr]}(), which takes generators, too."
    if node.attr == "lr" and _holds_optimizer(script, node.value):
        return ast.unparse(node), f"{ast.unparse(node.value)}.learning_rate."
    if node.attr == "variables" and called and _holds_optimizer(script, node.value):
        return f"{ast.unparse(node)}()", f"{ast.unparse(node)}, which is a list."
    return None


def _holds_optimizer(script: Script, node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute) and node.attr == "optimizer":
        return True
    made = [value for value in script.values(node) if value]
    return any(is_optimizer(script, value) or script.called(value) in WRAPPERS for value in made)


def legacy_keras(script: Script) -> Iterator[Problem]:
    """The script uses hvdkit together with Keras 2.

    hvdkit.DistributedOptimizer takes the optimizers of Keras 3 and refuses those of tf_keras. Wrong:

        import tf_keras as keras
        import hvdkit as hvd

    Right:

        import keras
        import hvdkit as hvd
    """
    uses_hvdkit = any(raw.partition(".")[0] == "hvdkit" for raw in script.imports.values())
    place = _legacy_place(script)
    if uses_hvdkit and place is not None:
        yield Problem(
            place,
            "This selects Keras 2 (tf_keras), but hvdkit trains Keras 3 models.",
            "import keras, without TF_USE_LEGACY_KERAS.",
        )


def _is_legacy(script: Script) -> bool:
    return _legacy_place(script) is not None


def _legacy_place(script: Script) -> ast.AST | None:
    for node in script.nodes:
        if isinstance(node, ast.Import) and any(a.name.partition(".")[0] == "tf_keras" for a in node.names):
            return node
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tf_keras":
            return node
        if is_constant(node, "TF_USE_LEGACY_KERAS") and _is_set(script, node):
            return node
    return None


def _is_set(script: Script, variable: ast.AST) -> bool:
    """Whether the environment variable is set here: `os.environ[variable] = ...`, `setdefault(variable)`."""
    parent = next(script.ancestors(variable))[0]
    if isinstance(parent, ast.Subscript):
        return isinstance(parent.ctx, ast.Store)
    return isinstance(parent, ast.Call) and ast.unparse(parent.func).endswith((".setdefault", ".putenv"))


def _tests_version(script: Script, node: ast.AST) -> bool:
    """Whether a version test or a `try` guards the use of an old name."""
    for parent, field, _ in script.ancestors(node):
        if isinstance(parent, ast.If | ast.IfExp) and field in ("body", "orelse"):
            test = ast.unparse(parent.test).lower()
            if "version" in test or "hasattr" in test or "tf2" in test or "keras_3" in test:
                return True
        if isinstance(parent, ast.Try) and field == "body":
            return True
    return False
