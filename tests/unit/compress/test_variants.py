"""Quantized and pruned models, and other formats."""

import keras
import numpy as np
import pytest
from hvdkit_models import gpt

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


def test_a_pruned_model_is_trained_once_and_its_zeros_stay():
    trainings = []

    def train(model):
        trainings.append(model)
        model.compile(keras.optimizers.Adam(0.1), "mse", jit_compile=False)
        with trained.keeping_zeros(model):
            model.fit(INPUTS, np.ones([5, 4]), epochs=3, verbose=0)
        return model

    made = variants.makers(["int8"], [0.5], train)
    assert list(made)[2:] == ["pruned 0.5", "pruned 0.5, finetuned", "pruned 0.5, finetuned, int8"]
    pruned, finetuned = (made[name](small()).get_weights()[::2] for name in list(made)[2:4])
    for before, after in zip(pruned, finetuned, strict=True):
        np.testing.assert_array_equal(before == 0, after == 0)
        assert (before != after).sum() > 0.5 * (before != 0).sum()
    made["pruned 0.5, finetuned, int8"](small())
    assert len(trainings) == 1
    assert all(weight.constraint is None for weight in trainings[0].weights)


def small_gpt(depth):
    keras.utils.set_random_seed(3)
    return gpt.build(sequence_length=8, vocabulary_size=20, width=16, depth=depth, heads=2)


TOKENS = np.random.default_rng(0).integers(20, size=[6, 8]).astype("int32")


def test_the_blocks_of_a_gpt_make_the_whole_model():
    model = small_gpt(2)
    first, *blocks = gpt.blocks(model)
    assert len(blocks) == 2
    x = first(TOKENS)
    for block in blocks:
        x = block(x)
    whole = model.predict(TOKENS, verbose=0)
    np.testing.assert_allclose(model.get_layer("head")(model.get_layer("final_norm")(x)), whole, atol=1e-5)


def test_parts_of_layers_are_quantized_in_the_file_too(tmp_path):
    model = variants.quantized(small_gpt(1), "int8")
    model.save(tmp_path / "small.keras")
    trained.check_opens(tmp_path / "small.keras", model, np.zeros([2, 8], np.int32), "int8")
    again = keras.saving.load_model(tmp_path / "small.keras")
    assert again.get_layer("block0_attention").key_dense.quantization_mode == "int8"
    again.get_layer("head").bias.assign(np.ones(20))
    with pytest.raises(UsageError, match="int8: the file that Keras wrote computes something else than the model"):
        trained.check_opens(tmp_path / "small.keras", again, np.zeros([2, 8], np.int32), "int8")
    assert not (tmp_path / "small.keras").exists()


def test_gptq_quantizes_the_blocks_of_a_gpt_and_no_other_model(tmp_path):
    model = small_gpt(1)
    expected = model.predict(TOKENS, verbose=0)
    variants.quantized(model, "gptq", lambda: TOKENS)
    model.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")
    got = again.predict(TOKENS, verbose=0)
    assert 0 < np.abs(got - expected).max() < 0.5 * np.abs(expected).max()
    np.testing.assert_allclose(model.predict(TOKENS, verbose=0), got, atol=1e-5)
    modes = {layer.name: layer.dtype_policy.quantization_mode for layer in again.layers}
    assert (modes["block0_mlp_up"], modes["head"], modes["embed_positions"]) == ("gptq", None, None)
    with pytest.raises(UsageError, match="gptq: Keras quantizes by GPTQ block by block, and this model does not tell"):
        variants.quantized(small(), "gptq", lambda: TOKENS)


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
