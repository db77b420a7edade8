"""How options are spelled, the same for all jobs: shown as --start-timeout, and also taken as --start_timeout."""

import argparse
import itertools
from collections.abc import Callable, Iterable
from typing import Any


class Parser(argparse.ArgumentParser):
    """The parser of a job's command line.

    Every long option may be written with dashes or with underscores, and has no abbreviations: a job that gains an
    option would change what they mean. Define options with dashes, which is what help and errors show.

    Args:
        job: the job's name, as behind `hvdkit`.
        **settings: argparse's.
    """

    def __init__(self, job: str = "", **settings: Any) -> None:
        settings = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **settings}
        super().__init__(**{"prog": f"hvdkit {dashed(job)}", **settings})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses as argparse does; each option under both of its names."""
        options = self._option_string_actions  # help and errors read the names in the actions instead
        for name, action in list(options.items()):
            if name.startswith("--"):
                options.setdefault(f"--{underscored(name[2:])}", action)
        return super().parse_known_args(args, namespace)


def dashed(name: str) -> str:
    """A name as it is shown."""
    return name.replace("_", "-")


def underscored(name: str) -> str:
    """A name as Python and absl have it."""
    return name.replace("-", "_")


def as_absl_has_them(arguments: Iterable[str], known: Callable[[str], tuple[str, bool] | None]) -> list[str]:
    """The same arguments, with the names of known flags as absl spells them. Values stay as they are.

    Args:
        arguments: flags as --name=value, --name value or --name, and what stands behind a --.
        known: for a name with underscores, the flag's own name, and whether it takes a value; None for others.
    """
    spelled: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*spelled, argument, *rest]
        name, equals, value = argument.partition("=")
        flag = known(underscored(name.lstrip("-"))) if argument.startswith("-") else None
        if flag is None:
            spelled.append(argument)
            continue
        spelled.append(f"--{flag[0]}{equals}{value}")
        if flag[1] and not equals:
            spelled.extend(itertools.islice(rest, 1))  # the value, whatever it looks like
    return spelled
