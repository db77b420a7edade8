"""Whether the doctor reaches the hosts, and the hosts reach each other, by ssh."""

import re
from collections.abc import Iterator

from hvdkit.doctor.checks.registry import Fix, Result, check, failed, fine, sudo
from hvdkit.doctor.findings import Findings

# ssh's messages from {one} to {other}, their meaning, the host on which to run the fix, and the fix. The first match
# counts.
_START = "{sudo}systemctl enable --now ssh || {sudo}systemctl enable --now sshd"
_MEANINGS = (
    (
        "IDENTIFICATION HAS CHANGED|host key .* has changed",
        "its host key is not the known one: it was reinstalled, or another machine answers in its place",
        "one",
        "ssh-keygen -R {other} && ssh {other} true  # and compare the fingerprint",
    ),
    (
        "Host key verification failed|host key is known for",
        "its host key is not known",
        "one",
        "ssh {other} true  # compare the fingerprint, and answer yes",
    ),
    ("ssh is not installed", "there is no ssh", "one", "{sudo}apt-get install openssh-client"),
    ("Permission denied", "it refuses to log in without a password", "one", "ssh-copy-id {other}"),
    (
        "Could not resolve|Name or service not known",
        "its name does not resolve",
        "one",
        "echo 'ADDRESS-OF-{other} {other}' | {sudo}tee -a /etc/hosts",
    ),
    ("Connection refused", "it is up, but no sshd listens", "other", _START),
    (
        "timed out|No route to host|Network is unreachable|Connection closed|Connection reset",
        "nothing answers: it is down, or a firewall blocks port 22",
        "other",
        _START + "; {sudo}ufw allow 22/tcp || {sudo}firewall-cmd --add-service=ssh",
    ),
    ("ot found|No such file", "it has no python3", "other", "{sudo}apt-get install python3"),
)


@check("connect")
def connect(found: Findings) -> Iterator[Result]:
    """The doctor reaches every host, and finds Python there."""
    for name, host in found.hosts.items():
        if host.unreachable is not None:
            yield _explained(found, found.here, name, host.unreachable)
    yield fine(", ".join(name + (" (this host)" if host.is_here else "") for name, host in found.hosts.items()))


@check("ssh", asks="ssh")
def ssh(found: Findings) -> Iterator[Result]:
    """Each host logs in to every other one without a password, and all host keys are known."""
    tries = 0
    for one, others in found.answered("ssh").items():
        for other, ended in others.items():
            tries += 1
            if ended["code"] != 0:
                yield _explained(found, one, other, ended["said"])
    yield fine(f"{tries} of {tries} connections, host keys checked" if tries else "one host: no other host to reach")


def _explained(found: Findings, one: str | None, other: str, said: str) -> Result:
    where = f"{one} -> {other}" if one else other
    for pattern, meaning, place, command in _MEANINGS:
        if re.search(pattern, said):
            on = one if place == "one" else other
            return failed(where, meaning, Fix(command.format(one=one, other=other, sudo=sudo(found, on or "")), on))
    last = said.splitlines()[-1] if said else "ssh said nothing"
    return failed(where, f"ssh failed: {last}", Fix(f"ssh -v {other} true", one))
