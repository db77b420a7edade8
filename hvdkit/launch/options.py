"""The launcher's command line."""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from hvdkit.errors import UsageError
from hvdkit.launch import hosts
from hvdkit.launch.console import MODES, Console
from hvdkit.launch.hosts import Host
from hvdkit.launch.job import Settings
from hvdkit.launch.link import Ssh


def parse(argv: list[str], description: str) -> argparse.Namespace:
    """Parses the command line; leaves with 0 for `--help`, with 2 and a sentence for a mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m hvdkit.launch",
        description=description,
        usage="%(prog)s [-np N] [options] -- command",
        allow_abbrev=False,
    )
    where = parser.add_argument_group("where")
    where.add_argument("-np", type=int, metavar="N", help="number of ranks [all places that the hosts have]")
    one = where.add_mutually_exclusive_group()
    one.add_argument("-H", dest="hosts", metavar="h1:2,h2:2", help="hosts, and how many ranks each takes [this host]")
    one.add_argument("--hostfile", metavar="FILE", help="a file with lines like: h1 slots=2")
    where.add_argument(
        "--hosts-from",
        choices=("slurm", "kubernetes", "file"),
        help="take them from the Slurm job, from the Kubeflow MPIJob, or from --hostfile",
    )
    where.add_argument("--directory", metavar="DIR", help="where ranks run, on every host [this directory]")
    where.add_argument("--python", metavar="PATH", help="Python on the other hosts, for the agent [as here]")
    how = parser.add_argument_group("how")
    backend = how.add_mutually_exclusive_group()
    backend.add_argument("--gloo", action="store_true", help="ranks meet over Gloo, the default")
    backend.add_argument("--mpi", action="store_true", help="ranks are started by mpirun, and meet over MPI")
    how.add_argument("--bind", choices=("none", "cores", "gpus", "both"), default="none", help="share out a host's "
                     "cores or GPUs among its ranks; hvd.init() takes the local rank's GPU in any case")  # fmt: skip
    how.add_argument("--interface", metavar="NAME", help="the job's network interface, on every host [the route's]")
    how.add_argument("--ssh-args", metavar="ARGS", default="", help="more arguments for ssh, as in: '-p 2222'")
    how.add_argument("--insecure-host-keys", action="store_true", help="let any machine pass for a host")
    limits = parser.add_argument_group("limits, in seconds")
    limits.add_argument("--start-timeout", type=int, default=120, metavar="S", help="for hosts to answer, and for "
                        "ranks to follow the first one to hvd.init() [%(default)s]")  # fmt: skip
    limits.add_argument("--stall-timeout", type=float, metavar="S", help="for ranks to wait for others [600; 0: none]")
    limits.add_argument("--host-timeout", type=float, default=30.0, metavar="S", help="for a host to be silent "
                        "[%(default)g; 0: none]")  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--workdir", metavar="DIR", help="keep each rank's output in DIR/logs/rank-NNNN.log")
    output.add_argument("--output", choices=MODES, help="on the screen: rank 0's; with the other ranks' standard "
                        "error; all [errors with --workdir, else all]")  # fmt: skip
    output.add_argument("--dry-run", action="store_true", help="ask the hosts, and show what would be started on them")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command that every rank runs")
    arguments = parser.parse_args(argv[1:])
    if arguments.command[:1] == ["--"]:
        del arguments.command[0]
    if not arguments.command:
        parser.error("no command was given; write it behind --, as in: -np 2 -- python train.py")
    if arguments.np is not None and arguments.np < 1:
        parser.error(f"-np {arguments.np}: at least one rank is needed")
    for name in ("start_timeout", "stall_timeout", "host_timeout"):
        if (getattr(arguments, name) or 0) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: seconds cannot be negative")
    return arguments


def settings(arguments: argparse.Namespace) -> Settings:
    """What the job needs to know.

    Raises:
        UsageError: the hosts are not understood, or are not given where they must be.
    """
    given = _hosts(arguments)
    ranks = arguments.np or sum(host.slots for host in given)
    if not ranks:
        raise UsageError("How many ranks? Give their number, as in -np 2, or hosts with places, as in -H h1:2,h2:2.")
    return Settings(
        command=arguments.command,
        hosts=given or [Host("localhost", ranks)],
        ranks=ranks,
        directory=arguments.directory or str(Path.cwd()),
        ssh=Ssh(_ssh_arguments(arguments), not arguments.insecure_host_keys, max(1, min(20, arguments.start_timeout))),
        python=arguments.python or sys.executable,
        interface=arguments.interface,
        bind=arguments.bind,
        start_limit=arguments.start_timeout,
        stall_limit=arguments.stall_timeout,
        silence=arguments.host_timeout,
        is_watched=sys.stderr.isatty(),
    )


def console(arguments: argparse.Namespace) -> Console:
    """What takes the ranks' output.

    Raises:
        UsageError: the folder for logs cannot be made.
    """
    logs = Path(arguments.workdir) / "logs" if arguments.workdir else None
    # What is kept nowhere must be seen.
    return Console(arguments.output or ("errors" if logs else "all"), logs)


def _hosts(arguments: argparse.Namespace) -> list[Host]:
    if arguments.hosts_from == "file" and not arguments.hostfile:
        raise UsageError("--hosts-from file needs the file: --hostfile FILE.")
    if arguments.hosts_from in ("slurm", "kubernetes") and (arguments.hosts or arguments.hostfile):
        raise UsageError(
            f"--hosts-from {arguments.hosts_from} and -H or --hostfile exclude each other: give one of them."
        )
    if arguments.hosts is not None:
        return hosts.from_list(arguments.hosts)
    if arguments.hostfile:
        return hosts.from_file(arguments.hostfile)
    sources: dict[str, Callable[[], list[Host]]] = {"slurm": hosts.from_slurm, "kubernetes": hosts.from_kubernetes}
    return sources[arguments.hosts_from]() if arguments.hosts_from else []


def _ssh_arguments(arguments: argparse.Namespace) -> list[str]:
    try:
        return shlex.split(arguments.ssh_args)
    except ValueError as error:
        raise UsageError(f"--ssh-args={arguments.ssh_args} is not understood: {error}.") from None
