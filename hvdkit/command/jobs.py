"""The jobs of the command `hvdkit`, grouped by purpose. Each is also `python -m hvdkit.<job>`."""

import sys
from pathlib import Path

from hvdkit.command.arguments import underscored

GROUPS = {
    "Train": {
        "train": "train a Keras model in this process: a model of models/, or your own file",
        "compress": "make a trained model smaller: quantize, prune, export; size, speed and quality in a table",
        "distill": "train a small model that also learns from a trained one; both in a table",
        "generate": "write text with a model that was trained to",
        "sweep": "search hyperparameters, cross-validate: many trainings, the best model",
    },
    "Run on several GPUs and hosts": {
        "launch": "run a command on N ranks, here or on many hosts; elastic if you like",
    },
    "Find out what is wrong": {
        "lint": "find in a Keras script what makes it wrong on many ranks",
        "doctor": "examine the hosts of a job before the job does",
        "drill": "run a training through a fault, and audit it",
        "verify_resume": "show that training resumes bit for bit after kills",
    },
    "Measure and plan": {
        "bench": "throughput, collectives, scaling, other frameworks, time to accuracy",
        "compare": "one task under each parallelism strategy, side by side",
        "plan": "predict how training scales, and what to use",
    },
}
JOBS = {name: summary for jobs in GROUPS.values() for name, summary in jobs.items()}


def run(job: str, arguments: list[str]) -> int:
    """Run a job as `python -m hvdkit.JOB ARGUMENTS` does. A job that exits the process sets the exit code."""
    # `python -m` puts the current folder on sys.path; a script does not. A user's model may import modules from there.
    import runpy

    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path and not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, here)
    sys.argv = ["", *arguments]
    runpy.run_module(f"hvdkit.{job}", run_name="__main__", alter_sys=True)
    return 0


def named(name: str) -> str | None:
    """Return the job with this name, spelled with dashes or underscores; None if there is none."""
    return underscored(name) if underscored(name) in JOBS else None


def nearest(name: str) -> str | None:
    """Return the job with the most similar name; None if no name is similar."""
    import difflib

    return next(iter(difflib.get_close_matches(underscored(name), JOBS, n=1, cutoff=0.5)), None)
