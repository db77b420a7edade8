"""The main job as users run it: its numbers, its artefacts, and its answers to bad input."""

import csv
import json
import re
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from hvdkit.data.sources import open_source

USER_MODELS = """
import keras

def plain(num_classes):
    return keras.Sequential([
        keras.layers.Input([8, 8, 1]), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(),
        keras.layers.Dense(num_classes, activation="softmax"),
    ])

def compiled():
    model = plain(10)
    model.compile(keras.optimizers.Adam(1e-2), loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
"""


def result_of(workdir):
    return json.loads((workdir / "result.json").read_text())


@pytest.mark.parametrize(
    "others", [["single"], pytest.param(["mirrored", "multiworker"], marks=pytest.mark.slow)], ids="+".join
)
def test_all_strategies_train_the_same_model(train, tmp_path, others):
    results, weights = {}, {}
    for name in ("horovod", *others):
        ranks, flags = (0, ["--replicas=2"]) if name in ("mirrored", "single") else (2, [])
        workdir = tmp_path / name
        ended = train(
            ranks, f"--strategy={name}", f"--workdir={workdir}", "--warmup_epochs=1", "--eval_every=1", *flags
        )
        assert ended.code == 0, ended.output
        results[name] = result_of(workdir)
        weights[name] = keras.models.load_model(workdir / "model.keras").get_weights()
        history = list(csv.DictReader((workdir / "history.csv").open()))
        assert float(history[-1]["val_loss"]) == pytest.approx(results[name]["validation_loss"], rel=1e-5)
        assert results[name]["validation_loss"] != results[name]["test_loss"]
    for name in others:
        for ours, theirs in zip(weights["horovod"], weights[name], strict=True):
            assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs), name
        for split in ("validation", "test"):
            loss = f"{split}_loss"
            assert results[name][loss] == pytest.approx(results["horovod"][loss], rel=1e-5)
        assert results[name]["test_accuracy"] == results["horovod"]["test_accuracy"] > 0.9


def test_a_run_leaves_everything_behind(train, tmp_path):
    workdir = tmp_path / "run"
    ended = train(2, f"--workdir={workdir}", "--steps=66", "--compression=bf16")
    assert ended.code == 0, ended.output
    result = result_of(workdir)
    assert list(result) == [
        "model",
        "dataset",
        "strategy",
        "size",
        "global_batch",
        "epochs",
        "steps",
        "train_seconds",
        "samples_per_second",
        "wire_bytes_per_step",
        "dense_wire_bytes_per_step",
        "main_metric",
        "test_accuracy",
        "test_loss",
        "test_balanced_accuracy",
        "test_classes",
        "train_loss",
        "weights_sha256",
        "versions",
    ]
    assert (result["size"], result["global_batch"], result["steps"], result["epochs"]) == (2, 32, 66, 2)
    steps = [int(row["step"]) for row in csv.DictReader((workdir / "loss.csv").open())]
    assert steps[-1] == 66
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").rglob("events.*"))
    assert json.loads((workdir / "config.json").read_text())["compression"] == "bf16"
    for rank in range(2):
        assert f"rank {rank}@" in (workdir / "logs" / f"rank-000{rank}.log").read_text()
    assert "epoch 2/2: accuracy=" in ended.output
    # TensorFlow itself logs an error on each rank if bfloat16 is slow on this processor (without AVX-512).
    assert not re.search(r"^\[1\] (?!E\d{4} )", ended.output, re.MULTILINE), "only rank 0 shows anything"


@pytest.mark.parametrize(
    ("function", "flags"), [("compiled", []), pytest.param("plain", ["--learning_rate=0.01"], marks=pytest.mark.slow)]
)
def test_a_users_own_models(train, tmp_path, function, flags):
    (tmp_path / "mine.py").write_text(USER_MODELS)
    ended = train(2, f"--model=mine.py:{function}", "--workdir=w", "--epochs=3", "--global_batch=32", *flags)
    assert ended.code == 0, ended.output
    assert result_of(tmp_path / "w")["test_accuracy"] > 0.5


@pytest.mark.slow
def test_a_finished_run_is_extended(train, tmp_path):
    whole, extended = tmp_path / "whole", tmp_path / "extended"
    for workdir, epochs in ((extended, 1), (extended, 2), (whole, 2)):
        ended = train(2, f"--workdir={workdir}", f"--epochs={epochs}", "--lr-schedule=constant", "--notensorboard")
        assert ended.code == 0, ended.output
    assert result_of(extended)["weights_sha256"] == result_of(whole)["weights_sha256"], "bit for bit"
    assert len((extended / "history.csv").read_text().splitlines()) == 1 + 2
    ended = train(2, f"--workdir={extended}", "--epochs=2", "--notensorboard")
    assert ended.code == 2
    assert "has a finished run" in ended.output


@pytest.mark.slow
def test_an_image_that_breaks_in_the_middle_ends_all_ranks_in_one_sentence(train, tmp_path):
    """The first 1,000 of each rank's share are looked at before training, and this one is behind them."""
    generator = np.random.default_rng(0)
    for place in range(2600):
        path = tmp_path / "images" / str(place % 2) / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=[8, 8, 3], dtype=np.uint8)).save(path)
    broken = Path(open_source(str(tmp_path / "images")).locate("train", 2070))
    broken.write_bytes(broken.read_bytes()[:60])
    named = broken.relative_to(tmp_path)
    flags = ["--model=mnist_mlp", "--dataset=./images", "--cache-gb=0", "--validation=no", "--notensorboard"]
    ended = train(2, *flags, "--workdir=w", "--epochs=2")
    assert ended.code == 2, ended.output
    assert ended.output.count(f"1 example(s) of split 'train' cannot be read: {named} (Invalid PNG data") == 1, (
        ended.output
    )
    assert "rank 1 on host" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.slow
def test_texts_with_imbalanced_classes(train, tmp_path):
    rows = [("a dull and tedious film", "neg")] * 60 + [("a moving, brilliant film", "pos")] * 20
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    ended = train(
        3,
        "--model=text_classifier",
        "--dataset=reviews.csv",
        "--workdir=w",
        "--local_batch=4",
        "--epochs=8",
        "--learning_rate=0.01",
        "--sampling=under",
        "--class_weights",
        "--precision=mixed_bfloat16",
    )
    assert ended.code == 0, ended.output
    assert "neg 48, pos 16" in ended.output
    assert "class weights: 0.667, 2" in ended.output
    assert result_of(tmp_path / "w")["test_accuracy"] == 1.0
    assert "brilliant" in (tmp_path / "w" / "vocabulary.txt").read_text()


def bad_labels(root):
    """A prepared TFDS directory whose description promises fewer classes than its labels have."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(8, 8, 1)), "label": tfds.features.ClassLabel(num_classes=5)}
    )
    columns = {"image": np.zeros([20, 8, 8, 1], np.uint8), "label": np.arange(20) % 5}
    examples = tf.data.Dataset.from_tensor_slices(columns)
    tfds.dataset_builders.store_as_tfds_dataset(
        name="strange", version="1.0.0", features=features, data_dir=str(root), split_datasets={"train": examples}
    )
    path = next(root.glob("strange/**/features.json"))
    path.write_text(path.read_text().replace('"numClasses": "5"', '"numClasses": "3"'))
    for labels in root.glob("strange/**/label.labels.txt"):
        labels.write_text("0\n1\n2\n")
    return "strange"


BAD_INPUT = {
    "an unknown model": (["--model=lenet"], "There is no model 'lenet'"),
    "an unwritable workdir": (["--workdir=/proc/run"], "The workdir /proc/run cannot be written to"),
    "a batch that cannot be divided": (["--global_batch=33"], "cannot be divided evenly over 2 replicas"),
    "a dataset that is not there": (["--dataset=mnist", "--data_dir=."], "The data set 'mnist' is not in"),
    "more ranks than samples": (["--dataset=synthetic:8x8x1:2:1"], "fewer than 2 replicas"),
    "a batch larger than the data": (["--global_batch=4096"], "A local batch of 2048 is larger than a share of 718"),
    "an unknown flag": (["--batchsize=3"], "Unknown command line flag 'batchsize'"),
    "a strategy for one process": (["--strategy=mirrored"], "trains in one process, but 2 were started"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_sentence_on_all_ranks(train, case):
    flags, message = BAD_INPUT[case]
    ended = train(2, *flags, timeout=120)
    assert ended.code == 2, ended.output
    sentences = [line for line in ended.output.splitlines() if line.startswith("hvdkit.train: ")]
    assert len(sentences) == 1
    assert message in sentences[0]
    assert "Traceback" not in ended.output


def test_labels_out_of_range_end_the_job_on_all_ranks(train, tmp_path):
    name = bad_labels(tmp_path)
    ended = train(2, f"--dataset={name}", f"--data_dir={tmp_path}", "--local_batch=2", timeout=120)
    assert ended.code == 2, ended.output
    assert "Labels out of range: " in ended.output
    assert "3 classes need labels 0 to 2" in ended.output
    assert "Traceback" not in ended.output


def test_one_ranks_mistake_is_everyones(train, tmp_path):
    """A model file that is there for rank 0 alone, as on a host without the shared folder."""
    (tmp_path / "mine.py").write_text(
        "import os\nif os.environ['HOROVOD_RANK'] == '1':\n    raise FileNotFoundError('weights.h5')\n" + USER_MODELS
    )
    ended = train(2, "--model=mine.py:plain", "--workdir=w", timeout=120)
    assert ended.code == 2, ended.output
    assert "mine.py cannot be imported: FileNotFoundError: weights.h5" in ended.output
    assert not (tmp_path / "w" / "result.json").exists()
    shutil.rmtree(tmp_path / "w", ignore_errors=True)
