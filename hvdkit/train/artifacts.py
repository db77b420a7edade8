"""The output of a run: its folder, logs, results and curves. Results and models are written atomically."""

import csv
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdkit.errors import UsageError
from hvdkit.train.settings import Settings
from hvdkit.world.ranks import World


def clear(workdir: Path, *, keep: Sequence[str] = ()) -> None:
    """Removes an earlier run's output from the folder, so that it is not mistaken for this run's.

    Args:
        workdir: the run's folder.
        keep: folders in it to keep.
    """
    for name in (
        "result.json",
        "config.json",
        "model.keras",
        "curves.png",
        "loss.csv",
        "history.csv",
        "vocabulary.txt",
        "features.json",
    ):
        (workdir / name).unlink(missing_ok=True)
    for name in {"tensorboard", "checkpoints"} - set(keep):
        shutil.rmtree(workdir / name, ignore_errors=True)


def make_workdir(path: Path, *, overwrite: bool, begin_anew: bool) -> None:
    """Creates the run's folder on this host and checks that it is writable.

    Args:
        path: the folder.
        overwrite: whether an earlier run may be replaced.
        begin_anew: whether to start from the beginning although an interrupted run could be resumed.

    Raises:
        UsageError: it is not writable, or it has a run that would be lost and `overwrite` is off.
    """
    try:
        (path / "logs").mkdir(parents=True, exist_ok=True)
        probe = path / "logs" / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"The workdir {path} cannot be written to ({error.strerror}). Choose another with --workdir=DIR."
        ) from None
    if (path / "result.json").exists() and not overwrite:
        raise UsageError(
            f"The workdir {path} has a finished run. Choose another with --workdir=DIR, replace it with --overwrite, "
            f"or continue it with more --epochs."
        )
    if begin_anew and not overwrite and (path / "checkpoints").exists():
        raise UsageError(
            f"The workdir {path} has the checkpoints of an interrupted run, and --resume=never would lose them. "
            f"Leave --resume out to resume that run, choose another --workdir=DIR, or add --overwrite."
        )


def log_to(path: Path, world: World, *, append: bool = False) -> None:
    """Sends this rank's log only to `path/logs/rank-NNNN.log`; rank 0 also shows it.

    If the launcher writes each rank's output to the same file, the log is printed instead, so that only the launcher
    writes to the file.

    Args:
        path: the run's folder.
        world: which rank this is.
        append: whether to keep the content of the file.
    """
    logger = logging.getLogger("hvdkit")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    launcher_keeps_it = os.environ.get("HVDKIT_RANK_LOGS") == str((path / "logs").resolve())
    if not (launcher_keeps_it and world.is_root):
        to_file = (
            logging.StreamHandler(sys.stdout)
            if launcher_keeps_it
            else logging.FileHandler(
                path / "logs" / f"rank-{world.rank:04d}.log", mode="a" if append else "w", encoding="utf-8"
            )
        )
        to_file.setFormatter(
            logging.Formatter(f"%(asctime)s %(levelname)s rank {world.rank}@{world.host} %(name)s: %(message)s")
        )
        logger.addHandler(to_file)
    if world.is_root:
        to_screen = logging.StreamHandler()
        to_screen.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(to_screen)


def save_model(model: Any, path: Path) -> None:
    """Saves a Keras model under a temporary name, then renames it. The file opens in plain Keras."""
    aside = path.with_name(f".{path.stem}.{os.getpid()}.keras")
    try:
        model.save(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def plot_curves(
    workdir: Path, history: Mapping[str, Sequence[float]], steps_per_epoch: int, settings: Settings, title: str
) -> None:
    """Draws `curves.png`: one panel for each metric, training and validation by epoch; for the loss also each step.

    Args:
        workdir: the run's folder; its `loss.csv` is used if it exists.
        history: values by metric, as `fit` returns them.
        steps_per_epoch: converts steps to epochs for the x axis.
        settings: they say after how many epochs the model was evaluated, and on which split.
        title: the figure's title.
    """
    import matplotlib.figure  # not pyplot, which needs a window system and has global state

    names = [n for n in history if not n.startswith("val_")]
    figure = matplotlib.figure.Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    by_step = []
    if (workdir / "loss.csv").exists():
        with (workdir / "loss.csv").open(encoding="utf-8") as file:
            by_step = [(int(row["step"]) / steps_per_epoch, float(row["loss"])) for row in csv.DictReader(file)]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        if name == "loss" and by_step:
            axes.plot(*zip(*by_step, strict=True), linewidth=0.6, alpha=0.5, color="gray", label="by step, rank 0")
        judged = "validation" if settings.validates else "test"
        for key, label, every in ((name, "training", 1), (f"val_{name}", judged, settings.eval_every)):
            if key in history:
                epochs = [every * (place + 1) for place in range(len(history[key]))]
                axes.plot(epochs, history[key], marker="o", markersize=3, label=label)
        axes.set(xlabel="epoch", title=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(workdir / "curves.png", dpi=120)
