"""How to run a command on another host: with ssh, or with Slurm's `srun`, which needs no key."""

import dataclasses
import re
import subprocess
from collections.abc import Sequence
from typing import ClassVar, Protocol

# ssh's messages, their meaning, and what to do. The first match counts.
_SSH_SAYS = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED|host key .* has changed": (
        "Host {host} has a different key than the known one: it was reinstalled, or another machine answers in its "
        "place. If it was reinstalled: ssh-keygen -R {host}, then ssh {host} once and compare the fingerprint."
    ),
    "Host key verification failed|host key is known for": (
        "The key of host {host} is not known here, so it could be any machine. Run ssh {host} once and confirm its "
        "fingerprint; --insecure-host-keys accepts any key, for networks that you trust."
    ),
    "Permission denied": "Host {host} refuses to log in without a password. Set up a key with: ssh-copy-id {host}.",
    "Could not resolve hostname": "Host {host} is not known here. Is the name right? getent hosts {host} must find it.",
    "timed out|No route to host|Network is unreachable|Connection closed|Connection reset": (
        "Host {host} cannot be reached by ssh. Is it up, and is its port 22 open for this host? Try: ssh {host} true."
    ),
    "Connection refused": "Host {host} is up, but nothing listens on its ssh port. Start sshd on it.",
    "[Nn]o such file or directory|[Nn]ot found": (
        "Host {host} has no Python at {python}. Install hvdkit at the same path as here, or give the path on the "
        "hosts: --python PATH."
    ),
}

_SRUN_SAYS = {
    "Requested node configuration is not available|Invalid node name": (
        "Node {host} is not one of this Slurm job's nodes. Use --hosts-from slurm as the only source of hosts."
    ),
    "Unable to confirm allocation|Invalid job id": "The Slurm job is over, or srun cannot see it. Check with: squeue.",
    "[Nn]o such file or directory|[Nn]ot found": (
        "Node {host} has no Python at {python}. Install hvdkit at the same path as here, or give the path on the "
        "nodes: --python PATH."
    ),
}


class Shell(Protocol):
    """Runs commands on other hosts and forwards its input to them.

    Attributes:
        program: the program's name.
        install: what to do if the program is missing.
    """

    program: ClassVar[str]
    install: ClassVar[str]

    def command(self, host: str, command: str) -> list[str]:
        """The command that runs a shell command line on a host."""

    def name_of(self, host: str) -> str:
        """The name or address of a host that is not in the DNS."""

    def explain(self, host: str, said: str, code: int, python: str) -> str:
        """Why a command could not be run and how to fix it, in a sentence."""


@dataclasses.dataclass(frozen=True)
class Ssh:
    """Runs commands on other hosts with ssh.

    Attributes:
        arguments: more arguments for ssh. They precede the launcher's own and override them.
        checks_keys: whether a host's key must match the user's known hosts.
        patience: seconds to wait for a connection.
    """

    arguments: Sequence[str] = ()
    checks_keys: bool = True
    patience: int = 20
    program: ClassVar[str] = "ssh"
    install: ClassVar[str] = "install it with: apt-get install openssh-client"

    def options(self) -> list[str]:
        """The options of every connection."""
        keys = ["StrictHostKeyChecking=yes"]
        if not self.checks_keys:
            keys = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "GlobalKnownHostsFile=/dev/null"]
        given = ["BatchMode=yes", f"ConnectTimeout={self.patience}", "ForwardX11=no", "LogLevel=ERROR", *keys]
        return [*self.arguments, "-T", *(part for option in given for part in ("-o", option))]

    def command(self, host: str, command: str) -> list[str]:
        """The command that runs a command line on another host."""
        return ["ssh", *self.options(), "--", host, command]

    def name_of(self, host: str) -> str:
        """The name or address of a host in ssh's configuration."""
        asked = subprocess.run(["ssh", *self.options(), "-G", "--", host], capture_output=True, text=True, check=False)
        return next((line.split()[1] for line in asked.stdout.splitlines() if line.startswith("hostname ")), host)

    def explain(self, host: str, said: str, code: int, python: str) -> str:
        """ssh's error as a sentence that says how to fix it, with ssh's own last line."""
        last = said.splitlines()[-1].strip() if said else f"ssh ended with exit code {code}, and said nothing"
        for pattern, sentence in _SSH_SAYS.items():
            if re.search(pattern, said):
                return f"{sentence.format(host=host, python=python)} (ssh: {last})"
        return f"The connection to host {host} failed. Try: ssh {host} true. (ssh: {last})"


@dataclasses.dataclass(frozen=True)
class Srun:
    """Runs commands on the other nodes of the current Slurm job.

    Each command is a job step with one task. It shares the node with the job's other steps and gets all of the job's
    cores, memory and GPUs there, which the launcher divides among the ranks. (srun's manual, "--overlap".)
    """

    program: ClassVar[str] = "srun"
    install: ClassVar[str] = "install slurm-client, or reach the hosts by ssh: --remote-shell ssh"

    def command(self, host: str, command: str) -> list[str]:
        """The command that runs a command line on another node."""
        one = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--nodelist={host}"]
        everything = ["--overlap", "--whole", "--mem=0", "--cpu-bind=none", "--mpi=none"]
        return ["srun", "--quiet", "--unbuffered", *one, *everything, "sh", "-c", command]

    def name_of(self, host: str) -> str:
        """The address of a node according to Slurm."""
        asked = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, check=False)
        found = re.search(r"NodeAddr=(\S+)", asked.stdout)
        return found[1] if found else host

    def explain(self, host: str, said: str, code: int, python: str) -> str:
        """srun's error as a sentence that says how to fix it, with srun's own last line."""
        last = said.splitlines()[-1].strip() if said else f"srun ended with exit code {code}, and said nothing"
        for pattern, sentence in _SRUN_SAYS.items():
            if re.search(pattern, said):
                return f"{sentence.format(host=host, python=python)} (srun: {last})"
        return f"Slurm's step on node {host} failed. Try, inside of the job: srun -w {host} true. (srun: {last})"
