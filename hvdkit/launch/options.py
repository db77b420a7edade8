"""The launcher's command line."""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from hvdkit.command.arguments import Parser
from hvdkit.errors import UsageError
from hvdkit.launch import hosts
from hvdkit.launch.console import MODES, Console
from hvdkit.launch.hosts import Host
from hvdkit.launch.job import Settings
from hvdkit.launch.restarts import Policy, run_script
from hvdkit.launch.shells import Shell, Srun, Ssh

_DESCRIPTION = "Runs a command on N ranks, on this host or on many; exits with the code of the first rank that failed."


def parser() -> Parser:
    """Create the launcher's argument parser, with the command that ranks run."""
    made = Parser("launch", description=_DESCRIPTION, usage="%(prog)s [-np N] [options] -- command")
    _add_options(made)
    made.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command that every rank runs")
    return made


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; exit with 0 for `--help`, and with 2 and an error message for a usage error."""
    made = parser()
    arguments = made.parse_args(argv[1:])
    if arguments.command[:1] == ["--"]:
        del arguments.command[0]
    if not arguments.command:
        made.error("no command was given; write it behind --, as in: -np 2 -- python train.py")
    _check(made, arguments)
    return arguments


def divide(argv: list[str], prog: str) -> tuple[argparse.Namespace, list[str]]:
    """Split a command line that mixes the launcher's options and flags of hvdkit.train in any order.

    Args:
        argv: the command line.
        prog: the program name for messages.

    Returns:
        The parsed options of the launcher, without a command, and all other arguments in their order, `--help`
        included.
    """
    made = Parser(prog=prog, usage=f"{prog} [-np N] [options of hvdkit launch] [flags of hvdkit train]", add_help=False)
    _add_options(made)
    arguments, rest = made.parse_known_args(argv[1:])
    _check(made, arguments)
    return arguments, rest


def _add_options(parser: Parser) -> None:
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
    how.add_argument(
        "--bind",
        choices=("auto", "none", "cores", "gpus", "both"),
        default="auto",
        help="share out "
        "a host's cores or GPUs among its ranks [cores, where there are no GPUs]; hvd.init() takes the "
        "local rank's GPU in any case",
    )
    how.add_argument("--cores", metavar="0-3,8", help="cores of each host that the job may use [all that it can]")
    how.add_argument("--gpus", metavar="0,1", help="GPUs of each host that the job may use, and binds to [all]")
    how.add_argument("--interface", metavar="NAME", help="the job's network interface, on every host [the route's]")
    how.add_argument(
        "--remote-shell",
        choices=("ssh", "srun"),
        help="how other hosts are reached [srun with --hosts-from slurm, where it is installed, else ssh]",
    )
    how.add_argument("--ssh-args", metavar="ARGS", default="", help="more arguments for ssh, as in: '-p 2222'")
    how.add_argument("--insecure-host-keys", action="store_true", help="let any machine pass for a host")
    elastic = parser.add_argument_group("when ranks and hosts are lost, or come and go")
    elastic.add_argument(
        "--elastic",
        action="store_true",
        help="go on with those that there are, from the last "
        "checkpoint; --hostfile or the script may list others meanwhile",
    )
    elastic.add_argument("--min-np", type=int, metavar="N", help="ranks below which it waits for hosts [1]")
    elastic.add_argument("--max-np", type=int, metavar="N", help="ranks that it uses at most [-np, or all places]")
    elastic.add_argument(
        "--host-discovery-script",
        metavar="PATH",
        help="prints the hosts that there are, one a line: h1:2, or h1 for --slots ranks",
    )
    elastic.add_argument(
        "--slots",
        type=int,
        default=1,
        metavar="N",
        help="ranks of a host that the script prints without a number [%(default)s]",
    )
    elastic.add_argument(
        "--elastic-timeout", type=float, default=600.0, metavar="S", help="seconds to wait for --min-np [%(default)g]"
    )
    elastic.add_argument(
        "--restarts",
        type=int,
        metavar="N",
        help="starts after failures, with or without --elastic [10 with, 0 without]",
    )
    limits = parser.add_argument_group("limits, in seconds")
    limits.add_argument(
        "--start-timeout",
        type=int,
        default=120,
        metavar="S",
        help="for hosts to answer, and for ranks to follow the first one to hvd.init() [%(default)s]",
    )
    limits.add_argument("--stall-timeout", type=float, metavar="S", help="for ranks to wait for others [600; 0: none]")
    limits.add_argument(
        "--host-timeout", type=float, default=30.0, metavar="S", help="for a host to be silent [%(default)g; 0: none]"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--workdir",
        metavar="DIR",
        help="keep each rank's output in DIR/logs/rank-NNNN.log, and what hvd.elastic commits in DIR/elastic",
    )
    output.add_argument(
        "--output",
        choices=MODES,
        help="on the screen: rank 0's; with the other ranks' standard error; all [errors with --workdir, else all]",
    )
    output.add_argument("--dry-run", action="store_true", help="ask the hosts, and show what would be started on them")


def _check(parser: Parser, arguments: argparse.Namespace) -> None:
    if arguments.np is not None and arguments.np < 1:
        parser.error(f"-np {arguments.np}: at least one rank is needed")
    for name in ("start_timeout", "stall_timeout", "host_timeout", "elastic_timeout"):
        if (getattr(arguments, name) or 0) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: seconds cannot be negative")
    _check_elastic(parser, arguments)


def _check_elastic(parser: Parser, arguments: argparse.Namespace) -> None:
    for name in ("min_np", "max_np", "host_discovery_script"):
        if getattr(arguments, name) is not None and not arguments.elastic:
            parser.error(f"--{name.replace('_', '-')} was given without --elastic; add it")
    if _starts_again(arguments) and not arguments.workdir:
        parser.error("--elastic and --restarts go on from what the job keeps in a folder: name it with --workdir DIR")
    if arguments.elastic and arguments.mpi:
        parser.error("--elastic and --mpi exclude each other: MPI cannot go on without a rank. --restarts starts again")
    if arguments.host_discovery_script and (arguments.hosts or arguments.hostfile or arguments.hosts_from):
        parser.error("--host-discovery-script and -H, --hostfile or --hosts-from exclude each other: give one of them")
    least, most = arguments.min_np or 1, arguments.max_np or arguments.np
    if least < 1 or arguments.slots < 1 or (arguments.restarts or 0) < 0:
        parser.error("--min-np and --slots must be 1 or more, --restarts 0 or more")
    if most is not None and most < least:
        parser.error(f"--max-np {most} is less than --min-np {least}")


def settings(arguments: argparse.Namespace) -> Settings:
    """Create the job's settings.

    Raises:
        UsageError: the hosts cannot be parsed, or are required but missing.
    """
    given = discover(arguments)
    ranks = arguments.np or sum(host.slots for host in given)
    if not ranks and not arguments.elastic:
        raise UsageError("How many ranks? Give their number, as in -np 2, or hosts with places, as in -H h1:2,h2:2.")
    return Settings(
        command=arguments.command,
        hosts=given,
        ranks=ranks,
        directory=arguments.directory or str(Path.cwd()),
        shell=_shell(arguments),
        python=arguments.python or sys.executable,
        interface=arguments.interface,
        bind=arguments.bind,
        start_limit=arguments.start_timeout,
        stall_limit=arguments.stall_timeout if arguments.stall_timeout is not None or not arguments.elastic else 120.0,
        silence=arguments.host_timeout,
        is_watched=sys.stderr.isatty(),
        cores=hosts.numbers(arguments.cores, "--cores") if arguments.cores else None,
        gpus=arguments.gpus.split(",") if arguments.gpus else None,
        elastic=str((Path(arguments.workdir) / "elastic").resolve()) if _starts_again(arguments) else None,
    )


def policy(arguments: argparse.Namespace, settings: Settings) -> Policy | None:
    """Return the restart policy; None for a job that starts once and never changes."""
    if arguments.elastic:
        return Policy(
            least=arguments.min_np or 1,
            most=arguments.max_np or arguments.np,
            restarts=10 if arguments.restarts is None else arguments.restarts,
            patience=arguments.elastic_timeout,
            may_change=True,
        )
    if arguments.restarts:
        return Policy(settings.ranks, settings.ranks, arguments.restarts, arguments.elastic_timeout, may_change=False)
    return None


def _starts_again(arguments: argparse.Namespace) -> bool:
    return bool(arguments.elastic or arguments.restarts)


def console(arguments: argparse.Namespace) -> Console:
    """Create the console that receives the ranks' output.

    Raises:
        UsageError: the folder for logs cannot be created.
    """
    logs = Path(arguments.workdir) / "logs" if arguments.workdir else None
    # Without log files, show all output.
    return Console(arguments.output or ("errors" if logs else "all"), logs)


def discover(arguments: argparse.Namespace) -> list[Host]:
    """Return the hosts that are available now.

    Raises:
        UsageError: the hosts cannot be parsed, or are required but missing.
    """
    if arguments.host_discovery_script:
        return run_script(arguments.host_discovery_script, arguments.slots)
    listed = _listed(arguments)
    return listed or ([Host("localhost", arguments.np)] if arguments.np else [])


def _listed(arguments: argparse.Namespace) -> list[Host]:
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


def _shell(arguments: argparse.Namespace) -> Shell:
    is_slurm = arguments.hosts_from == "slurm" and shutil.which("srun")
    if (arguments.remote_shell or ("srun" if is_slurm else "ssh")) == "srun":
        if "SLURM_JOB_ID" not in os.environ:
            raise UsageError(
                "--remote-shell srun was given outside of a Slurm job (SLURM_JOB_ID is not set). Start the launcher "
                "inside of one, with sbatch or salloc, or leave the option out."
            )
        return Srun()
    patience = max(1, min(20, arguments.start_timeout))
    return Ssh(_ssh_arguments(arguments), not arguments.insecure_host_keys, patience)


def _ssh_arguments(arguments: argparse.Namespace) -> list[str]:
    try:
        return shlex.split(arguments.ssh_args)
    except ValueError as error:
        raise UsageError(f"--ssh-args={arguments.ssh_args} is not understood: {error}.") from None
