"""Quantized and pruned models, and other formats."""

import keras
import numpy as np
import pytest

from hvdkit.compress import exports, trained, variants
from hvdkit.errors import UsageError


def small():
    keras.utils.set_random_seed(3)
    layers = [keras.Input([6]), keras.layers.Dense(32, "relu"), keras.layers.Dense(4)]
    return keras.Sequential(layers)


INPUTS = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")


@pytest.mark.parametrize(("mode", "bound"), [("int8", 0.05), ("int4", 0.5), ("float8", 0.2)])
def test_a_quantized_model_computes_nearly_the_same(mode, bound, tmp_path):
    expected = small().predict(INPUTS, verbose=0)
    model = variants.quantized(small(), mode)
    model.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")
    assert {layer.dtype_policy.quantization_mode for layer in again.layers if layer.weights} == {mode}
    got = again.predict(INPUTS, verbose=0)
    assert 0 < np.abs(got - expected).max() < bound * np.abs(expected).max()


def test_a_model_that_keras_cannot_quantize_is_refused():
    with pytest.raises(UsageError, match=r"int8: no layer of this model can be quantized by Keras, which knows Dense"):
        variants.quantized(keras.Sequential([keras.Input([4, 4, 1]), keras.layers.Conv2D(2, 2)]), "int8")


def test_the_smallest_weights_of_all_layers_together_are_pruned():
    model = variants.pruned(small(), 0.75)
    before = {weight.path: keras.ops.convert_to_numpy(weight) for weight in small().trainable_weights}
    after = [keras.ops.convert_to_numpy(weight) for weight in model.trainable_weights]
    kernels = [(old, new) for old, new in zip(before.values(), after, strict=True) if old.ndim == 2]
    zeros = sum((new == 0).sum() for _, new in kernels)
    assert zeros == round(0.75 * sum(new.size for _, new in kernels))
    least = min(np.abs(new[new != 0]).min() for _, new in kernels)
    assert all(np.abs(old[new == 0]).max() <= least for old, new in kernels)
    assert all((new[new != 0] == old[new != 0]).all() for old, new in kernels)
    assert list(variants.makers(["int8"], [0.5])) == ["as trained", "int8", "pruned 0.5", "pruned 0.5, int8"]


def test_zeros_are_smaller_when_they_are_zipped(tmp_path):
    for name, share in (("whole", 0.01), ("pruned", 0.9)):
        variants.pruned(small(), share).save(tmp_path / f"{name}.keras")
    whole, pruned = tmp_path / "whole.keras", tmp_path / "pruned.keras"
    assert trained.bytes_of(whole) == trained.bytes_of(tmp_path) - trained.bytes_of(pruned)
    assert trained.zipped_bytes_of(pruned) < trained.zipped_bytes_of(whole)


@pytest.mark.parametrize("form", ["saved_model", "litert"])
def test_other_formats_compute_the_same(form, tmp_path):
    model = small()
    path, predict = exports.export(model, form, tmp_path)
    assert path.exists()
    got = trained.outputs_of(predict, INPUTS)
    assert got == pytest.approx(model.predict(INPUTS, verbose=0), abs=1e-5)
    assert trained.samples_per_second(predict, INPUTS) > 0


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    def missing(*arguments, **options):
        raise ImportError("No module named 'tf2onnx'", name="tf2onnx")

    model = small()
    monkeypatch.setattr(model, "export", missing)
    with pytest.raises(UsageError, match="onnx: a package is missing .*pip install tf2onnx"):
        exports.export(model, "onnx", tmp_path)
