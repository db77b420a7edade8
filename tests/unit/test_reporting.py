"""Tables and JSON: what a terminal, a pipe and a program get."""

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from hvdkit import reporting

HEADS = ["case", "samples/s", "peak MiB a rank", "result"]
ROWS = [["-np 1", "62,727 (noisy)", 849, "ok"], ["-np 2", "1,841", 1104, "FAILED"], ["-np 4", "unknown", 7, ""]]


class File(io.StringIO):
    """A pipe."""

    encoding = "utf-8"


@pytest.fixture
def terminal(monkeypatch):
    """Opens a terminal with so many columns."""
    for name in ("NO_COLOR", "COLUMNS", "LINES", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    opened = []

    def make(columns):
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        opened.append(leader)
        # rich asks the process' own streams for their width.
        monkeypatch.setenv("COLUMNS", str(columns))
        opened.append(os.fdopen(follower, "w", encoding="utf-8"))
        return opened[-1]

    yield make
    for leader, file in zip(opened[::2], opened[1::2], strict=True):
        file.close()
        os.close(leader)


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_numbers_are_aligned_to_the_right_and_words_to_the_left():
    assert reporting.table(HEADS, ROWS, File()).splitlines() == [
        "case        samples/s  peak MiB a rank  result",
        "----------------------------------------------",
        "-np 1  62,727 (noisy)              849  ok",
        "-np 2           1,841             1104  FAILED",
        "-np 4         unknown                7",
    ]


@pytest.mark.parametrize(
    ("cells", "are_numbers"),
    [
        (["1", "1,234.5", "+5%", "-3.2e-05", "×2.5"], True),
        (["1.00 to 2.50", "0.95 (noisy)", "78% 95%", "", "not reached"], True),
        (["3.15.1"], False),
        (["10.77.0.2"], False),
        (["-np 2"], False),
        (["7", "sgd:momentum=0.9"], False),
        (["unknown", ""], False),
    ],
)
def test_which_columns_are_numbers(cells, are_numbers):
    first = reporting.table(["a very wide heading"], [[cell] for cell in cells], File()).splitlines()[2]
    assert first.startswith(" ") is are_numbers


def test_wide_characters_take_two_columns():
    rows = [["模型", "1", "x"], ["µs", "22", "y"], ["model", "3", "z"]]
    lines = reporting.table(["name", "n", "end"], rows, File()).splitlines()
    assert lines[2:] == ["模型    1  x", "µs     22  y", "model   3  z"]


def test_a_pipe_gets_long_cells_untouched(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    cell = "[red]a[/red] :smile: " + "word " * 100 + "x" * 300 + " 12"
    text = reporting.table(["long", "n"], [[cell, "1,234"]], File())
    assert text.splitlines()[2] == f"{cell}  1,234"
    assert reporting.fields([("name", cell)], File()) == f"name  {cell}"


def test_a_line_for_each_row_even_where_a_cell_has_two():
    assert len(reporting.table(["a", "b"], [["one\ntwo", "x"]], File()).splitlines()) == 3


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"])
def test_a_pipe_gets_no_colour_and_plain_ascii(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    text = reporting.table(HEADS, ROWS, File()) + reporting.fields([("loss.csv", "DIFFERS")], File())
    assert text.isascii()
    assert text.isprintable() is False, "newlines"
    assert "\x1b" not in text


def test_a_terminal_gets_colour_unless_it_is_not_wanted(terminal, monkeypatch):
    file = terminal(100)
    text = reporting.table(HEADS, ROWS, file)
    assert "\x1b[1;31mFAILED\x1b[0m" in text
    assert [line.rstrip() for line in plain(text).splitlines()] == [
        line.replace("-" * 46, "─" * 46) for line in reporting.table(HEADS, ROWS, File()).splitlines()
    ]
    assert "\x1b[1;31mDIFFERS\x1b[0m" in reporting.fields([("loss.csv", "DIFFERS")], file)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in reporting.table(HEADS, ROWS, file)


def test_a_terminal_folds_words_but_no_number(terminal):
    rows = [["some words that do not fit", "1,234,567 to 7,654,321", "a path: /data/sets/imagenet"]]
    text = plain(reporting.table(["case", "a long heading, µs", "found"], rows, terminal(60)))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 60
    assert "1,234,567 to 7,654,321" in text
    assert "/data/sets/imagenet" in text
    narrow = plain(reporting.table(HEADS, ROWS, terminal(20))).split()
    assert {"62,727", "1,841", "1104", "FAILED"} <= set(narrow)


def test_no_table_without_rows_fails():
    assert reporting.table(["a", "b"], [], File()).splitlines() == ["a  b", "----"]


def test_a_measurement_names_the_machine(tmp_path):
    reporting.write_measurement(None, {"rows": []})
    reporting.write_measurement(tmp_path / "found.json", {"rows": [1]})
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rows"] == [1]
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert found["machine"]["versions"]["keras"].startswith("3.")
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "result.json"
    reporting.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        reporting.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_json_goes_where_a_link_or_a_pipe_leads(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    reporting.write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == {"a": 1}
    program = (
        "from pathlib import Path; from hvdkit import reporting; reporting.write_json(Path('/dev/stdout'), {'a': 2})"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert json.loads(ended.stdout) == {"a": 2}


@pytest.mark.parametrize("program", ["import hvdkit", "import hvdkit.reporting, hvdkit.launch.__main__"])
def test_rich_is_loaded_by_who_draws(program):
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys; {program}; sys.exit('rich' in sys.modules)"], timeout=60, check=False
    )
    assert ended.returncode == 0
