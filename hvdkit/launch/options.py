"""The launcher's command line."""

import argparse
import os
import re
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
        made.error("no command was given; write it after --, as in: -np 2 -- python train.py")
    _check(made, arguments)
    if _runs_its_input(arguments.command):
        made.error(
            f"{shlex.join(arguments.command)} reads its program from standard input, which ranks do not have. Write "
            f"the program to a file, and give the file's name."
        )
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
    _add_hosts(parser)
    _add_start(parser)
    _add_restarts(parser)
    _add_limits(parser)
    _add_output(parser)


def _add_hosts(parser: Parser) -> None:
    group = parser.add_argument_group("where")
    group.add_argument("-np", type=int, metavar="N", help="number of ranks [all slots of the hosts]")
    one = group.add_mutually_exclusive_group()
    one.add_argument("-H", dest="hosts", metavar="h1:2,h2:2", help="hosts, and the number of ranks on each [this host]")
    one.add_argument("--hostfile", metavar="FILE", help="a file of hosts, with lines such as: h1 slots=2")
    group.add_argument(
        "--hosts-from",
        choices=("slurm", "kubernetes", "file"),
        help="take the hosts from the Slurm job, from the Kubeflow MPIJob, or from --hostfile",
    )
    group.add_argument("--directory", metavar="DIR", help="working directory of the ranks on every host [this one]")
    group.add_argument(
        "--python", metavar="PATH", help="Python interpreter for the agent on other hosts [the same path]"
    )


def _add_start(parser: Parser) -> None:
    group = parser.add_argument_group("how")
    backend = group.add_mutually_exclusive_group()
    backend.add_argument("--gloo", action="store_true", help="connect ranks with Gloo; the default")
    backend.add_argument("--mpi", action="store_true", help="start ranks with mpirun, and connect them with MPI")
    group.add_argument(
        "--bind",
        choices=("auto", "none", "cores", "gpus", "both"),
        default="auto",
        help="divide a host's cores or GPUs among its ranks [cores, if there are no GPUs]; hvd.init() selects the "
        "local rank's GPU in any case",
    )
    group.add_argument("--cores", metavar="0-3,8", help="cores of each host that the job may use [all]")
    group.add_argument(
        "--gpus", metavar="0,1", help="GPUs of each host that the job may use; binds ranks to them [all]"
    )
    group.add_argument("--interface", metavar="NAME", help="network interface on every host [that of the route]")
    group.add_argument(
        "--remote-shell",
        choices=("ssh", "srun"),
        help="command that reaches other hosts [srun with --hosts-from slurm if it is installed, else ssh]",
    )
    group.add_argument("--ssh-args", metavar="ARGS", default="", help="additional arguments for ssh, such as '-p 2222'")
    group.add_argument("--insecure-host-keys", action="store_true", help="do not verify the hosts' ssh keys")


def _add_restarts(parser: Parser) -> None:
    group = parser.add_argument_group("when ranks or hosts are lost or added")
    group.add_argument(
        "--elastic",
        action="store_true",
        help="after a failure, continue from the last checkpoint with the hosts that are left; --hostfile or the "
        "script may change the hosts while the job runs",
    )
    group.add_argument(
        "--min-np", type=int, metavar="N", help="minimum number of ranks; with fewer, wait for hosts [1]"
    )
    group.add_argument("--max-np", type=int, metavar="N", help="maximum number of ranks [-np, or all slots]")
    group.add_argument(
        "--host-discovery-script",
        metavar="PATH",
        help="a command that prints the available hosts, one per line: h1:2, or h1 for --slots ranks",
    )
    group.add_argument(
        "--slots",
        type=int,
        default=1,
        metavar="N",
        help="ranks on a host that the script prints without a number [%(default)s]",
    )
    group.add_argument(
        "--elastic-timeout", type=float, default=600.0, metavar="S", help="seconds to wait for --min-np [%(default)g]"
    )
    group.add_argument(
        "--restarts",
        type=int,
        metavar="N",
        help="maximum number of restarts after failures [10 with --elastic, else 0]",
    )


def _add_limits(parser: Parser) -> None:
    group = parser.add_argument_group("limits, in seconds")
    group.add_argument(
        "--start-timeout",
        type=int,
        default=120,
        metavar="S",
        help="for hosts to respond, and for all ranks to call hvd.init() after the first one [%(default)s]",
    )
    group.add_argument("--stall-timeout", type=float, metavar="S", help="for a rank to wait for others [600; 0: none]")
    group.add_argument(
        "--stop-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="for ranks to save and exit after SIGTERM, before they are killed [%(default)g]",
    )
    group.add_argument(
        "--host-timeout", type=float, default=30.0, metavar="S", help="for a host to respond [%(default)g; 0: none]"
    )


def _add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--workdir",
        metavar="DIR",
        help="keep each rank's output in DIR/logs/rank-NNNN.log, and the commits of hvd.elastic in DIR/elastic",
    )
    group.add_argument(
        "--output",
        choices=MODES,
        help="what to print: rank 0's output; also the other ranks' standard error; everything [errors with "
        "--workdir, else all]",
    )
    group.add_argument("--dry-run", action="store_true", help="contact the hosts, and print what would be started")


def _check(parser: Parser, arguments: argparse.Namespace) -> None:
    if arguments.np is not None and arguments.np < 1:
        parser.error(f"-np {arguments.np}: at least one rank is needed")
    for name in ("start_timeout", "stop_timeout", "stall_timeout", "host_timeout", "elastic_timeout"):
        if (getattr(arguments, name) or 0) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: seconds cannot be negative")
    _check_elastic(parser, arguments)


def _runs_its_input(command: list[str]) -> bool:
    """Returns whether a command is an interpreter that reads its program from standard input."""
    name = re.sub(r"[\d.]*$", "", Path(command[0]).name)
    if name in ("sh", "bash", "dash", "zsh", "ksh"):
        return "-s" in command[1:2] or not set(command[1:]) - {"-", "-e", "-i", "-l", "-u", "-x"}
    without_program = {"-", "-B", "-E", "-I", "-O", "-OO", "-P", "-i", "-q", "-s", "-u"}
    return name in ("python", "pypy") and not set(command[1:]) - without_program


def _check_elastic(parser: Parser, arguments: argparse.Namespace) -> None:
    for name in ("min_np", "max_np", "host_discovery_script"):
        if getattr(arguments, name) is not None and not arguments.elastic:
            parser.error(f"--{name.replace('_', '-')} was given without --elastic; add it")
    if _starts_again(arguments) and not arguments.workdir:
        parser.error("--elastic and --restarts resume from what the job has saved: give the folder with --workdir DIR")
    if arguments.elastic and arguments.mpi:
        parser.error(
            "--elastic and --mpi exclude each other: MPI cannot continue without a rank. Use --restarts instead"
        )
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
        raise UsageError("How many ranks? Give their number, as in -np 2, or hosts with slots, as in -H h1:2,h2:2.")
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
        stop_limit=arguments.stop_timeout,
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
