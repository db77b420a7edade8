"""The search space: flags of the training and their possible values, as given on the command line."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any

from hvdkit.command.arguments import underscored
from hvdkit.errors import UsageError

FORMS = {
    "grid": "--grid FLAG=A,B,C",
    "choice": "--choice FLAG=A,B,C",
    "random": "--random 'FLAG=LOW..HIGH' or --random 'FLAG=LOW..HIGH log'",
    "int": "--int 'FLAG=LOW..HIGH', 'FLAG=LOW..HIGH:STEP' or 'FLAG=LOW..HIGH log'",
}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?::(\d+))?(?:\s+(log))?")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A flag of the training and its possible values.

    Attributes:
        flag: its name without dashes.
        kind: `grid` (all values), `choice` (one of the values), `random` (a number in a range) or `int` (an integer in
            a range).
        values: the values of `grid` and `choice`.
        low: the least value of a range, inclusive.
        high: the largest value of a range, inclusive.
        step: the distance of two integers.
        log: whether to draw on a logarithmic scale.
    """

    flag: str
    kind: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: int = 1
    log: bool = False

    def extremes(self) -> tuple[Any, ...]:
        """The values with which to check the flag: all listed values, or the ends of the range."""
        return self.values or (self.low, self.high)

    def suggest(self, trial: Any) -> Any:
        """Its value in an Optuna trial: the value enqueued for the trial, or one that the sampler draws."""
        if self.values:
            return trial.suggest_categorical(self.flag, self.values)
        if self.kind == "int":
            return trial.suggest_int(self.flag, self.low, self.high, step=self.step, log=self.log)
        return trial.suggest_float(self.flag, self.low, self.high, log=self.log)


def parse(kind: str, text: str) -> Parameter:
    """Parses one option of the command line.

    Separate values with commas, or with `|` if they contain commas
    (`--choice 'optimizer=adam|sgd:momentum=0.9,nesterov=True'`).

    Args:
        kind: the option's name: `grid`, `choice`, `random` or `int`.
        text: its value, `FLAG=...`.

    Raises:
        UsageError: the text does not have the option's form, or a range is empty.
    """
    flag, _, given = text.strip().lstrip("-").partition("=")
    flag = underscored(flag)
    if not flag.isidentifier() or not given.strip():
        raise _misunderstood(kind, text, "expected a flag's name and its values")
    if kind in ("grid", "choice"):
        return Parameter(flag, kind, _listed(kind, text, given))
    match = _RANGE.fullmatch(given.strip())
    if not match or (kind == "random" and match[3]):
        raise _misunderstood(kind, text, "expected two numbers with .. between them")
    low, high = (_whole(kind, text, part) if kind == "int" else float(part) for part in match.group(1, 2))
    if not low < high:
        raise _misunderstood(kind, text, "the first number must be less than the second")
    if match[4] and low <= 0:
        raise _misunderstood(kind, text, "a range on a logarithmic scale must begin above 0")
    if match[4] and match[3]:
        raise _misunderstood(kind, text, "a step and log exclude each other")
    return Parameter(flag, kind, (), low, high, int(match[3] or 1), bool(match[4]))


def points(parameters: Sequence[Parameter], repeats: int) -> list[dict[str, Any]]:
    """The preset values of all trials: every combination of the grid, `repeats` times.

    More repeats only append points, so you can extend a sweep.
    """
    grid = [p for p in parameters if p.kind == "grid"]
    names = [parameter.flag for parameter in grid]
    return [dict(zip(names, each, strict=True)) for each in itertools.product(*(p.values for p in grid))] * repeats


def flags(values: dict[str, Any]) -> list[str]:
    """The flags of a trial."""
    return [f"--{name}={value}" for name, value in values.items()]


def words(values: dict[str, Any]) -> str:
    """The values of a trial in words, with short numbers."""
    return " ".join(f"{name}={short(value)}" for name, value in values.items())


def short(value: Any) -> str:
    """A value with at most four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _listed(kind: str, text: str, given: str) -> tuple[Any, ...]:
    parts = [part.strip() for part in given.split("|" if "|" in given else ",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise _misunderstood(kind, text, "values must be neither empty nor repeated")
    return tuple(_value(part) for part in parts)


def _value(text: str) -> int | float | str:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _whole(kind: str, text: str, number: str) -> int:
    if not re.fullmatch(r"[-+]?\d+", number):
        raise _misunderstood(kind, text, f"{number} is not an integer; use --random for other numbers")
    return int(number)


def _misunderstood(kind: str, text: str, why: str) -> UsageError:
    return UsageError(f"--{kind} {text} is not understood: {why}. The form is {FORMS[kind]}.")
