"""A model in other formats than Keras': written, opened again by the format's own runtime, and compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit.errors import UsageError

Predict = Callable[[Any], Any]


def export(model: keras.Model, form: str, folder: Path) -> tuple[Path, Predict]:
    """Writes a model in another format, and opens it again.

    Args:
        model: a built model.
        form: one of `hvdkit.compress.FORMATS`.
        folder: where the file, or the folder of a SavedModel, is written.

    Returns:
        Its path, and the function that the format's runtime makes of it, from a batch of inputs to outputs.

    Raises:
        UsageError: a package is missing, or the format cannot hold the model; the message gives the reason.
    """
    path = folder / {"saved_model": "saved_model", "litert": "model.tflite", "onnx": "model.onnx"}[form]
    try:
        model.export(str(path), format=form if form != "saved_model" else "tf_saved_model", verbose=False)
        return path, _OPENED[form](path)
    except ImportError as error:
        raise UsageError(f"{form}: a package is missing ({error}). pip install {error.name or form}.") from error
    except Exception as error:  # converters raise what they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{form}: the format cannot hold this model ({reason[:300]}).") from error


def _open_saved_model(path: Path) -> Predict:
    loaded = tf.saved_model.load(str(path))
    return lambda inputs: loaded.serve(inputs)  # which keeps its variables


def _open_litert(path: Path) -> Predict:
    interpreter = tf.lite.Interpreter(model_path=str(path))
    (wanted,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()

    def predict(inputs: Any) -> Any:
        values = np.asarray(inputs).astype(wanted["dtype"])
        interpreter.resize_tensor_input(wanted["index"], values.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(wanted["index"], values)
        interpreter.invoke()
        return interpreter.get_tensor(given["index"])

    return predict


def _open_onnx(path: Path) -> Predict:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (wanted,) = session.get_inputs()
    dtype = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}[wanted.type]
    return lambda inputs: session.run(None, {wanted.name: np.asarray(inputs).astype(dtype)})


_OPENED = {"saved_model": _open_saved_model, "litert": _open_litert, "onnx": _open_onnx}
