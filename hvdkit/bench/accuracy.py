"""`accuracy`: time until a training reaches a target accuracy on the test split, including start-up and evaluation."""

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hvdkit import reporting
from hvdkit.bench import jobs
from hvdkit.errors import UsageError
from hvdkit.train import flags as train_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("--target", type=float, required=True, help="test accuracy to reach, such as 0.97")
    how = "launcher options of a case; may be repeated [-np 1, and -np 2]"
    parser.add_argument("--case", action="append", default=[], metavar="'LAUNCHER ARGS'", help=how)
    parser.add_argument("flags", nargs="*", help="after --: flags of hvdkit.train")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train each case in turn, once per round."""
    if not 0 < arguments.target < 1:
        raise UsageError(f"--target={arguments.target} is no accuracy between 0 and 1.")
    if train_flags.parse(["hvdkit.bench", *arguments.flags]).task == "regression":
        raise UsageError(
            "This command measures the time to an accuracy, which measured values do not have. Leave out "
            "--task=regression and give data with classes, or use hvdkit bench throughput."
        )
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for case in arguments.case or ["-np 1", "-np 2"]:
            found.setdefault(case, []).append(_train(case, arguments))
            print(f"{case}: {found[case][-1]}", file=sys.stderr, flush=True)
    rows = [{"case": case, "target": arguments.target, "runs": runs, **_summary(runs)} for case, runs in found.items()]
    return {"rows": rows}


def _train(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder, "run")
        flags = [
            "--eval_every=1",
            "--validation=no",
            "--checkpoint_every=never",
            "--notensorboard",
            f"--workdir={workdir}",
        ]
        program = [sys.executable, "-m", "hvdkit.train", *flags, *arguments.flags]
        began = time.perf_counter()
        jobs.run([sys.executable, "-m", "hvdkit.launch", *case.split(), "--", *program])
        everything = time.perf_counter() - began
        result = json.loads((workdir / "result.json").read_text())
        with (workdir / "history.csv").open() as file:
            history = list(csv.DictReader(file))
    if "val_accuracy" not in history[0]:
        raise UsageError("The model's own compile() has no metric named accuracy. Add one, or return it uncompiled.")
    reached = [float(row["val_accuracy"]) for row in history]
    epochs = next((i + 1 for i, value in enumerate(reached) if value >= arguments.target), None)
    share = epochs / len(reached) if epochs else None
    return {
        "epochs": epochs,
        "best": max(reached),
        "train_seconds": result["train_seconds"] * share if share else None,
        "seconds_with_start": everything - result["train_seconds"] * (1 - share) if share else None,
    }


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("epochs", "train_seconds", "seconds_with_start")
    there = {name: [run[name] for run in runs if run[name] is not None] for name in names}
    return {name: statistics.median(values) if len(values) == len(runs) else None for name, values in there.items()}


def report(found: dict[str, Any]) -> str:
    """Format the results as a table."""
    rows = [
        [row["case"], f"{row['target']:.1%}", *("not reached" if row[n] is None else f"{row[n]:.1f}" for n in _SHOWN)]
        for row in found["rows"]
    ]
    return reporting.table(["case", "target", "epochs", "s of training", "s with start-up"], rows)


_SHOWN = ("epochs", "train_seconds", "seconds_with_start")


def lines(found: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Return the points to plot: seconds of training by round, for each case."""
    return {
        row["case"]: [(i + 1, run["train_seconds"]) for i, run in enumerate(row["runs"]) if run["train_seconds"]]
        for row in found["rows"]
    }


AXES = ("round", "seconds of training")
