"""What the comparison asks of the planner, and what it repeats of the answer."""

import pytest

from hvdkit.bench import jobs
from hvdkit.compare.__main__ import recommend, table
from hvdkit.errors import UsageError

ROW = {"global_batch": 64}


@pytest.fixture
def asked(monkeypatch):
    """The planner's command lines, each of which is answered with a table and an advice."""
    commands = []
    monkeypatch.setattr(jobs, "run", lambda command, **_: commands.append(command) or "ranks\n1\n\nUse 2 ranks.\n")
    return commands


def test_the_planner_gets_the_task_without_its_length(asked):
    flags = ["--model=m", "--steps=20", "--epochs", "3", "--global_batch=64", "--optimizer", "sgd"]
    assert recommend(4, ROW, flags) == "Use 2 ranks."
    ((*_, module, _, ranks, _, per_host, _, batch, _, model, name, optimizer),) = asked
    assert (module, ranks, per_host, batch) == ("hvdkit.plan", "1,4", "4", "16")
    assert (model, name, optimizer) == ("--model=m", "--optimizer", "sgd")


def test_a_planner_that_fails_does_not_end_the_comparison(monkeypatch):
    def fail(command, **_):
        raise UsageError("no such model")

    monkeypatch.setattr(jobs, "run", fail)
    assert recommend(2, ROW, []) == "nothing, because it failed: no such model"


def test_the_table_has_the_metric_of_the_task():
    row = {"way": "single", "ranks": 1, "samples_per_second": 9.0, "train_seconds": 1.0, "core_percent": [50]}
    row |= {"peak_bytes": [2**20], "sent_bytes_per_step": 0, "test_loss": 0.5}
    for metrics, head, cell in (
        ({"main_metric": "accuracy", "test_accuracy": 0.75}, "test accuracy", "75.00%"),
        ({"main_metric": "accuracy", "test_accuracy": None}, "test accuracy", "unknown"),
        ({"main_metric": "mean_absolute_error", "test_mean_absolute_error": 1.25}, "test mean absolute error", "1.25"),
        ({"main_metric": "iou", "test_iou": 0.5, "test_accuracy": 0.25}, "test iou", "0.5"),
    ):
        found = table({"rows": [{**row, **metrics}]})
        assert head in found
        assert cell in found
