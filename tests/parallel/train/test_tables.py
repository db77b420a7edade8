"""Tables and arrays on several ranks: what is learned from them, and the main job as users run it."""

import csv
import json

import keras
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from hvdkit.data import pipeline
from hvdkit.data.sources import Schema, arrow_files, open_source, survey_source
from hvdkit.data.vocabulary import learn_tokens
from hvdkit.model.evaluation import evaluate_part
from hvdkit.train import data as job_data
from hvdkit.train import objectives

ROWS = 50


def write_table(path):
    """Measured values that follow from two columns of numbers, a category and a constant."""
    generator = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["area", "age", "city", "floors", "price", "tags"])
        for number in range(ROWS):
            area, age, city = generator.uniform(20, 200), generator.uniform(0, 90), "ab"[number % 2]
            price = 1000 * area - 500 * age + 20_000 * (city == "a")
            rows.writerow([area, age, city, 2, price, ";".join(["big"] * (area > 100) + ["old"] * (age > 40))])


def judge(path):
    """Metrics of a model with given weights, each rank with its own part of the training split."""
    import hvdkit as hvd

    hvd.init()
    found = {}
    for task, label in (("regression", "price"), ("multilabel", "tags")):
        schema = Schema(task, label, feature_columns=("area", "age", "city", "floors"))
        source = open_source(path, schema=schema)
        found[f"{task} standardization"] = standardization = job_data.make_standardization(source)
        inputs = keras.layers.Input(source.shape)
        scaled = keras.layers.Normalization(
            mean=list(standardization["feature_mean"]), variance=list(standardization["feature_variance"])
        )(inputs)
        model = keras.Model(inputs, keras.layers.Dense(len(source.label_names), "linear", True, "ones")(scaled))
        values = {name: value for name, value in standardization.items() if name.startswith("label")}
        metrics = objectives.metrics_for(task, model, **values)
        model.compile(loss=objectives.loss_for(task, model), metrics=metrics)
        examples = source.read("train", 0, source.size("train")).shard(hvd.size(), hvd.rank()).batch(7)
        found[task] = evaluate_part(model, examples)
    return found


def test_two_ranks_learn_and_judge_like_one(ranks, tmp_path):
    path = tmp_path / "train.csv"
    write_table(path)
    (alone,) = ranks(1, judge, path=str(path))
    assert set(alone["regression"]) == {"loss", "mean_absolute_error", "r2_score"}
    assert set(alone["multilabel"]) == {"loss", "accuracy", "auc"}
    for found in ranks(2, judge, path=str(path)):
        for task in ("regression", "multilabel"):
            assert found[f"{task} standardization"] == alone[f"{task} standardization"], "bit for bit"
            assert found[task] == pytest.approx(alone[task], rel=1e-5)


def train_on_parts(path, text_path, shares):
    """Opens, reads and trains as the main job does, and notes which parts of the table this rank reads."""
    import hvdkit as hvd

    hvd.init()
    here = [share for share in range(shares) if share % hvd.size() == hvd.rank()]
    parts: list[int] = []
    whole = arrow_files.PartedTable.read

    def noted(self, part, names):
        parts.append(part)
        return whole(self, part, names)

    def opened(path):
        surveyed = survey_source(path, Schema(), hvd.rank(), hvd.size())
        return open_source(path, surveys=hvd.allgather_object(surveyed))

    def forget():
        found = sorted(set(parts))
        parts.clear()
        return found

    arrow_files.PartedTable.read = noted
    try:
        source, found = opened(path), {"surveyed": forget()}
        found["standardization"] = job_data.make_standardization(source)
        found["standardized"] = forget()
        read = [pipeline.read_share(source, "train", share, shares, cache_bytes=0) for share in here]
        sampling = pipeline.balance.Sampling("none", np.array([source.size("train")]))
        batches = pipeline.training_batches(read, local_batch=6, steps_per_epoch=11, seed=0, sampling=sampling)
        forget()
        found["epoch"] = [x[:, 0].astype(int).tolist() for x, _ in batches.take(11).as_numpy_iterator()]
        found["trained"] = forget()
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Input([1]), keras.layers.Rescaling(0.01), keras.layers.Dense(3)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), loss=loss)
        model.fit(batches, epochs=2, steps_per_epoch=11, verbose=0, shuffle=False, callbacks=hvd.callbacks.standard())
        found["weights"] = model.get_weights()
        found["tokens"] = learn_tokens(opened(text_path), 20, hvd.rank(), hvd.size(), hvd.adapt)
    finally:
        arrow_files.PartedTable.read = whole
    return found


def test_ranks_read_their_row_groups_and_train_like_one(ranks, tmp_path):
    values, words = np.arange(165), ["sun", "rain", "fog", "ice", "hail"]
    table = pyarrow.table({"n": values.astype(float), "label": values // 60})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=15)
    texts = pyarrow.table({"text": [f"{words[n % 5]} {words[n % 3]}!" for n in values], "label": values % 2})
    pyarrow.parquet.write_table(texts, tmp_path / "texts.parquet", row_group_size=15)
    paths = {"path": str(tmp_path / "x.parquet"), "text_path": str(tmp_path / "texts.parquet")}
    (alone,) = ranks(1, train_on_parts, **paths, shares=2)
    both = ranks(2, train_on_parts, **paths, shares=2)
    assert alone["surveyed"] == list(range(11))
    assert [found["surveyed"] for found in both] == [list(range(5)), list(range(5, 11))]
    assert both[0]["trained"] == list(range(6))
    assert both[1]["trained"] == list(range(5, 11)), "the part in the middle has examples of both"
    steps = [sum(examples, []) for examples in zip(*(found["epoch"] for found in both), strict=True)]
    assert steps == alone["epoch"], "each global batch is that of one process"
    assert len(set(sum(steps, []))) == 11 * 12, "each example once"
    for found in both:
        assert found["standardization"] == alone["standardization"], "bit for bit"
        assert found["tokens"] == alone["tokens"]
        for ours, theirs in zip(found["weights"], alone["weights"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_main_job_trains_on_row_groups(train, tmp_path):
    values = np.arange(300)
    columns = {"n": values / 100, "sign": np.where(values % 2, "odd", "even"), "label": (values // 100) % 3}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet", row_group_size=40)
    flags = ["--model=tabular_mlp", "--dataset=x.parquet", "--cache-gb=0", "--local-batch=9", "--eval-every=1"]
    results = {}
    for number, strategy in ((2, ["--strategy=horovod"]), (0, ["--strategy=single", "--replicas=2"])):
        ended = train(number, *flags, *strategy, f"--workdir={number}", "--epochs=4", "--no-tensorboard")
        assert ended.code == 0, ended.output
        results[number] = json.loads((tmp_path / str(number) / "result.json").read_text())
    assert results[2]["train_loss"] == pytest.approx(results[0]["train_loss"], rel=1e-4)
    assert results[2]["test_loss"] == pytest.approx(results[0]["test_loss"], rel=1e-4)
    assert results[2]["test_accuracy"] > 0.6


@pytest.mark.slow
def test_the_main_job_trains_on_measured_values_and_goes_on(train, tmp_path):
    write_table(tmp_path / "houses.csv")
    flags = ["--model=tabular_mlp", "--dataset=houses.csv", "--task=regression", "--label-column=price"]
    flags += ["--feature-columns=area,age,city,floors", "--global-batch=8", "--learning-rate=0.02", "--eval-every=5"]
    flags += ["--lr-schedule=constant", "--keep-best=1", "--no-tensorboard"]
    for epochs in (15, 30):
        ended = train(2, *flags, "--workdir=run", f"--epochs={epochs}")
        assert ended.code == 0, ended.output
    assert "2 replica(s): test mean absolute error " in ended.output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert not any("accuracy" in name for name in result)
    assert result["test_r2_score"] > 0.95
    history = list(csv.DictReader((tmp_path / "run" / "history.csv").open()))
    assert len(history) == 30, "the second run went on"
    assert float(history[-1]["val_mean_absolute_error"]) == pytest.approx(result["validation_mean_absolute_error"])
    names = json.loads((tmp_path / "run" / "features.json").read_text())
    assert names == {"features": ["area", "age", "city=a", "city=b", "floors"], "labels": ["price"]}
    model = keras.models.load_model(tmp_path / "run" / "model.keras")
    schema = Schema("regression", "price", feature_columns=("area", "age", "city", "floors"))
    source = open_source(str(tmp_path / "houses.csv"), schema=schema)
    raw, prices = source.read("test", 0, source.size("test")).batch(99).get_single_element()
    error = np.abs(model.predict(raw, verbose=0) - prices.numpy()).mean()
    assert error == pytest.approx(result["test_mean_absolute_error"], rel=1e-4)


@pytest.mark.slow
def test_the_main_job_trains_on_arrays_and_on_several_labels(train, tmp_path):
    digits = open_source("digits")
    arrays = {}
    for split in digits.splits:
        images, labels = digits.read(split, 0, digits.size(split)).batch(2000).get_single_element()
        arrays |= {f"x_{split}": images.numpy()[..., 0], f"y_{split}": labels.numpy().astype("uint8")}
    np.savez(tmp_path / "digits.npz", **arrays)
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        rows = [("a dull film", "bad"), ("a brilliant, long film", "good|long"), ("a film", ""), ("long", "long")] * 20
        csv.writer(file).writerows([("text", "labels"), *rows])
    runs = {
        "digits.npz": ["--cache-gb=0", "--epochs=2"],  # read again in each epoch
        "reviews.csv": ["--model=text_classifier", "--task=multilabel", "--learning-rate=0.02", "--local-batch=4"],
    }
    results = {}
    for dataset, flags in runs.items():
        ended = train(2, f"--dataset={dataset}", f"--workdir={dataset}.run", "--no-tensorboard", *flags)
        assert ended.code == 0, ended.output
        results[dataset] = json.loads((tmp_path / f"{dataset}.run" / "result.json").read_text())
    assert results["digits.npz"]["test_accuracy"] > 0.85
    assert results["reviews.csv"]["test_accuracy"] > 0.95
    assert results["reviews.csv"]["test_auc"] > 0.95
    assert "64 training examples for multilabel: bad, good, long" in ended.output
