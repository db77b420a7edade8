"""Each recipe's claim, checked through the script that a user runs, with two ranks on the real data."""

import csv
import json

import hvdkit_models
import numpy as np
import pytest

from tests.conftest import ROOT, run_command

CLAIMS = [
    (name, r)
    for name in hvdkit_models.names()
    for r in hvdkit_models.load(name).RECIPES
    if r.accuracy or r.bits_per_byte or r.metrics
]


def launch(*flags, timeout=900):
    ended = run_command([ROOT / "launch" / "local.sh", "-np", 2, *flags], timeout=timeout)
    assert ended.code == 0, ended.output


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.recipe
@pytest.mark.shared_data
@pytest.mark.parametrize(("model", "recipe"), CLAIMS, ids=[f"{name} on {r.dataset}" for name, r in CLAIMS])
def test_a_recipe_reaches_its_accuracy(shared_data, tmp_path, model, recipe):
    launch(f"--model={model}", f"--dataset={recipe.dataset}", f"--data_dir={shared_data}", f"--workdir={tmp_path}")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["size"], result["strategy"]) == (2, "horovod")
    assert result.get("test_accuracy", 0) >= (recipe.accuracy or 0)
    for name, least in recipe.metrics.items():
        assert result[f"test_{name}"] >= least
    assert result.get("test_bits_per_byte", 0) <= (recipe.bits_per_byte or 0)
    assert result["epochs"] <= {"cifar_cnn": 15, "mnist_mlp": 5}.get(model, 20)


def test_the_claims_are_those_of_the_project():
    claims = {(n, recipe.dataset): recipe.accuracy or recipe.bits_per_byte or recipe.metrics for n, recipe in CLAIMS}
    assert claims == {
        ("mnist_mlp", "digits"): 0.95,
        ("mnist_mlp", "mnist"): 0.975,
        ("cifar_cnn", "cifar10"): 0.64,
        ("text_classifier", "sentence_polarity"): 0.74,
        ("branch_cnn", "mnist"): 0.988,
        ("gpt", "pydoc"): 2.1,
        ("detector", "digit_scenes"): {"map_50": 0.9},
    }


@pytest.mark.slow
@pytest.mark.recipe
@pytest.mark.shared_data
def test_resnet20_learns_in_200_steps(shared_data, tmp_path):
    launch("--model=resnet", "--dataset=cifar10", f"--data_dir={shared_data}", f"--workdir={tmp_path}", "--steps=200")
    rows = [(int(r["step"]), float(r["loss"])) for r in csv.DictReader((tmp_path / "loss.csv").open())]
    first = np.mean([loss for step, loss in rows if step <= 20])
    last = np.mean([loss for step, loss in rows if step > 180])
    assert rows[-1][0] == 200
    assert last < 0.9 * first, f"the loss of the last 20 steps is {last:.3f}, that of the first 20 {first:.3f}"


@pytest.mark.slow
@pytest.mark.recipe
def test_resnet50_trains(tmp_path):
    launch(
        "--model=resnet",
        "--dataset=synthetic:224x224x3:1000:16",
        f"--workdir={tmp_path}",
        "--local_batch=2",
        "--steps=2",
        "--notensorboard",
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert 0 < result["train_loss"][0] < 20
    assert np.isfinite(result["test_loss"])
