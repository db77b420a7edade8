"""Trains one model with each parallelism strategy, and compares speed, memory and accuracy.

    hvdkit compare -np 2 --json found.json --plot found.png -- --model=gpt --steps=200

The strategies: one process with all cores (single), data parallelism (horovod), and a model whose tensors, branches or
layers are divided over the ranks (tensor, branches, pipeline). With a number, the model is divided over so many ranks:
`pipeline:2` on four ranks trains two replicas with different data. Strategies that do not fit the model are listed with
the reason. At the end the planner says which strategy it would have chosen.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvdkit import outcome, reporting
from hvdkit.bench import jobs
from hvdkit.command.arguments import Parser, new_file
from hvdkit.errors import UsageError
from hvdkit.train import flags as train_flags

_DIVIDING = ("tensor", "branches", "pipeline")
WAYS = ("single", "horovod", *_DIVIDING)
_LIMIT = 3600.0  # seconds for one training


def main(argv: list[str]) -> int:
    """Run the comparison, print its table and return the exit code: 2 for a usage error."""
    arguments = parser().parse_args(argv[1:])
    try:
        if arguments.number < 1:
            raise UsageError(f"-np {arguments.number}: at least one rank is needed.")
        arguments.flags = train_flags.check(arguments.flags)
        found = compare(arguments.ways.split(","), arguments.number, arguments.flags)
    except UsageError as error:
        print(f"hvdkit.compare: {error}", file=sys.stderr)
        return outcome.USAGE
    planned = None if arguments.no_plan else recommend(arguments.number, found["rows"][0], arguments.flags)
    print(table(found))
    for way, reason in found["left_out"].items():
        print(f"\n{way}: {reason}")
    print(f"\nThe fastest is {fastest(found)}.{f' hvdkit.plan says: {planned}' if planned else ''}")
    reporting.write_measurement(arguments.json, {**found, "fastest": fastest(found), "plan": planned})
    draw(arguments.plot, found)
    return 0


def parser() -> Parser:
    """Create the comparison's argument parser."""
    made = Parser("compare", description=__doc__)
    made.add_argument("-np", dest="number", type=int, default=2, help="number of ranks [2]")
    made.add_argument(
        "--ways", default=",".join(WAYS), help=f"strategies: {', '.join(WAYS)}, or NAME:RANKS, such as tensor:2 [all]"
    )
    made.add_argument("--no-plan", action="store_true", help="skip the planner")
    made.add_argument("--json", type=new_file, metavar="FILE", help="write the results to this file, too")
    made.add_argument("--plot", type=new_file, metavar="FILE.png", help="plot the results to this file")
    made.add_argument("flags", nargs="*", help="after --: flags of hvdkit train")
    return made


def compare(ways: Sequence[str], number: int, flags: Sequence[str]) -> dict[str, Any]:
    """Train under each parallelism strategy, one after another.

    Args:
        ways: strategies of `WAYS`. A model-parallel one may have a number of ranks, as in "tensor:2".
        number: number of ranks.
        flags: flags of hvdkit.train, without a strategy.

    Returns:
        `rows`, the measurements of `hvdkit.compare.rank` for each strategy, and `left_out`, a dictionary from each
        strategy that failed to the reason.

    Raises:
        UsageError: a strategy is unknown, or all of them fail.
    """
    for way in ways:
        name, colon, columns = way.partition(":")
        if name not in WAYS or (colon and not (name in _DIVIDING and columns.isdecimal())):
            raise UsageError(
                f"--ways: {way!r} is not one of {', '.join(WAYS)}. {', '.join(_DIVIDING)} may be followed by a number "
                f"of ranks, as in tensor:2."
            )
    rows, left_out = [], {}
    for way in ways:
        print(f"training: {way}", file=sys.stderr, flush=True)
        try:
            rows.append({"way": way, **_train(way, number, flags)})
        except UsageError as error:
            left_out[way] = _reason(str(error))
    if not rows:
        raise UsageError(f"No way worked: {left_out[ways[0]]}")
    return {"rows": rows, "left_out": left_out}


def _train(way: str, number: int, flags: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        name, _, columns = way.partition(":")
        fixed = ["--checkpoint_every=never", "--notensorboard", f"--workdir={folder}/run", f"--strategy={name}"]
        fixed += [f"--model_ranks={columns}"] if columns else []
        program = [sys.executable, "-m", "hvdkit.compare.rank", str(result), *fixed, *flags]
        launcher = [sys.executable, "-m", "hvdkit.launch", "-np", "1" if way == "single" else str(number), "--"]
        jobs.run([*launcher, *program], limit=_LIMIT)
        return dict(json.loads(result.read_text()))


def _reason(output: str) -> str:
    """Return the last error message of the training in its output, or the whole output if there is none."""
    said = [line.partition("hvdkit.compare: ")[2] for line in output.splitlines() if "hvdkit.compare: " in line]
    return said[-1] if said else output


def recommend(number: int, row: dict[str, Any], flags: Sequence[str]) -> str:
    """Return the planner's recommendation for the same task.

    Args:
        number: number of ranks.
        row: measurements of one strategy, for its batch size.
        flags: flags of hvdkit.train.
    """
    lengths = ("--steps", "--epochs", "--global_batch", "--local_batch")
    kept = list(flags)
    for place in reversed(range(len(kept))):
        name, given, _ = kept[place].partition("=")
        if name in lengths:
            del kept[place : place + (1 if given else 2)]
    batch = max(1, row["global_batch"] // number)
    ranks = ["--ranks", f"1,{number}", "--ranks-per-host", str(number), "--batch", str(batch)]
    try:
        output = jobs.run([sys.executable, "-m", "hvdkit.plan", *ranks, "--", *kept], limit=_LIMIT)
    except UsageError as error:  # keep the results of the comparison
        return f"nothing, because it failed: {error}"
    return output.strip().split("\n\n")[-1]


def fastest(found: dict[str, Any]) -> str:
    """Return the strategy with the most samples per second."""
    return str(max(found["rows"], key=lambda row: row["samples_per_second"])["way"])


def table(found: dict[str, Any]) -> str:
    """Format the comparison as a table."""
    first = found["rows"][0]["samples_per_second"]
    metric = found["rows"][0]["main_metric"]
    speed, quality = (
        ["samples/s", "times the first", "s of training"],
        [f"test {metric.replace('_', ' ')}", "test loss"],
    )
    heads = ["way", "ranks", *speed, *quality, "cores busy", "MiB a rank", "MB sent a step"]
    rows = [
        [
            row["way"],
            row["ranks"],
            f"{row['samples_per_second']:,.0f}",
            f"{row['samples_per_second'] / first:.2f}",
            f"{row['train_seconds']:.1f}",
            _metric(row),
            f"{row['test_loss']:.4f}",
            " ".join(f"{percent:.0f}%" for percent in row["core_percent"]),
            f"{max(row['peak_bytes']) / 2**20:,.0f}",
            f"{row['sent_bytes_per_step'] / 1e6:,.3f}",
        ]
        for row in found["rows"]
    ]
    return reporting.table(heads, rows)


def _metric(row: dict[str, Any]) -> str:
    """Return the main metric of a training on its test split."""
    value = row.get(f"test_{row['main_metric']}")
    if value is None:
        return "unknown"
    return f"{value:.2%}" if row["main_metric"] == "accuracy" else f"{value:.5g}"


def draw(path: Path | None, found: dict[str, Any]) -> None:
    """Draw bar charts of speed, memory and sent bytes, if `path` is given."""
    if not path:
        return
    from matplotlib.figure import Figure  # takes a second to load

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    names = [row["way"] for row in found["rows"]]
    bars = {
        "samples/s": [row["samples_per_second"] for row in found["rows"]],
        "MiB a rank": [max(row["peak_bytes"]) / 2**20 for row in found["rows"]],
        "MB sent a step": [row["sent_bytes_per_step"] / 1e6 for row in found["rows"]],
    }
    for axes, (title, values) in zip(figure.subplots(1, len(bars)), bars.items(), strict=True):
        axes.bar(names, values)
        axes.set_title(title)
        axes.tick_params(axis="x", rotation=30)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
