"""What a check is, what it yields, and how all of them are applied to what was found."""

import dataclasses
import inspect
import shlex
from collections.abc import Callable, Iterable, Iterator

from hvdkit.doctor.findings import Findings

OK, WARNING, FAILED, NOT_RUN = "ok", "warning", "FAILED", "not run"
_NAMED = 4  # hosts that are named one by one in a summary


@dataclasses.dataclass(frozen=True)
class Mend:
    """A command that mends something, and the host to run it on; None is where the doctor runs."""

    command: str
    on: str | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What a check says about a host, a pair of hosts, or all of them.

    Attributes:
        status: `ok`, `warning`, `FAILED` or `not run`.
        where: a host, `h1 -> h2`, or `all`.
        found: what was found, and where it is wrong, what was expected.
        mends: what to do about it, each way or step one command.
    """

    status: str
    where: str
    found: str
    mends: tuple[Mend, ...] = ()
    check: str = ""


def fine(found: str) -> Result:
    """All is as it should be; shown if the check has nothing else to say."""
    return Result(OK, "all", found)


def failed(where: str, found: str, *mends: Mend) -> Result:
    """A job would fail, or be wrong."""
    return Result(FAILED, where, found, mends)


def warned(where: str, found: str, *mends: Mend) -> Result:
    """A job would run, but not well."""
    return Result(WARNING, where, found, mends)


def not_run(why: str) -> Result:
    """There was nothing to examine, or something else has to be mended first."""
    return Result(NOT_RUN, "all", why)


@dataclasses.dataclass(frozen=True)
class Check:
    """A check by its name; the first line of the function's docstring says what is so where all is well.

    Attributes:
        name: what users call it.
        judge: the function.
        asks: a question that every host must have an answer to; where one has none, that is a failure by itself. Checks
            for which the lack of an answer means something look into `Findings` on their own.
    """

    name: str
    judge: Callable[[Findings], Iterable[Result]]
    asks: str | None

    @property
    def title(self) -> str:
        """What is so where all is well."""
        return (inspect.getdoc(self.judge) or self.name).partition("\n")[0]


def check(name: str, asks: str | None = None) -> Callable[[Callable[[Findings], Iterable[Result]]], Check]:
    """Makes a function a check; see `Check` for the arguments."""
    return lambda function: Check(name, function, asks)


def results_of(each: Check, found: Findings) -> list[Result]:
    """What a check says: its failures and warnings, or else its first word."""
    said = [*_unanswered(each, found), *each.judge(found)]
    bad = [result for result in said if result.status in (FAILED, WARNING)]
    return [dataclasses.replace(result, check=each.name) for result in bad or said[:1]]


def _unanswered(each: Check, found: Findings) -> Iterator[Result]:
    for name in found.reached if each.asks else ():
        if each.asks in found.hosts[name].problems:
            problem = found.hosts[name].problems[each.asks]
            yield failed(name, f"could not be examined: {problem}", Mend(f"ssh {shlex.quote(name)} uptime"))


def summary(values: dict[str, str]) -> str:
    """What hosts have: once if it is the same on all, else host by host."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    named = [f"{name}: {value}" for name, value in values.items()][:_NAMED]
    more = len(values) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more else "")


def sudo(found: Findings, name: str) -> str:
    """What a command of the administrator's begins with on a host."""
    is_root = name in found.hosts and found.hosts[name].answers.get("host", {}).get("is_root")
    return "" if is_root else "sudo "
