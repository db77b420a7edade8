"""Checks, their results, and how checks are applied to findings."""

import dataclasses
import inspect
import shlex
from collections.abc import Callable, Iterable, Iterator

from hvdkit.doctor.findings import Findings

OK, WARNING, FAILED, NOT_RUN = "ok", "warning", "FAILED", "not run"
_NAMED = 4  # the most hosts that a summary lists


@dataclasses.dataclass(frozen=True)
class Fix:
    """A command that fixes a problem, and the host to run it on; None for the doctor's own host."""

    command: str
    on: str | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """A check's result for a host, a pair of hosts, or all hosts.

    Attributes:
        status: `ok`, `warning`, `FAILED` or `not run`.
        where: a host, `h1 -> h2`, or `all`.
        found: what was found, and if it is wrong, what was expected.
        fixes: how to fix it: alternatives or steps, one command each.
    """

    status: str
    where: str
    found: str
    fixes: tuple[Fix, ...] = ()
    check: str = ""


def fine(found: str) -> Result:
    """The check passed. The report shows it only if the check has no failure or warning."""
    return Result(OK, "all", found)


def failed(where: str, found: str, *fixes: Fix) -> Result:
    """A job would fail or compute wrong results."""
    return Result(FAILED, where, found, fixes)


def warned(where: str, found: str, *fixes: Fix) -> Result:
    """A job would run, but poorly."""
    return Result(WARNING, where, found, fixes)


def not_run(why: str) -> Result:
    """There was nothing to check, or another failure must be fixed first."""
    return Result(NOT_RUN, "all", why)


@dataclasses.dataclass(frozen=True)
class Check:
    """A check. The first line of the function's docstring states what is true if the check passes.

    Attributes:
        name: its name on the command line.
        judge: the function.
        asks: a question that every host must have answered; a missing answer is a failure. Checks that interpret a
            missing answer themselves leave it out and read `Findings`.
    """

    name: str
    judge: Callable[[Findings], Iterable[Result]]
    asks: str | None

    @property
    def title(self) -> str:
        """What is true if the check passes."""
        return (inspect.getdoc(self.judge) or self.name).partition("\n")[0]


def check(name: str, asks: str | None = None) -> Callable[[Callable[[Findings], Iterable[Result]]], Check]:
    """Turns a function into a check; see `Check` for the arguments."""
    return lambda function: Check(name, function, asks)


def results_of(each: Check, found: Findings) -> list[Result]:
    """The failures and warnings of a check; without any, its first result."""
    said = [*_unanswered(each, found), *each.judge(found)]
    bad = [result for result in said if result.status in (FAILED, WARNING)]
    return [dataclasses.replace(result, check=each.name) for result in bad or said[:1]]


def _unanswered(each: Check, found: Findings) -> Iterator[Result]:
    for name in found.reached if each.asks else ():
        if each.asks in found.hosts[name].problems:
            problem = found.hosts[name].problems[each.asks]
            yield failed(name, f"could not be examined: {problem}", Fix(f"ssh {shlex.quote(name)} uptime"))


def summary(values: dict[str, str]) -> str:
    """The hosts' values: one value if it is the same on all hosts, otherwise one per host."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    named = [f"{name}: {value}" for name, value in values.items()][:_NAMED]
    more = len(values) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more else "")


def sudo(found: Findings, name: str) -> str:
    """The prefix of commands that need root on a host: `sudo ` or nothing."""
    is_root = name in found.hosts and found.hosts[name].answers.get("host", {}).get("is_root")
    return "" if is_root else "sudo "
