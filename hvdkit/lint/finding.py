"""What a rule is, what it reports, and how findings are told from those that the script's author has waived."""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from collections.abc import Callable, Iterable
from typing import NamedTuple

from hvdkit.lint.script import Script


class Problem(NamedTuple):
    """What a rule reports: where, what is wrong there, and what to write instead."""

    node: ast.AST
    what: str
    mend: str


@dataclasses.dataclass(frozen=True, order=True)
class Finding:
    """A problem of one file, at a line and a column that both count from 1."""

    path: str
    line: int
    column: int
    code: str
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}: {self.code} {self.what} Mend: {self.mend}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A check with its code; the docstring of the check is its title (first line) and its explanation."""

    code: str
    check: Callable[[Script], Iterable[Problem]]

    @property
    def title(self) -> str:
        """One sentence: what is wrong where the rule reports."""
        return self.explanation.partition("\n")[0]

    @property
    def explanation(self) -> str:
        """Why it is wrong, what is right, and when the rule stays silent."""
        return inspect.getdoc(self.check) or self.code


def findings(script: Script, rules: Iterable[Rule]) -> list[Finding]:
    """Applies rules to a script, and returns what they find in the order of the lines, less what `noqa` waives."""
    waived = _waivers(script.source)
    found = set()
    for rule in rules:
        for node, what, mend in rule.check(script):
            first, last = node.lineno, node.end_lineno or node.lineno  # type: ignore[attr-defined]
            if not any(code in ("", rule.code) for line in (first, last) for code in waived.get(line, ())):
                found.add(Finding(script.path, first, script.column(node), rule.code, what, mend))
    return sorted(found)


_NOQA = re.compile(r"#\s*noqa(?::\s*(?P<codes>[A-Z]+\d+(?:[,\s]+[A-Z]+\d+)*))?", re.IGNORECASE)


def _waivers(source: str) -> dict[int, set[str]]:
    """Codes that a `# noqa: HVDnnn` waives, by line; the empty code stands for all of them."""
    waived = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        match = _NOQA.search(token.string) if token.type == tokenize.COMMENT else None
        if match:
            waived[token.start[0]] = set(re.split(r"[,\s]+", (match["codes"] or "").upper()))
    return waived
