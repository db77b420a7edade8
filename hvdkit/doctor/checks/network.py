"""Names, addresses, ports, clocks, and the speed of the network."""

import re
import shlex
from collections.abc import Iterator

from hvdkit.doctor.checks.registry import Fix, Result, check, failed, fine, not_run, sudo, summary, warned
from hvdkit.doctor.findings import Findings

CLOCK_SECONDS = 1.0  # the order of events in the logs and file times of different hosts must stay clear
SLOW_ROUND_TRIP = 0.005  # seconds
SLOW_STREAM = 1e8  # bytes per second; a network card of 1 Gbit/s reaches more
_ONE_HOST = "one host: ranks meet over loopback"


@check("names", asks="names")
def names(found: Findings) -> Iterator[Result]:
    """Each host name resolves, on every host, to an address at which the other hosts reach it."""
    for on, resolved in found.answered("names").items():
        hostname = found.hosts[on].answers["host"]["hostname"]
        for name, answer in resolved.items():
            target = on if name == hostname else name
            wrong = _wrong_with(found, on, target, name, answer["addresses"])
            if wrong:
                yield failed(on, *wrong)
    yield fine(summary(_addresses(found)) if len(found.hosts) > 1 else "this host's own name resolves")


def _wrong_with(found: Findings, on: str, target: str, name: str, addresses: list[str]) -> tuple[str, Fix] | None:
    """What is wrong with the address to which a name resolves on a host, and the fix."""
    own = _interfaces(found, target)
    right = next(iter([*found.good_addresses(target), *own]), None)
    whose = "its own name, " if target == on else ""
    if not addresses:
        if name not in found.hosts or len(found.hosts) == 1 or right:
            return f"{whose}{name}, does not resolve".lstrip(), Fix(_hosts_line(found, on, name, right), on)
        return None  # no host reached it: the check `connect` reports that
    if len(found.hosts) == 1 or not own:
        return None
    if addresses[0].startswith("127."):
        what = f"{whose}{name}, resolves to {addresses[0]}, where no other host reaches it"
    elif addresses[0] not in own:
        what = f"{whose}{name}, resolves to {addresses[0]}, but its addresses are {', '.join(own)}"
    else:
        return None
    return what, Fix(_hosts_line(found, on, name, right, addresses[0]), on)


def _hosts_line(found: Findings, on: str, name: str, right: str | None, wrong: str | None = None) -> str:
    """A command that corrects a name's address in /etc/hosts, in place, since the file may be a mount."""
    line = shlex.quote(f"{right or 'ADDRESS'} {name}")
    if wrong is None:
        return f"echo {line} | {sudo(found, on)}tee -a /etc/hosts"
    lines = r"127\." if wrong.startswith("127.") else re.escape(wrong) + "[[:space:]]"
    # In a loop, since one pass would miss the second of two adjacent mentions.
    drop = shlex.quote(f"/^{lines}/{{:a;s/[[:space:]]+{re.escape(name)}([[:space:]]|$)/\\1/;ta}}")
    return f"""hosts=$(sed -E {drop} /etc/hosts) && printf '%s\\n' "$hosts" {line} | {sudo(found, on)}tee /etc/hosts"""


@check("interface", asks="listen")
def interface(found: Findings) -> Iterator[Result]:
    """Each host has an address that all other hosts can reach."""
    if len(found.hosts) == 1:
        yield fine(_ONE_HOST)
        return
    for name in found.reached:
        if not _interfaces(found, name):
            fix = Fix(f"{sudo(found, name)}dhclient -v || ip address", name)
            yield failed(name, "it has no interface with an IPv4 address except loopback", fix)
        elif not _routable(found, name):
            others = [other for other in found.reached if other != name]
            address = _interfaces(found, name)[0]
            fixes = [Fix(f"ip route get {address}; ip rule", other) for other in others]
            tried = ", ".join(_interfaces(found, name))
            yield failed(name, f"none of its addresses ({tried}) can be reached from all other hosts", *fixes)
    yield fine(summary(_addresses(found, with_interface=True)))


@check("ports", asks="listen")
def ports(found: Findings) -> Iterator[Result]:
    """Each host connects to test ports on every other host."""
    if len(found.hosts) == 1:
        yield fine(_ONE_HOST)
        return
    tries = 0
    for one, other in found.pairs():
        ways = [link for link in found.links if (link["from"], link["to"]) == (one, other)]
        ways = [link for link in ways if link["address"] in _routable(found, other)]
        bad = [link for link in ways if link["problem"] is not None]
        tries += len(ways)
        if bad and not found.good_addresses(other):
            yield failed(f"{one} -> {other}", _blocked(bad, len(ways)), _open_up(found, one, other, bad[0]))
    yield fine(f"{tries} of {tries} connections") if tries else not_run("no host reaches another")


def _blocked(bad: list[dict[str, object]], tries: int) -> str:
    first = bad[0]
    how = {
        "silence": "nothing answers, so a firewall is likely",
        "refused": "the connection is refused, so a firewall is likely",
        "no way": f"this host's own routes or rules forbid it ({first['problem']})",
    }
    what = how.get(str(first["kind"]), str(first["problem"]))
    return f"{len(bad)} of {tries} ports opened for this test cannot be reached at {first['address']}: {what}"


def _open_up(found: Findings, one: str, other: str, link: dict[str, object]) -> Fix:
    """The command that opens the installed firewall of one host for another host."""
    if link["kind"] == "no way":
        return Fix(f"ip rule; ip route get {link['address']}; {sudo(found, one)}iptables -S OUTPUT", one)
    source = next(iter(_interfaces(found, one)), "ADDRESS")
    commands = {
        "ufw": f"{sudo(found, other)}ufw allow from {source}",
        "firewall-cmd": f"{sudo(found, other)}firewall-cmd --permanent --zone=trusted --add-source={source} && "
        f"{sudo(found, other)}firewall-cmd --reload",
        "iptables": f"{sudo(found, other)}iptables -I INPUT -s {source} -p tcp -j ACCEPT",
        "nft": f"{sudo(found, other)}nft insert rule inet filter input ip saddr {source} accept",
    }
    there = found.hosts[other].answers["host"]["firewalls"]
    chosen = next((name for name in commands if name in there), "iptables")
    return Fix(commands[chosen], other)


@check("clock", asks="clock")
def clock(found: Findings) -> Iterator[Result]:
    """The hosts' clocks differ by at most a second."""
    clocks = found.answered("clock")
    if not clocks:
        yield not_run("no host was reached")
        return
    reference, known = next(iter(clocks.items()))
    worst = 0.0
    for name, reading in clocks.items():
        apart = reading["ahead"] - known["ahead"]
        error = reading["error"] + known["error"]
        worst = max(worst, abs(apart) + error if name != reference else 0.0)
        if abs(apart) - error > CLOCK_SECONDS:
            direction = "ahead of" if apart > 0 else "behind"
            command = f"{sudo(found, name)}chronyc makestep || {sudo(found, name)}timedatectl set-ntp true"
            yield failed(name, f"its clock is {abs(apart):,.1f} s {direction} {reference}'s", Fix(command, name))
    yield fine(f"at most {worst * 1000:.1f} ms apart" if len(clocks) > 1 else "one host: one clock")


@check("latency")
def latency(found: Findings) -> Iterator[Result]:
    """The round trip between each pair of hosts is short."""
    times: dict[str, float] = {}
    for link in found.links:
        if link.get("seconds") is not None:
            pair = f"{link['from']} -> {link['to']}"
            times[pair] = min(link["seconds"], times.get(pair, link["seconds"]))
    for pair, seconds in times.items():
        if seconds > SLOW_ROUND_TRIP:
            fix = Fix(f"ping -c 20 {pair.partition(' -> ')[2]}", pair.partition(" -> ")[0])
            yield warned(pair, f"{seconds * 1000:.1f} ms round trip: small collectives will be slow", fix)
    if times:
        yield fine(f"{_range([t * 1e6 for t in times.values()], '.0f')} µs round trip")
    else:
        yield _nothing_measured(found)


@check("bandwidth")
def bandwidth(found: Findings) -> Iterator[Result]:
    """The bandwidth between each pair of hosts is high enough."""
    rates: dict[str, float] = {}
    for stream in found.streams:
        pair = f"{stream['from']} -> {stream['to']}"
        if "problem" in stream:
            fix = Fix(f"ip -s link  # and look for errors; on {stream['to']}, too", stream["from"])
            yield failed(pair, f"the test transfer failed: {stream['problem']}", fix)
            continue
        rates[pair] = stream["bytes"] / max(stream["seconds"], 1e-9)
        if rates[pair] < SLOW_STREAM:
            interface = next((i["name"] for i in found.hosts[stream["to"]].answers["host"]["interfaces"]), "eth0")
            text = f"{rates[pair] * 8e-9:.2f} Gbit/s: 100 MB of gradients take {1e8 / rates[pair]:.1f} s a step"
            yield warned(pair, text, Fix(f"ethtool {interface} | grep -i speed", stream["to"]))
    if rates:
        yield fine(f"{_range([rate * 8e-9 for rate in rates.values()], '.2f')} Gbit/s one way")
    else:
        yield _nothing_measured(found)


def _nothing_measured(found: Findings) -> Result:
    return fine(_ONE_HOST) if len(found.hosts) == 1 else not_run("no host reaches another")


def _range(values: list[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def _interfaces(found: Findings, name: str) -> list[str]:
    """A host's own addresses."""
    host = found.hosts.get(name)
    return [each["address"] for each in host.answers["host"]["interfaces"]] if host and "host" in host.answers else []


def _addresses(found: Findings, *, with_interface: bool = False) -> dict[str, str]:
    """By host, the address at which the other hosts reach it."""
    chosen = {}
    for name in found.reached:
        address = next(iter(found.good_addresses(name) or _routable(found, name)), "none")
        there = {each["address"]: each["name"] for each in found.hosts[name].answers["host"]["interfaces"]}
        chosen[name] = f"{there.get(address, '')} {address}".strip() if with_interface else address
    return chosen


def _routable(found: Findings, name: str) -> list[str]:
    """A host's addresses that answer every other host: with a connection, a refusal, or by ssh."""
    return [
        address
        for address in _interfaces(found, name)
        if all(_answers(found, other, name, address) for other in found.reached if other != name)
    ]


def _answers(found: Findings, one: str, other: str, address: str) -> bool:
    if any(
        (link["from"], link["to"], link["address"]) == (one, other, address) and link["kind"] in (None, "refused")
        for link in found.links
    ):
        return True
    answers = found.hosts[one].answers
    resolved = answers.get("names", {}).get(other, {}).get("addresses", [])
    return address in resolved and answers.get("ssh", {}).get(other, {}).get("code") == 0
