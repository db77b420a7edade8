"""Rules, the findings that they report, and the findings that `# noqa` comments suppress."""

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
    """What a rule reports: the place, what is wrong there, and what to write instead."""

    node: ast.AST
    what: str
    fix: str


@dataclasses.dataclass(frozen=True, order=True)
class Finding:
    """A problem in a file. Lines and columns count from 1."""

    path: str
    line: int
    column: int
    code: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}: {self.code} {self.what} Fix: {self.fix}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A check with its code. The first line of the check's docstring is the title, all of it the explanation."""

    code: str
    check: Callable[[Script], Iterable[Problem]]

    @property
    def title(self) -> str:
        """One sentence that says what is wrong."""
        return self.explanation.partition("\n")[0]

    @property
    def explanation(self) -> str:
        """Why it is wrong, what is right, and when the rule reports nothing."""
        return inspect.getdoc(self.check) or self.code


def findings(script: Script, rules: Iterable[Rule]) -> list[Finding]:
    """Applies rules to a script and returns their findings by line, without those that `noqa` suppresses."""
    suppressed = _suppressions(script.source)
    found = set()
    for rule in rules:
        for node, what, fix in rule.check(script):
            first, last = node.lineno, node.end_lineno or node.lineno  # type: ignore[attr-defined]
            if not any(code in ("", rule.code) for line in (first, last) for code in suppressed.get(line, ())):
                found.add(Finding(script.path, first, script.column(node), rule.code, what, fix))
    return sorted(found)


_NOQA = re.compile(r"#\s*noqa(?::\s*(?P<codes>[A-Z]+\d+(?:[,\s]+[A-Z]+\d+)*))?", re.IGNORECASE)


def _suppressions(source: str) -> dict[int, set[str]]:
    """The codes that `# noqa: HVDnnn` comments suppress, by line. The empty code stands for all codes."""
    suppressed = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        match = _NOQA.search(token.string) if token.type == tokenize.COMMENT else None
        if match:
            suppressed[token.start[0]] = set(re.split(r"[,\s]+", (match["codes"] or "").upper()))
    return suppressed
