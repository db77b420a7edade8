"""Searches hyperparameters: trains many models in parallel on the given hosts, and keeps the best. See `options`."""

import fcntl
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hvdkit import outcome, reporting, versions
from hvdkit.errors import UsageError
from hvdkit.sweep import hosts, options, space
from hvdkit.sweep.options import Options
from hvdkit.sweep.options import parser as parser


def main(argv: list[str]) -> int:
    """Run the sweep and return the exit code."""
    try:
        chosen = options.parse(argv)
        with _own_folder(chosen):
            return _sweep(chosen)
    except UsageError as error:
        options.print_error(error)
        return outcome.USAGE


def _sweep(chosen: Options) -> int:
    # Import these after parsing: they import Optuna, which takes a second, and usage errors should appear at once.
    from hvdkit.sweep import show
    from hvdkit.sweep.coordinator import Coordinator
    from hvdkit.sweep.study import Study

    screen = show.Screen(chosen)
    began = time.monotonic()
    study = Study(chosen)
    coordinator = Coordinator(chosen, study, screen.say)

    def stop(number: int, _: Any) -> None:
        coordinator.stopped_by = coordinator.stopped_by or number

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        coordinator.prepare()
        screen.say(f"{coordinator.number} trial(s) on {hosts.words(coordinator.hosts)}")
        with screen.live(coordinator) as draw:
            code = coordinator.run(draw)
    finally:
        coordinator.close()
    seconds = time.monotonic() - began
    return _report(chosen, study, code, seconds, show.final_table(study.trials(), chosen))


def _report(chosen: Options, study: Any, code: int, seconds: float, table: str) -> int:
    print(table)
    best = study.best()
    trials = study.trials()
    plots = study.plot(chosen.folder)
    reporting.write_json(
        chosen.folder / "result.json",
        {
            "goal": chosen.goal,
            "direction": chosen.direction,
            "best": vars(best) if best else None,
            "trials": [vars(trial) for trial in trials],
            "seconds": round(seconds, 2),
            "is_over": code == 0,
            "versions": versions.installed(),
        },
    )
    if best:
        print(f"\nbest: trial {best.number}, {chosen.goal} {best.value:.4f}, {space.words(best.values)}")
    kept = [name for name in ("best/model.keras", "result.json", *plots) if (chosen.folder / name).exists()]
    print(f"written to {chosen.folder} in {seconds:.1f} s: {', '.join(kept)}")
    if code:
        print("The same command goes on with this sweep.")
    return code or (0 if best else 1)


@contextmanager
def _own_folder(chosen: Options) -> Iterator[None]:
    """Create the sweep's folder and lock it against other sweeps.

    Raises:
        UsageError: the folder cannot be written to, is in use, or contains another sweep or a training's run.
    """
    folder, identity = chosen.folder, chosen.identity()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UsageError(
            f"The workdir {folder} cannot be written to ({error.strerror}). Choose another with --workdir=DIR."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"A sweep is running in {folder}. Wait for it, or choose another --workdir=DIR.") from None
        _refuse_another(folder, identity)
        reporting.write_json(folder / "sweep.json", identity)
        yield


def _refuse_another(folder: Path, identity: dict[str, Any]) -> None:
    if (folder / "sweep.json").exists():
        there = json.loads((folder / "sweep.json").read_text())
        differing = [name for name in identity if there.get(name) != json.loads(json.dumps(identity[name]))]
        if differing:
            raise UsageError(
                f"The workdir {folder} has another sweep: its {', '.join(differing)} differ. Give the same search "
                f"and flags to go on with it, or choose another --workdir=DIR."
            )
    elif (folder / "result.json").exists():
        raise UsageError(f"The workdir {folder} has a training's run, not a sweep. Choose another with --workdir=DIR.")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
