"""`imbalance`: what weights, resampling and losses for rare classes do to the accuracy of each class."""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from hvdkit import reporting
from hvdkit.bench import jobs
from hvdkit.errors import UsageError
from hvdkit.train import flags as train_flags
from hvdkit.train.settings import Config

REMEDIES = {
    "none": [],
    "class weights": ["--class-weights"],
    "over-sampling": ["--sampling=over"],
    "under-sampling": ["--sampling=under"],
    "focal loss": ["--focal=2"],
    "effective number": ["--effective-number=0.999"],
    "effective number, focal loss": ["--effective-number=0.999", "--focal=2"],
}
"""What is compared, and the flags of hvdkit.train for it."""

_METRICS = ("accuracy", "balanced_accuracy", "worst_class")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("-np", type=int, default=2, metavar="N", help="ranks of each training [2]")
    parser.add_argument(
        "flags",
        nargs="*",
        help="after --: flags of hvdkit.train, among them --steps, since resampling changes the length of an epoch",
    )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train with each remedy in turn, once per round, each round with another seed."""
    if arguments.np < 1:
        raise UsageError(f"-np {arguments.np}: at least one rank is needed.")
    _check(train_flags.parse(["hvdkit.bench", *arguments.flags]))
    runs: dict[str, list[dict[str, float]]] = {remedy: [] for remedy in REMEDIES}
    for seed in range(arguments.rounds):
        for remedy, flags in REMEDIES.items():
            runs[remedy].append(_train(arguments.np, [f"--seed={seed}", *arguments.flags, *flags]))
            print(f"{remedy}: {runs[remedy][-1]}", file=sys.stderr, flush=True)
    return {"rows": [{"remedy": remedy, "runs": found, **_summary(found)} for remedy, found in runs.items()]}


def _check(config: Config) -> None:
    if config.steps is None:
        raise UsageError(
            "An epoch of resampled data is longer, or shorter. Give all trainings the same steps: -- --steps=1000."
        )
    if config.class_weights or config.sampling != "none" or config.focal or config.effective_number:
        raise UsageError(
            "This command gives --class-weights, --sampling, --focal and --effective-number itself, in turn. Leave "
            "them out."
        )


def _train(ranks: int, flags: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder, "run")
        fixed = ["--checkpoint_every=never", "--notensorboard", f"--workdir={workdir}"]
        program = [sys.executable, "-m", "hvdkit.train", *fixed, *flags]
        jobs.run([sys.executable, "-m", "hvdkit.launch", "-np", str(ranks), "--", *program])
        result = json.loads((workdir / "result.json").read_text())
    if "test_classes" not in result:
        raise UsageError(
            "The results by class are not counted for these flags. Give data with classes, and leave --strategy out."
        )
    recalls = [found["recall"] for found in result["test_classes"].values() if found["recall"] is not None]
    return {
        "accuracy": result["test_accuracy"],
        "balanced_accuracy": result["test_balanced_accuracy"],
        "worst_class": min(recalls),
    }


def _summary(runs: list[dict[str, float]]) -> dict[str, float]:
    return {metric: statistics.median(run[metric] for run in runs) for metric in _METRICS}


def report(found: dict[str, Any]) -> str:
    """Format the results as a table."""
    rows = [[row["remedy"], *(f"{row[metric]:.1%}" for metric in _METRICS)] for row in found["rows"]]
    return reporting.table(["remedy", "test accuracy", "balanced accuracy", "worst class"], rows)


def lines(found: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Return the points to plot: balanced accuracy by round, for each remedy."""
    return {
        row["remedy"]: [(i + 1, run["balanced_accuracy"]) for i, run in enumerate(row["runs"])] for row in found["rows"]
    }


AXES = ("round", "balanced accuracy")
