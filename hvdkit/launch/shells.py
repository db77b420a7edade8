"""How a command is run on another host: by ssh, or by Slurm's own `srun`, which needs no key."""

import dataclasses
import re
import subprocess
from collections.abc import Sequence
from typing import ClassVar, Protocol

# What ssh says, what it means, and what to do; the first that is found counts.
_SSH_SAYS = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED|host key .* has changed": (
        "Host {host} shows another key than the one known for it: it was set up anew, or another machine answers in "
        "its place. If it was set up anew: ssh-keygen -R {host}, then ssh {host} once and compare the fingerprint."
    ),
    "Host key verification failed|host key is known for": (
        "The key of host {host} is not known here, so it could be any machine. Run ssh {host} once and confirm its "
        "fingerprint; --insecure-host-keys takes any key, for networks that you trust."
    ),
    "Permission denied": "Host {host} lets nobody in without a password. Set up a key with: ssh-copy-id {host}.",
    "Could not resolve hostname": "Host {host} is not known here. Is the name right? getent hosts {host} must find it.",
    "timed out|No route to host|Network is unreachable|Connection closed|Connection reset": (
        "Host {host} cannot be reached by ssh. Is it up, and is its port 22 open for this host? Try: ssh {host} true."
    ),
    "Connection refused": "Host {host} is there, but nothing listens on its ssh port. Start sshd on it.",
    "[Nn]o such file or directory|[Nn]ot found": (
        "Host {host} has no Python at {python}. Install hvdkit at the same path as here, or name the one that is "
        "there: --python PATH."
    ),
}

_SRUN_SAYS = {
    "Requested node configuration is not available|Invalid node name": (
        "Node {host} is not one of this Slurm job's. Leave --hosts-from slurm as the only source of hosts."
    ),
    "Unable to confirm allocation|Invalid job id": "The Slurm job is over, or srun cannot see it: squeue tells.",
    "[Nn]o such file or directory|[Nn]ot found": (
        "Node {host} has no Python at {python}. Install hvdkit at the same path as here, or name the one that is "
        "there: --python PATH."
    ),
}


class Shell(Protocol):
    """Runs commands on other hosts; what goes to its input reaches the command.

    Attributes:
        program: its name.
        install: what to do where the program is missing.
    """

    program: ClassVar[str]
    install: ClassVar[str]

    def command(self, host: str, command: str) -> list[str]:
        """What runs a shell's command line on a host."""

    def name_of(self, host: str) -> str:
        """The name or address by which a host that is not in the DNS can be found."""

    def explain(self, host: str, said: str, code: int, python: str) -> str:
        """Why a command could not be run, in a sentence with the mend."""


@dataclasses.dataclass(frozen=True)
class Ssh:
    """Commands on other hosts by ssh.

    Attributes:
        arguments: more arguments for ssh, before those that the launcher gives itself, which they can override.
        checks_keys: whether a host must prove to be the one in the user's known hosts.
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
        """What runs a command line on another host."""
        return ["ssh", *self.options(), "--", host, command]

    def name_of(self, host: str) -> str:
        """The name or address behind a host that ssh's configuration names."""
        asked = subprocess.run(["ssh", *self.options(), "-G", "--", host], capture_output=True, text=True, check=False)
        return next((line.split()[1] for line in asked.stdout.splitlines() if line.startswith("hostname ")), host)

    def explain(self, host: str, said: str, code: int, python: str) -> str:
        """What ssh said about a host, as a sentence with the mend, and ssh's own last line."""
        last = said.splitlines()[-1].strip() if said else f"ssh ended with exit code {code}, and said nothing"
        for pattern, sentence in _SSH_SAYS.items():
            if re.search(pattern, said):
                return f"{sentence.format(host=host, python=python)} (ssh: {last})"
        return f"The connection to host {host} failed. Try: ssh {host} true. (ssh: {last})"


@dataclasses.dataclass(frozen=True)
class Srun:
    """Commands on the other nodes of the Slurm job that this process is in.

    Each is a job step of one task. It shares the node with the job's other steps, and gets all of the node that the
    job has: its cores, memory and GPUs are divided among ranks by the launcher. (srun's manual, "--overlap".)
    """

    program: ClassVar[str] = "srun"
    install: ClassVar[str] = "install slurm-client, or reach the hosts by ssh: --remote-shell ssh"

    def command(self, host: str, command: str) -> list[str]:
        """What runs a command line on another node."""
        one = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--nodelist={host}"]
        everything = ["--overlap", "--whole", "--mem=0", "--cpu-bind=none", "--mpi=none"]
        return ["srun", "--quiet", "--unbuffered", *one, *everything, "sh", "-c", command]

    def name_of(self, host: str) -> str:
        """The address that Slurm knows for a node."""
        asked = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, check=False)
        found = re.search(r"NodeAddr=(\S+)", asked.stdout)
        return found[1] if found else host

    def explain(self, host: str, said: str, code: int, python: str) -> str:
        """What srun said about a node, as a sentence with the mend, and srun's own last line."""
        last = said.splitlines()[-1].strip() if said else f"srun ended with exit code {code}, and said nothing"
        for pattern, sentence in _SRUN_SAYS.items():
            if re.search(pattern, said):
                return f"{sentence.format(host=host, python=python)} (srun: {last})"
        return f"Slurm's step on node {host} failed. Try, inside of the job: srun -w {host} true. (srun: {last})"
