"""Finds mistakes in Keras training scripts that only show on several ranks.

    hvdkit lint train_mine.py

The exit code is 0 without findings, 1 with findings, and 2 if a file cannot be read. `# noqa: HVD202` at the end of a
line suppresses a finding there.
"""

import dataclasses
import json
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from hvdkit import outcome
from hvdkit.command.arguments import Parser
from hvdkit.errors import UsageError
from hvdkit.lint.finding import Finding, Rule, findings
from hvdkit.lint.rules import RULES
from hvdkit.lint.script import Script


def main(argv: list[str]) -> int:
    """Checks the files on the command line, prints the findings, and returns the exit code."""
    arguments = parser().parse_args(argv[1:])
    if not (arguments.paths or arguments.explain or arguments.list):
        parser().error("no script was given, as in: hvdkit lint train.py")
    if arguments.list:
        print("\n".join(f"{rule.code}  {rule.title}" for rule in RULES))
        return 0
    try:
        if arguments.explain:
            print("\n\n".join(f"{rule.code}: {rule.explanation}" for rule in _chosen(arguments.explain)))
            return 0
        ignored = _chosen(arguments.ignore) if arguments.ignore else []
        rules = [rule for rule in _chosen(arguments.select) if rule not in ignored]
        files = [file for path in arguments.paths for file in _files(Path(path))]
    except UsageError as error:
        print(f"hvdkit.lint: {error}", file=sys.stderr)
        return outcome.USAGE
    return _check(list(dict.fromkeys(files)), rules, arguments.json)


def _check(files: list[Path], rules: list[Rule], as_json: bool) -> int:
    found: list[Finding] = []
    unread: list[str] = []
    for file in files:
        try:
            found += findings(read(file), rules)
        except UsageError as error:
            unread.append(str(error))
    if as_json:
        report = {"files": len(files), "findings": [dataclasses.asdict(f) for f in found], "unread": unread}
        print(json.dumps(report, indent=2))
    else:
        for finding in found:
            print(finding)
        for sentence in unread:
            print(f"hvdkit.lint: {sentence}", file=sys.stderr)
        print(f"{len(found) or 'no'} finding(s) in {len(files) - len(unread)} file(s)")
    return outcome.USAGE if unread else int(bool(found))


def read(file: Path) -> Script:
    """Reads and parses a file, without running it.

    Raises:
        UsageError: the file cannot be read, or is not Python.
    """
    try:
        with tokenize.open(file) as stream:  # honours encoding declarations
            return Script(stream.read(), str(file))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}. Give the path of a Python file.") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not UTF-8 text (at byte {error.start}). Save it as UTF-8, or declare its encoding."
        ) from None
    except SyntaxError as error:
        where = f"{file}:{error.lineno}" if error.lineno else str(file)
        raise UsageError(
            f"{where} is not Python {sys.version_info.major}.{sys.version_info.minor}: {error.msg}. Fix it first."
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"{file} cannot be parsed as Python: {error}.") from None


def _files(path: Path) -> Iterator[Path]:
    """The file itself, or all Python files under a folder, except in virtual environments and hidden folders."""
    if not path.is_dir():
        yield path
        return
    files = [file for file in sorted(path.rglob("*.py")) if not _is_foreign(file, path)]
    if not files:
        raise UsageError(f"There is no Python file under {path}. Give the path of a script.")
    yield from files


def _is_foreign(file: Path, root: Path) -> bool:
    folders = file.relative_to(root).parents[:-1]
    return any(folder.name.startswith(".") or (root / folder / "pyvenv.cfg").exists() for folder in folders)


def _chosen(codes: str) -> list[Rule]:
    """The rules whose codes start with one of these comma-separated prefixes."""
    chosen = []
    for code in [c.strip().upper() for c in codes.split(",") if c.strip()]:
        matching = [rule for rule in RULES if rule.code.startswith(code)]
        if not matching:
            known = ", ".join(rule.code for rule in RULES)
            raise UsageError(f"There is no rule {code!r}. The rules are {known}; HVD4 stands for all of HVD4xx.")
        chosen += matching
    return [rule for rule in RULES if rule in chosen]


def parser() -> Parser:
    """Returns the linter's parser."""
    made = Parser("lint", description=__doc__)
    made.add_argument("paths", nargs="*", metavar="PATH", help="scripts, or folders of scripts")
    made.add_argument(
        "--select", default="HVD", metavar="CODES", help="check only these rules, for example HVD301,HVD5"
    )
    made.add_argument("--ignore", metavar="CODES", help="skip these rules")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    made.add_argument("--explain", metavar="CODES", help="explain rules, with wrong and right code")
    made.add_argument("--list", action="store_true", help="list the rules")
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv))
