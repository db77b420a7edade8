"""`hvdkit distill`: the training that it starts, and its table."""

import json
import sys

import pytest

from hvdkit.distill import __main__ as distill


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """What the launcher is given; the training ends at once, with this result."""
    given = []
    result = {"main_metric": "accuracy", "parameters": 1210, "test_loss": 0.25, "test_accuracy": 0.9}
    result["teacher"] = {"parameters": 17226, "test_loss": 0.125, "test_accuracy": 0.95}

    def launch(arguments):
        given.append(arguments)
        (workdir,) = (flag.partition("=")[2] for flag in arguments.command if flag.startswith("--workdir="))
        (tmp_path / workdir).mkdir(parents=True)
        (tmp_path / workdir / "result.json").write_text(json.dumps(result))
        return 0

    monkeypatch.setattr(distill, "launch", launch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.keras").touch()
    (tmp_path / "config.json").write_text(json.dumps({"dataset": "mnist", "data_dir": "here"}))
    return given


def test_the_student_is_trained_on_the_teachers_data_and_both_are_shown(launched, capsys):
    assert distill.main(["", "--teacher=.", "-np", "3", "--model=mnist_mlp", "--local-batch=4"]) == 0
    (arguments,) = launched
    assert arguments.np == 3
    assert arguments.command[:3] == [sys.executable, "-m", "hvdkit.train"]
    *flags, workdir = arguments.command[3:]
    assert sorted(flags) == [
        "--data_dir=here",
        "--dataset=mnist",
        "--local_batch=4",
        "--model=mnist_mlp",
        "--teacher=.",
    ]
    assert workdir.startswith("--workdir=runs/mnist_mlp-distilled-")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[2:] == [["teacher", "17,226", "0.1250", "0.9500"], ["student", "1,210", "0.2500", "0.9000"]]


def test_a_training_that_fails_has_no_table(launched, monkeypatch, capsys):
    monkeypatch.setattr(distill, "launch", lambda arguments: 85)
    assert distill.main(["", "--teacher=.", "--workdir=w"]) == 85
    assert capsys.readouterr().out == ""
