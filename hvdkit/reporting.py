"""Output of commands: tables on the screen, JSON files, plots.

rich draws all tables in one style: headings with units, a rule, columns two spaces apart, numbers aligned to the right.
On a terminal headings are bold, statuses have a color unless NO_COLOR is set, and text is wrapped to fit. In a pipe or
a file there are plain ASCII rules, no color, and one line per row, however long.

rich is imported inside the functions: it takes 0.1 s to load, and neither `import hvdkit` nor the launcher needs it.
"""

import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hvdkit import versions

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

COLOURS = {
    **dict.fromkeys(("ok", "done", "equal"), "green"),
    **dict.fromkeys(("warning", "ended early"), "yellow"),
    **dict.fromkeys(("FAILED", "failed", "DIFFERS"), "bold red"),
}
"""Of cells that are exactly this text."""

# A cell in a column of numbers: 1,234 or +5.2% or 2e-05, a range or a sum of them, and a remark such as (noisy).
_NUMBER = r"[-+×]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?"
_NUMBERS = re.compile(rf"{_NUMBER}(?:(?: to | ){_NUMBER})*(?: \([a-z ]+\))?")
_ENDLESS = 1 << 20  # width of a pipe or file: nothing is wrapped or cut
_PLAIN_NUMBERS = 10_000  # on logarithmic axes; larger ones are shown as powers of ten
_GAP = 2  # spaces between columns
_RULE = "    \n    \n {0}{0} \n    \n    \n    \n    \n    \n"  # rich's description of a box: a line below the headings


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], file: TextIO | None = None) -> str:
    """Draws a table, without a newline at its end.

    Args:
        heads: headings, with the unit, as in `ms a step`.
        rows: one value per heading. Columns of numbers are aligned to the right, and numbers are never wrapped.
        file: where the table will be printed [sys.stdout].
    """
    console = console_for(file or sys.stdout)
    return _text(console, draw(console, heads, rows))


def fields(rows: Sequence[tuple[str, str]], file: TextIO | None = None) -> str:
    """Draws names and their values in two columns, without headings and without a newline at the end."""
    from rich.table import Table
    from rich.text import Text

    console = console_for(file or sys.stdout)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(Text(name), Text(value, COLOURS.get(value, "")))
    return _text(console, grid)


def console_for(file: TextIO, is_terminal: bool | None = None) -> "Console":
    """Returns a rich console that colors and wraps text only on a terminal.

    Args:
        file: where it writes.
        is_terminal: whether `file` leads to a terminal; by default whether it is one.
    """
    from rich.console import Console

    is_terminal = file.isatty() if is_terminal is None else is_terminal
    return Console(
        file=file,
        force_terminal=is_terminal,  # otherwise rich follows FORCE_COLOR even for a file
        force_jupyter=False,
        color_system="auto" if is_terminal and not os.environ.get("NO_COLOR") else None,
        width=None if is_terminal else _ENDLESS,
        markup=False,
        highlight=False,
        emoji=False,
    )


def draw(console: "Console", heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> "Table":
    """Returns the table of `table` as a rich table."""
    from rich.box import Box
    from rich.table import Table
    from rich.text import Text

    cells = [[str(cell).replace("\n", " ") for cell in row] for row in rows]
    columns = [[row[place] for row in cells] for place in range(len(heads))]
    numeric = [_is_numeric(column) for column in columns]
    widths = _widths(heads, columns, numeric, console.width)
    console.width = max(console.width, sum(widths) + _GAP * (len(heads) - 1))  # rich would cut what does not fit
    rule = "─" if console.is_terminal and console.encoding.startswith("utf") else "-"
    box = Box(_RULE.format(rule), ascii=rule == "-")
    drawn = Table(box=box, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0), header_style="bold")
    for head, width, is_number in zip(heads, widths, numeric, strict=True):
        drawn.add_column(Text(head), width=width, justify="right" if is_number else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*(Text(cell, COLOURS.get(cell, "")) for cell in row))
    return drawn


def _is_numeric(column: Sequence[str]) -> bool:
    """Returns whether cells are numbers; some may be empty, or explain in words why there is no number."""
    numbers = [cell for cell in column if any(character.isdigit() for character in cell)]
    return bool(numbers) and all(map(_NUMBERS.fullmatch, numbers))


def _widths(
    heads: Sequence[str], columns: Sequence[Sequence[str]], numeric: Sequence[bool], available: int
) -> list[int]:
    """Returns the width of each column: that of its longest cell, or less if lines would be too long.

    Text and headings can be wrapped between words; numbers cannot.
    """
    from rich.cells import cell_len

    widths, least = [], []
    for head, column, is_number in zip(heads, columns, numeric, strict=True):
        pieces = [*head.split(), *(column if is_number else " ".join(column).split()), ""]
        least.append(max(map(cell_len, pieces)))
        widths.append(max(map(cell_len, [head, *column])))
    for _ in range(sum(widths) + _GAP * (len(widths) - 1) - available):
        place = max(range(len(widths)), key=lambda n: widths[n] - least[n])
        widths[place] = max(widths[place] - 1, least[place])
    return widths


def _text(console: "Console", drawn: "RenderableType") -> str:
    with console.capture() as captured:
        console.print(drawn, crop=False)
    return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))


def machine() -> dict[str, Any]:
    """Describes the machine of the measurements."""
    model = next((ln.split(":")[1].strip() for ln in _cpuinfo() if ln.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "versions": versions.installed()}


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file under a temporary name and renames it: a reader sees all of it or nothing."""
    if path.exists() and not path.is_file():  # /dev/stdout
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return
    path = path.resolve()  # replaces the target of a link, not the link
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file; None if it is missing or incomplete."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_measurement(path: Path | None, content: Mapping[str, Any]) -> None:
    """Writes a result with a description of this machine, if `path` is given."""
    if path:
        write_json(path, {**content, "machine": machine()})


def plot(
    path: Path | None, title: str, x: str, y: str, lines: Mapping[str, Sequence[tuple[float, float]]], **scales: str
) -> None:
    """Draws lines of (x, y) into a PNG, if `path` is given; `xscale` and `yscale` are as in matplotlib.

    The line named `ideal` is dashed. Logarithmic axes of numbers up to 10,000 show them in plain digits, the horizontal
    one at the points.
    """
    if not path:
        return
    from matplotlib.figure import Figure  # takes a second to load
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, ScalarFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        style: dict[str, Any] = {"color": "gray", "linestyle": "--"} if name == "ideal" else {"marker": "o"}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set(title=title, xlabel=x, ylabel=y, **scales)
    xs, ys = ({point[place] for points in lines.values() for point in points} for place in (0, 1))
    for axis, scale, numbers, locator in (
        (axes.xaxis, scales.get("xscale"), xs, FixedLocator(sorted(xs))),
        (axes.yaxis, scales.get("yscale"), ys, LogLocator(base=2)),
    ):
        if scale == "log" and max(numbers) <= _PLAIN_NUMBERS:
            axis.set(major_locator=locator, minor_locator=NullLocator(), major_formatter=ScalarFormatter())
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path)
