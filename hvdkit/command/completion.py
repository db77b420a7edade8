"""Shell completion of `hvdkit` with shtab, which generates a static script: pressing TAB does not start Python."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

from hvdkit.command.arguments import Parser, dashed
from hvdkit.command.jobs import JOBS

_SHELLS = ("bash", "zsh", "fish")
_FILES = ("FILE", "FILE.png", "PATH", "RUN_FOLDER", "DIR")


def show(shells: list[str]) -> int:
    """Print the completion script for the named shell and return the exit code: 2 for a usage error."""
    if len(shells) != 1 or shells[0] not in _SHELLS:
        given = " ".join(shells) or "nothing"
        expected = ", ".join(_SHELLS)
        print(f"hvdkit: --print-completion was given {given}, and expects one of: {expected}.", file=sys.stderr)
        return 2
    try:
        import shtab
    except ImportError:
        print("hvdkit: --print-completion needs the package shtab: pip install shtab", file=sys.stderr)
        return 2
    parser = whole_parser()
    for action in _actions(parser):
        if action.metavar in _FILES:
            action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shells[0]))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """Create a parser with all jobs as subcommands. This imports the jobs, but not TensorFlow."""
    parser = Parser(prog="hvdkit", description="Train Keras 3 models on TensorFlow with Horovod.")
    parser.add_argument("--version", action="store_true", help="versions, and how Horovod was built")
    parser.add_argument("--print-completion", choices=_SHELLS, help="print this shell's completion script")
    make: Any = _ready_made
    commands = parser.add_subparsers(metavar="JOB", parser_class=make)
    for job, summary in JOBS.items():
        commands.add_parser(dashed(job), help=summary, ready=parser_of(job))
    return parser


def parser_of(job: str) -> argparse.ArgumentParser:
    """Return the parser that the `parser()` function of the job's module creates."""
    name = f"hvdkit.{job}"
    spec = importlib.util.find_spec(name)
    is_package = spec is not None and spec.submodule_search_locations is not None
    module = importlib.import_module(f"{name}.__main__" if is_package else name)
    parser: argparse.ArgumentParser = module.parser()
    return parser


def _ready_made(*, ready: Any, **_: Any) -> Any:
    return ready


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _actions(child)
