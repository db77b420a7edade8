"""`peers`: the same models and batch sizes with other tools, each in its own virtual environment.

The first round tries every peer with each sensible thread setting. Later rounds use the best one.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvdkit import reporting
from hvdkit.bench import jobs, statistic, workloads
from hvdkit.bench.peers import environments
from hvdkit.errors import UsageError
from hvdkit.world.devices import usable_cores

_HERE = Path(__file__).parent
OURS, SCRIPT = "hvdkit", "hvdkit_script"


def _torch(ranks: int) -> list[str]:
    python = environments.TORCH.python()
    return [str(python.with_name("torchrun")), "--standalone", f"--nproc_per_node={ranks}", str(_HERE / "torch_ddp.py")]


def _keras_2(ranks: int) -> list[str]:
    python = environments.KERAS_2.python()
    return [str(python.with_name("horovodrun")), "-np", str(ranks), str(python), str(_HERE / "keras_fit.py"), "horovod"]


def _multiworker(ranks: int) -> list[str]:
    return [str(environments.TF_KERAS.python()), str(_HERE / "keras_fit.py"), "multiworker"]


def _mirrored(ranks: int) -> list[str]:
    return [sys.executable, str(_HERE / "keras_fit.py"), "mirrored"]


def _script(ranks: int) -> list[str]:
    """hvdkit in a user's own script, with Keras' defaults."""
    launcher = [sys.executable, "-m", "hvdkit.launch", "-np", str(ranks), "--"]
    return [*launcher, sys.executable, str(_HERE / "keras_fit.py"), "hvdkit"]


def _tape(ranks: int) -> list[str]:
    launcher = shutil.which("horovodrun", path=str(Path(sys.executable).parent))
    if not launcher:
        raise UsageError("horovodrun is not beside this Python")
    return [launcher, "-np", str(ranks), "--gloo", sys.executable, str(_HERE / "tape.py")]


PEERS: dict[str, Callable[[int], list[str]]] = {
    SCRIPT: _script,
    "torch_ddp": _torch,
    "horovod_keras2": _keras_2,
    "horovod_tape": _tape,
    "mirrored": _mirrored,
    "multiworker_tf_keras": _multiworker,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("--workloads", default=",".join(workloads.WORKLOADS), help="models to train [all]")
    parser.add_argument("--peers", default=",".join(PEERS), help="tools to compare with [all]")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks or replicas [2]")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure hvdkit and every peer in turn, once per round."""
    names = [w.name for w in workloads.named(arguments.workloads)]
    commands, missing = _commands(arguments)
    best: dict[tuple[str, str], dict[str, str]] = {}
    rounds: list[dict[tuple[str, str], float]] = []
    for number in range(arguments.rounds):
        rounds.append({(OURS, name): _ours(name, arguments) for name in names})
        _tell(number, rounds[-1])
        for peer, command in list(commands.items()):
            try:
                found = (_again if number else _tune)(peer, command, names, arguments, best)
            except UsageError as error:  # keep the results of the other peers
                missing[peer] = str(error)
                del commands[peer]
                continue
            _tell(number, found)
            rounds[-1] |= found
    rows = [_row(peer, name, rounds, best) for name in names for peer in [OURS, *commands]]
    return {"ranks": arguments.ranks, "rows": rows, "missing": missing}


def _commands(arguments: argparse.Namespace) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the start command of each available peer, and the reason why others are unavailable."""
    commands, missing = {}, {}
    for peer in filter(None, arguments.peers.split(",")):
        if peer not in PEERS:
            raise UsageError(f"There is no peer {peer!r}. Choose from {', '.join(PEERS)}.")
        try:
            commands[peer] = PEERS[peer](arguments.ranks)
        except UsageError as error:
            missing[peer] = str(error)
    return commands, missing


def _ours(name: str, arguments: argparse.Namespace) -> float:
    flags = workloads.WORKLOADS[name].train_flags()
    found = jobs.train(["-np", str(arguments.ranks)], flags, arguments.seconds)
    return statistics.median(found["samples_per_second"])


def _settings(ranks: int) -> list[dict[str, str]]:
    """Return the thread settings to try: a rank's share of the cores, bound or not, and all cores."""
    share = max(1, usable_cores() // ranks)
    tried = [(share, "1"), (share, "0"), (usable_cores(), "0")]
    return [{"HVDKIT_BENCH_THREADS": str(threads), "HVDKIT_BENCH_PIN": pin} for threads, pin in tried]


def _tune(
    peer: str, command: list[str], names: list[str], arguments: argparse.Namespace, best: dict[Any, dict[str, str]]
) -> dict[tuple[str, str], float]:
    """Run a peer with every setting, store each workload's best in `best`, and return its samples per second."""
    reached: dict[tuple[str, str], float] = {}
    settings = _settings(1 if peer == "mirrored" else arguments.ranks)
    for setting in settings[:1] if peer == SCRIPT else settings:  # hvdkit chooses its threads by itself
        for name, rate in _run(command, names, setting, arguments).items():
            if rate > reached.get((peer, name), 0):
                reached[peer, name], best[peer, name] = rate, setting
    return reached


def _again(
    peer: str, command: list[str], names: list[str], arguments: argparse.Namespace, best: dict[Any, dict[str, str]]
) -> dict[tuple[str, str], float]:
    """Run a peer with each workload's best setting, and return the samples per second."""
    reached: dict[tuple[str, str], float] = {}
    for setting in _distinct(best[peer, name] for name in names):
        these = [name for name in names if best[peer, name] == setting]
        reached |= {(peer, name): rate for name, rate in _run(command, these, setting, arguments).items()}
    return reached


def _tell(number: int, found: dict[tuple[str, str], float]) -> None:
    for (peer, name), rate in found.items():
        print(f"round {number + 1}: {peer}, {name}: {rate:,.0f} samples/s", file=sys.stderr, flush=True)


def _run(
    command: list[str], names: list[str], setting: dict[str, str], arguments: argparse.Namespace
) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **setting,
            "HVDKIT_BENCH_FOLDER": folder,
            "HVDKIT_BENCH_SECONDS": str(arguments.seconds),
            "HVDKIT_BENCH_RANKS": str(arguments.ranks),
            "PYTHONPATH": "",
        }
        output = jobs.run([*command, ",".join(names)], environment)
    found = {}
    for line in output.splitlines():
        _, mark, content = line.partition("BENCH ")
        with contextlib.suppress(ValueError):
            one = json.loads(content) if mark else {}
            if one:
                found[one["workload"]] = statistics.median(one["samples_per_second"])
    lacking = set(names) - set(found)
    if lacking:
        raise UsageError(f"{' '.join(command)} told nothing of {', '.join(sorted(lacking))}:\n{output[-2000:]}")
    return found


def _row(peer: str, name: str, rounds: list[dict[tuple[str, str], float]], best: dict[Any, Any]) -> dict[str, Any]:
    theirs = [one[peer, name] for one in rounds]
    row = {"workload": name, "peer": peer, "samples_per_second": statistics.median(theirs), "rounds": theirs}
    if peer != OURS:
        row["setting"] = best[peer, name]
        row["ratio"] = statistic.ratio([one[OURS, name] for one in rounds], theirs)
    return row


def _distinct(settings: Any) -> list[dict[str, str]]:
    return [dict(items) for items in sorted({tuple(sorted(setting.items())) for setting in settings})]


def report(found: dict[str, Any]) -> str:
    """Format the results as a table."""
    rows = []
    for row in found["rows"]:
        ratio = row.get("ratio")
        told = f"{ratio['median']:.2f}" + (" (noisy)" if ratio["noisy"] else "") if ratio else ""
        setting = row.get("setting", {}) if row["peer"] != SCRIPT else {}
        threads = f"{setting['HVDKIT_BENCH_THREADS']} thread(s)" if setting else ""
        if setting.get("HVDKIT_BENCH_PIN") == "1":
            threads += ", bound"
        spread = f"{ratio['lowest']:.2f} to {ratio['highest']:.2f}" if ratio else ""
        rows.append([row["workload"], row["peer"], f"{row['samples_per_second']:,.0f}", told, spread, threads])
    heads = ["workload", "peer", "samples/s", f"{OURS}, times as fast", "lowest to highest", "its best setting"]
    notes = [f"{peer} was left out: {why}" for peer, why in found["missing"].items()]
    return "\n".join([reporting.table(heads, rows), *notes])


def lines(found: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Return the points to plot: samples per second by workload, for each peer."""
    drawn: dict[str, list[tuple[float, float]]] = {}
    for row in found["rows"]:
        points = drawn.setdefault(row["peer"], [])
        points.append((len(points) + 1, row["samples_per_second"]))
    return drawn


AXES = ("workload", "samples/s")
