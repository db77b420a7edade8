"""Whether hosts can be come to, from the doctor and from each other."""

import re
from collections.abc import Iterator

from hvdkit.doctor.checks.registry import Mend, Result, check, failed, fine, sudo
from hvdkit.doctor.findings import Findings

# What ssh says, what it means, and the mend: {one} wants to come to {other}. The first that is found counts.
_START = "{sudo}systemctl enable --now ssh || {sudo}systemctl enable --now sshd"
_MEANINGS = (
    (
        "IDENTIFICATION HAS CHANGED|host key .* has changed",
        "its host key is not the one known for it: it was set up anew, or another machine answers in its place",
        "one", "ssh-keygen -R {other} && ssh {other} true  # and compare the fingerprint",
    ),
    (
        "Host key verification failed|host key is known for",
        "its host key is not known",
        "one", "ssh {other} true  # compare the fingerprint, and answer yes",
    ),
    ("ssh is not installed", "there is no ssh", "one", "{sudo}apt-get install openssh-client"),
    ("Permission denied", "it lets nobody in without a password", "one", "ssh-copy-id {other}"),
    (
        "Could not resolve|Name or service not known",
        "its name does not resolve",
        "one", "echo 'ADDRESS-OF-{other} {other}' | {sudo}tee -a /etc/hosts",
    ),
    ("Connection refused", "it is up, but no sshd listens", "other", _START),
    (
        "timed out|No route to host|Network is unreachable|Connection closed|Connection reset",
        "nothing answers: it is down, or a firewall keeps port 22 shut",
        "other", _START + "; {sudo}ufw allow 22/tcp || {sudo}firewall-cmd --add-service=ssh",
    ),
    ("ot found|No such file", "it has no python3", "other", "{sudo}apt-get install python3"),
)  # fmt: skip


@check("connect")
def connect(found: Findings) -> Iterator[Result]:
    """The doctor comes to every host, and finds Python there."""
    for name, host in found.hosts.items():
        if host.unreachable is not None:
            yield _explained(found, found.here, name, host.unreachable)
    yield fine(", ".join(name + (" (this host)" if host.is_here else "") for name, host in found.hosts.items()))


@check("ssh", asks="ssh")
def ssh(found: Findings) -> Iterator[Result]:
    """Each host lets each other one in without a password, and is the host that its key says."""
    tries = 0
    for one, others in found.answered("ssh").items():
        for other, ended in others.items():
            tries += 1
            if ended["code"] != 0:
                yield _explained(found, one, other, ended["said"])
    yield fine(f"{tries} of {tries} ways, host keys checked" if tries else "one host: no other to come to")


def _explained(found: Findings, one: str | None, other: str, said: str) -> Result:
    where = f"{one} -> {other}" if one else other
    for pattern, meaning, place, command in _MEANINGS:
        if re.search(pattern, said):
            on = one if place == "one" else other
            return failed(where, meaning, Mend(command.format(one=one, other=other, sudo=sudo(found, on or "")), on))
    last = said.splitlines()[-1] if said else "ssh said nothing"
    return failed(where, f"ssh failed: {last}", Mend(f"ssh -v {other} true", one))
