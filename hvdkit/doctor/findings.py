"""The unjudged findings of an examination: plain data, as `--json` writes it."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class HostFindings:
    """The findings on one host.

    Attributes:
        slots: its number of ranks.
        is_here: whether the doctor itself runs on it.
        unreachable: ssh's error, if the doctor could not reach it.
        answers: the host's answers by question (`Probe.answer_*`).
        problems: by question, why there is no answer.
    """

    slots: int
    is_here: bool = False
    unreachable: str | None = None
    answers: dict[str, Any] = dataclasses.field(default_factory=dict)
    problems: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Findings:
    """The findings on all hosts.

    Attributes:
        settings: the settings of the examination: python, workdir, dataset, data_dir.
        hosts: by name, in the order given.
        links: for each pair of hosts, address and port: {from, to, address, port, problem, kind, seconds}; `seconds` is
            the shortest round trip.
        streams: for each pair {from, to, bytes, seconds} or {from, to, problem}.
        exchange: the result of the ranks' allreduce: {ranks: [{rank, size, right, bytes, seconds, device}]}, or
            {problem} or {skipped} with the reason.
        seconds: the duration of the examination.
    """

    settings: dict[str, Any]
    hosts: dict[str, HostFindings]
    links: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    streams: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    exchange: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Findings":
        """The inverse of `dataclasses.asdict`."""
        hosts = {name: HostFindings(**host) for name, host in content["hosts"].items()}
        return cls(**{**content, "hosts": hosts})

    @property
    def here(self) -> str | None:
        """The host on which the doctor runs, if it is one of them."""
        return next((name for name, host in self.hosts.items() if host.is_here), None)

    @property
    def reached(self) -> list[str]:
        """The hosts that the doctor reached."""
        return [name for name, host in self.hosts.items() if host.unreachable is None]

    def answered(self, question: str) -> dict[str, Any]:
        """The answers to a question by host, without the hosts that gave none."""
        return {name: host.answers[question] for name, host in self.hosts.items() if question in host.answers}

    def pairs(self) -> list[tuple[str, str]]:
        """All ordered pairs of hosts that were reached."""
        return [(one, other) for one in self.reached for other in self.reached if one != other]

    def good_addresses(self, name: str) -> list[str]:
        """A host's addresses at which every other host could connect to every port."""
        tried: dict[str, list[bool]] = {}
        for link in self.links:
            if link["to"] == name:
                tried.setdefault(link["address"], []).append(link["problem"] is None)
        return [address for address, results in tried.items() if all(results)]
