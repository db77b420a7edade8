"""Data of any structure, and a model with a loss of its own, on several ranks."""

import csv
import json

import numpy as np
import pytest

PROGRAM = """
import keras
import numpy as np
import tensorflow as tf

def rows(number, seed):
    draw = np.random.default_rng(seed)
    inputs = {"numbers": draw.normal(size=(number, 3)), "kind": draw.integers(0, 4, number)}
    value = inputs["numbers"] @ [[1.0], [-2.0], [0.5]] + inputs["kind"][:, None]
    tags = np.stack([value[:, 0] > 0, inputs["kind"] == 1], 1).astype("float32")
    return inputs, {"value": value, "tags": tags}, draw.uniform(0.5, 1.5, number)

def data(seed):
    return rows(98, seed), rows(31, seed + 1)

def streamed():
    return {split: tf.data.Dataset.from_tensor_slices(arrays) for split, arrays in zip(("train", "test"), data(0))}

def differing():
    return rows(98, None), rows(31, None)

def build():
    inputs = {"numbers": keras.Input([3], name="numbers"), "kind": keras.Input([], dtype="int32", name="kind")}
    hidden = keras.layers.Concatenate()([inputs["numbers"], keras.layers.Embedding(4, 2)(inputs["kind"])])
    hidden = keras.layers.Dense(16, "relu")(hidden)
    outputs = {"value": keras.layers.Dense(1, name="value")(hidden)}
    outputs["tags"] = keras.layers.Dense(2, "sigmoid", name="tags")(hidden)
    return keras.Model(inputs, outputs)

def compiled():
    model = build()
    losses = {"value": keras.losses.Huber(), "tags": "binary_crossentropy"}
    model.compile(keras.optimizers.Adam(0.02), losses, metrics={"value": ["mae"], "tags": ["auc"]})
    return model
"""


def train_a_few_steps(path):
    """Trains the same global batches on any number of ranks, 1 or 2."""
    import keras

    import hvdkit as hvd
    from hvdkit.data import balance, pipeline
    from hvdkit.data.sources import open_source
    from hvdkit.model.evaluation import evaluate_part
    from hvdkit.train.build import build_model, check_batch, find_model

    hvd.init()
    source = open_source(f"{path}:data", seed=3)
    mine = [0, 1] if hvd.size() == 1 else [hvd.rank()]
    shares = [pipeline.read_share(source, "train", share, 2, cache_bytes=0) for share in mine]
    sampling = balance.Sampling("none", np.array([98]))
    batches = pipeline.training_batches(shares, local_batch=8, steps_per_epoch=6, seed=0, sampling=sampling)
    keras.utils.set_random_seed(0)
    model = build_model(find_model(f"{path}:compiled"), {})
    check_batch(model, pipeline.first_batch(shares[0]), "mine", source.name)
    model.optimizer = hvd.DistributedOptimizer(model.optimizer)
    model.fit(batches, epochs=2, steps_per_epoch=6, shuffle=False, verbose=0, callbacks=hvd.callbacks.standard())
    test = pipeline.read_share(source, "test", hvd.rank(), hvd.size(), cache_bytes=0)
    return [w.numpy() for w in model.weights], evaluate_part(model, pipeline.evaluation_batches(test, 7))


def test_two_ranks_train_several_inputs_and_outputs_like_one(ranks, tmp_path):
    path = tmp_path / "mine_on_ranks.py"
    path.write_text(PROGRAM)
    ((weights, alone),) = ranks(1, train_a_few_steps, path=str(path))
    assert set(alone) == {"loss", "value_loss", "tags_loss", "value_mae", "tags_auc"}
    for others, together in ranks(2, train_a_few_steps, path=str(path)):
        for one, other in zip(weights, others, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)
        for name in ("loss", "value_mae", "tags_auc"):  # Keras averages the losses of outputs over batches of any size
            assert together[name] == pytest.approx(alone[name], rel=1e-4)


@pytest.mark.slow
def test_the_main_job_trains_on_what_functions_return(train, tmp_path):
    (tmp_path / "mine.py").write_text(PROGRAM)
    flags = ["--model=mine.py:compiled", "--global-batch=16", "--eval-every=1", "--monitor=value_mae", "--keep-best=1"]
    flags += ["--no-tensorboard", "--seed=3"]
    results = {}
    for dataset, workdir, more in (
        ("data", "whole", ["--epochs=6"]),
        ("data", "parts", ["--epochs=2"]),
        ("data", "parts", ["--epochs=6"]),
        ("streamed", "streamed", ["--epochs=60", "--early-stopping=1", "--validation=no"]),
    ):
        ended = train(2, *flags, f"--dataset=mine.py:{dataset}", f"--workdir={workdir}", *more)
        assert ended.code == 0, ended.output
        results[workdir] = json.loads((tmp_path / workdir / "result.json").read_text())
        assert "2 replica(s): test value mae " in ended.output
    assert results["parts"]["weights_sha256"] == results["whole"]["weights_sha256"], "resumed bit for bit"
    assert results["whole"]["main_metric"] == "value_mae"
    assert {"test_tags_auc", "validation_value_mae", "test_loss"} <= set(results["whole"])
    history = list(csv.DictReader((tmp_path / "whole" / "history.csv").open()))
    assert float(history[-1]["val_value_mae"]) < float(history[0]["val_value_mae"])
    stopped = results["streamed"]
    assert stopped["epochs"] < 60
    assert stopped["steps"] == 6 * stopped["epochs"]
    assert (tmp_path / "whole" / "curves.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--dataset=mine.py:differing"], "mine:differing returned other data on rank 1 than on rank 0"),
        (["--dataset=mine.py:data", "--monitor=dice"], "--monitor=dice is no metric of the model, which has loss, "),
    ],
)
def test_mistakes_end_in_one_sentence_on_all_ranks(train, tmp_path, flags, sentence):
    (tmp_path / "mine.py").write_text(PROGRAM)
    ended = train(2, "--model=mine.py:compiled", "--workdir=run", "--global-batch=16", *flags)
    assert ended.code == 2, ended.output
    assert ended.output.count(sentence) == 1, ended.output
    assert "Traceback" not in ended.output
