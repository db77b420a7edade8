"""What the options of all jobs have in common.

They are shown as --start-timeout, and also accepted as --start_timeout; files to write are checked before any work.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class Parser(argparse.ArgumentParser):
    """The parser of a job's command line.

    Define options with dashes: help and error messages show this form. Users may write dashes or underscores.
    Abbreviations of options are not accepted, because a new option could change their meaning.

    Args:
        job: the job's name, as in `hvdkit JOB`.
        **settings: arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, job: str = "", **settings: Any) -> None:
        settings = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **settings}
        super().__init__(**{"prog": f"hvdkit {dashed(job)}", **settings})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and accept both spellings of each option."""
        options = self._option_string_actions  # help and errors use the names in the actions
        for name, action in list(options.items()):
            if name.startswith("--"):
                options.setdefault(f"--{underscored(name[2:])}", action)
        return super().parse_known_args(args, namespace)


def new_file(text: str) -> Path:
    """Convert the value of an option, for argparse: a file that the job writes when its work is done.

    Raises:
        argparse.ArgumentTypeError: it could not be written.
    """
    path = Path(text).expanduser()
    folder = path.absolute().parent
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; give the name of a file")
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {folder} for {path.name}; create it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written; choose another file, or change its permissions")
    return path


def dashed(name: str) -> str:
    """Return a name with dashes, as help and errors show it."""
    return name.replace("_", "-")


def underscored(name: str) -> str:
    """Return a name with underscores, as Python and absl use it."""
    return name.replace("-", "_")


def as_absl_has_them(arguments: Iterable[str], known: Callable[[str], tuple[str, bool] | None]) -> list[str]:
    """Return the arguments with the names of known flags spelled as absl expects. Values do not change.

    Args:
        arguments: flags as --name=value, --name value or --name. Arguments after `--` stay as they are.
        known: function from a name with underscores to the flag's name and whether it takes a value. It returns None
            for an unknown name.
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
            spelled.extend(itertools.islice(rest, 1))  # the value, even if it looks like a flag
    return spelled
