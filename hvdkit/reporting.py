"""Tables on the screen, JSON in a file, plots: how every measurement is shown."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdkit import versions


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in GitHub's Markdown, its columns aligned."""
    texts = [[str(cell) for cell in row] for row in [heads, *rows]]
    widths = [max(len(row[column]) for row in texts) for column in range(len(heads))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in texts]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = next((ln.split(":")[1].strip() for ln in _cpuinfo() if ln.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "versions": versions.installed()}


def write_measurement(path: str | None, content: dict[str, Any]) -> None:
    """Writes a result with the machine that it is of, if a file was named."""
    if path:
        Path(path).write_text(json.dumps({**content, "machine": machine()}, indent=2) + "\n")


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


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file aside and renames it: a reader sees all of it or nothing."""
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
