"""What a run leaves behind: its folder, its logs, its results and its curves. Each file is whole, or not there."""

import csv
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdkit.errors import UsageError
from hvdkit.world.ranks import World


def clear(workdir: Path, *, keep: Sequence[str] = ()) -> None:
    """Removes what an earlier run has left in the folder, so that nothing of it passes for this run's.

    Args:
        workdir: the run's folder.
        keep: folders in it that stay.
    """
    for name in (
        "result.json",
        "config.json",
        "model.keras",
        "curves.png",
        "loss.csv",
        "history.csv",
        "vocabulary.txt",
    ):
        (workdir / name).unlink(missing_ok=True)
    for name in {"tensorboard", "checkpoints"} - set(keep):
        shutil.rmtree(workdir / name, ignore_errors=True)


def make_workdir(path: Path, *, overwrite: bool, begin_anew: bool) -> None:
    """Makes the run's folder on this host and sees that it can be written to.

    Args:
        path: the folder.
        overwrite: whether an earlier run may be replaced.
        begin_anew: a run that was interrupted is not gone on with.

    Raises:
        UsageError: it cannot, or it has a run that would be lost, and `overwrite` is off.
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
            f"The workdir {path} has a finished run. Choose another with --workdir=DIR, or replace it with --overwrite."
        )
    if begin_anew and not overwrite and (path / "checkpoints").exists():
        raise UsageError(
            f"The workdir {path} has the checkpoints of an interrupted run, and --resume=never would lose them. "
            f"Leave --resume out to go on with that run, choose another --workdir=DIR, or add --overwrite."
        )


def log_to(path: Path, world: World, *, append: bool = False) -> None:
    """Sends this rank's log to `path/logs/rank-NNNN.log`, instead of where it went before; rank 0 also shows it.

    Where the launcher keeps what each rank prints in the same file, the log is printed, and nobody else writes there.

    Args:
        path: the run's folder.
        world: which rank this is.
        append: keep what is in the file.
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
    """Saves a Keras model aside and renames it. It opens in plain Keras."""
    aside = path.with_name(f".{path.stem}.{os.getpid()}.keras")
    try:
        model.save(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def plot_curves(
    workdir: Path, history: Mapping[str, Sequence[float]], steps_per_epoch: int, eval_every: int, title: str
) -> None:
    """Draws `curves.png`: each metric by epoch, training and test in one panel, and the loss by step behind it.

    Args:
        workdir: the run's folder; `loss.csv` is read there, if a step was taken.
        history: what `fit` returned, by metric.
        steps_per_epoch: puts the steps on the epochs' axis.
        eval_every: epochs between two evaluations on the test split.
        title: the figure's.
    """
    import matplotlib.figure  # the figure alone: no window system, no global state

    names = [n for n in history if not n.startswith("val_")]
    figure = matplotlib.figure.Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    by_step = []
    if (workdir / "loss.csv").exists():
        with (workdir / "loss.csv").open(encoding="utf-8") as file:
            by_step = [(int(row["step"]) / steps_per_epoch, float(row["loss"])) for row in csv.DictReader(file)]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        if name == "loss" and by_step:
            axes.plot(*zip(*by_step, strict=True), linewidth=0.6, alpha=0.5, color="gray", label="by step, rank 0")
        for key, label, every in ((name, "training", 1), (f"val_{name}", "test", eval_every)):
            if key in history:
                epochs = [every * (place + 1) for place in range(len(history[key]))]
                axes.plot(epochs, history[key], marker="o", markersize=3, label=label)
        axes.set(xlabel="epoch", title=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(workdir / "curves.png", dpi=120)
