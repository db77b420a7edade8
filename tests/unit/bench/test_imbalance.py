"""`hvdkit bench imbalance`: what it trains, and what its table says."""

import json
from pathlib import Path

import pytest

from hvdkit.bench import __main__ as command
from hvdkit.bench import imbalance
from hvdkit.errors import UsageError

RECALLS = {"--class-weights": (0.9, 0.8), "--sampling=under": (0.7, 0.7)}  # of two classes, by the last flag


@pytest.fixture
def trained(monkeypatch):
    """The command lines of the trainings, which write a result at once."""
    lines = []

    def run(line):
        lines.append(line)
        (workdir,) = (flag.partition("=")[2] for flag in line if flag.startswith("--workdir="))
        recalls = RECALLS.get(line[-1], (1.0, 0.2))
        classes = {str(c): {"recall": recall} for c, recall in enumerate((*recalls, None))}
        result = {"test_accuracy": recalls[0], "test_balanced_accuracy": sum(recalls) / 2, "test_classes": classes}
        Path(workdir).mkdir()
        Path(workdir, "result.json").write_text(json.dumps(result))

    monkeypatch.setattr(imbalance.jobs, "run", run)
    return lines


def test_each_remedy_is_trained_with_each_seed_and_the_worst_class_is_shown(trained, capsys):
    assert command.main(["", "imbalance", "-np", "3", "--rounds", "2", "--", "--steps=5", "--long-tail=9"]) == 0
    assert len(trained) == 2 * len(imbalance.REMEDIES)
    assert {line[line.index("-np") + 1] for line in trained} == {"3"}
    assert [flag for flag in trained[-1] if flag.startswith("--seed")] == ["--seed=1"]
    assert trained[-1][-4:] == ["--steps=5", "--long-tail=9", "--effective-number=0.999", "--focal=2"]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["none", "100.0%", "60.0%", "20.0%"] in rows
    assert ["class", "weights", "90.0%", "85.0%", "80.0%"] in rows
    assert ["under-sampling", "70.0%", "70.0%", "70.0%"] in rows


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Give all trainings the same steps: -- --steps=1000"),
        (["--steps=9", "--focal=1"], "gives --class-weights, --sampling, --focal and --effective-number itself"),
    ],
)
def test_what_would_not_compare_is_refused(trained, flags, message):
    arguments = command.parser().parse_args(["imbalance", "--", *flags])
    with pytest.raises(UsageError, match=message):
        imbalance.measure(arguments)
    assert not trained
