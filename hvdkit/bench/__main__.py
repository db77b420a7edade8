"""Measures how fast training is.

    throughput    samples per second, start-up time and memory
    collectives   latency and bandwidth of allreduce, compared with the limits of network and memory
    scaling       N ranks compared with one
    peers         the same models with PyTorch DDP, Keras on JAX, Horovod and TensorFlow's own strategies, also on hosts
    accuracy      time to a target accuracy
    imbalance     weights, resampling and losses for rare classes: accuracy, balanced accuracy, worst class

The cases of a benchmark alternate, because the speed of a machine changes over time: compare numbers within one table,
not between tables.
"""

import sys

from hvdkit import outcome, reporting
from hvdkit.bench import accuracy, collectives, imbalance, peers, scaling, throughput
from hvdkit.command.arguments import Parser, new_file
from hvdkit.errors import UsageError

_COMMANDS = {
    "throughput": throughput,
    "collectives": collectives,
    "scaling": scaling,
    "peers": peers,
    "accuracy": accuracy,
    "imbalance": imbalance,
}


def parser() -> Parser:
    """Create the argument parser, with a subparser for each command."""
    made = Parser("bench", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0].partition(": ")[2]
        one = commands.add_parser(name, prog=f"{made.prog} {name}", help=summary)
        one.add_argument("--seconds", type=float, default=4.0, help="seconds of each measurement [4]")
        one.add_argument("--rounds", type=int, default=3, help="number of measurements of each case [3]")
        one.add_argument("--json", type=new_file, metavar="FILE", help="write the results to this file, too")
        one.add_argument("--plot", type=new_file, metavar="FILE.png", help="plot the results to this file")
        module.add_arguments(one)
    return made


def main(argv: list[str]) -> int:
    """Run the benchmark, print its table and return the exit code: 2 for a usage error."""
    arguments = parser().parse_args(argv[1:])
    module = _COMMANDS[arguments.command]
    try:
        if arguments.seconds <= 0 or arguments.rounds < 1:
            raise UsageError("--seconds must be above 0 and --rounds 1 or more.")
        found = module.measure(arguments)
    except UsageError as error:
        print(f"hvdkit.bench: {error}", file=sys.stderr)
        return outcome.USAGE
    print(module.report(found))
    reporting.write_measurement(arguments.json, found)
    x, y = module.AXES
    scales = {"xscale": "log", "yscale": "log"} if arguments.command == "collectives" else {}
    reporting.plot(arguments.plot, f"hvdkit.bench {arguments.command}", x, y, module.lines(found), **scales)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
