"""Where commands get what they show and what they write: tables on the screen, JSON in files, plots.

rich draws all tables, and they look alike: headings with units, a rule, columns two spaces apart, numbers to the right.
On a terminal headings are bold, statuses have a colour unless NO_COLOR is set, and text is folded to fit. A pipe or a
file gets plain ASCII rules, no colour, and one line for each row, however long it is.

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

# A cell of a column of numbers: 1,234 or +5.2% or 2e-05, a range or a sum of them, and a remark such as (noisy).
_NUMBER = r"[-+×]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?"
_NUMBERS = re.compile(rf"{_NUMBER}(?:(?: to | ){_NUMBER})*(?: \([a-z ]+\))?")
_ENDLESS = 1 << 20  # columns of a pipe or file: nothing is folded or cut
_GAP = 2  # spaces between columns
_RULE = "    \n    \n {0}{0} \n    \n    \n    \n    \n    \n"  # rich's description of a box: a line below the headings


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], file: TextIO | None = None) -> str:
    """Draws a table, without a newline at its end.

    Args:
        heads: headings, with the unit, as in `ms a step`.
        rows: a value for each heading. Columns of numbers are aligned to the right, and a number is never folded.
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
    """A rich console that colours and folds only where a person looks on.

    Args:
        file: where it writes.
        is_terminal: whether `file` ends in a terminal; by default whether it is one.
    """
    from rich.console import Console

    is_terminal = file.isatty() if is_terminal is None else is_terminal
    return Console(
        file=file,
        force_terminal=is_terminal,  # rich itself would also follow FORCE_COLOR into a file
        force_jupyter=False,
        color_system="auto" if is_terminal and not os.environ.get("NO_COLOR") else None,
        width=None if is_terminal else _ENDLESS,
        markup=False,
        highlight=False,
        emoji=False,
    )


def draw(console: "Console", heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> "Table":
    """The table of `table`, for what takes rich's own."""
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
    """Whether cells are numbers; some may be empty, or say in words why there is none."""
    numbers = [cell for cell in column if any(character.isdigit() for character in cell)]
    return bool(numbers) and all(map(_NUMBERS.fullmatch, numbers))


def _widths(
    heads: Sequence[str], columns: Sequence[Sequence[str]], numeric: Sequence[bool], available: int
) -> list[int]:
    """Of each column: what its longest cell needs, or less where lines would be too long.

    Text and headings can be folded between words; numbers cannot.
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
    """What the numbers were measured on."""
    model = next((ln.split(":")[1].strip() for ln in _cpuinfo() if ln.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "versions": versions.installed()}


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file aside and renames it: a reader sees all of it or nothing."""
    if path.exists() and not path.is_file():  # /dev/stdout
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return
    path = path.resolve()  # a link stays one
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


def write_measurement(path: str | None, content: Mapping[str, Any]) -> None:
    """Writes a result with the machine that it was measured on, if a file was named."""
    if path:
        write_json(Path(path), {**content, "machine": machine()})


def plot(
    path: str | None, title: str, x: str, y: str, lines: Mapping[str, Sequence[tuple[float, float]]], **scales: str
) -> None:
    """Draws lines of (x, y) into a PNG, if a file was named; `xscale` and `yscale` as matplotlib has them."""
    if not path:
        return
    from matplotlib.figure import Figure  # takes a second to load

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(title=title, xlabel=x, ylabel=y, **scales)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path)
