"""`ProgressCallback` on a terminal, behind a launcher's pipe, and in a file."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from hvdkit import callbacks
from hvdkit.launch.console import Console

STEPS, EPOCHS, BATCH = 4, 3, 2
METRICS = {"loss": 0.25, "accuracy": 0.5}
EPOCH_LINE = r"epoch {}/3: loss=0\.25, accuracy=0\.5, [\d,]+ samples/s, 00:0\d left"


@pytest.fixture(autouse=True)
def nobody_watches(monkeypatch):
    for name in ("HVDKIT_PROGRESS", "COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_nothing_is_said_of_the_speed_before_it_is_known(capsys):
    progress = callbacks.ProgressCallback(1, 1, BATCH)
    progress.on_train_begin()
    progress.on_epoch_begin(0)
    progress.on_train_batch_end(0, METRICS)
    progress.on_epoch_end(0, METRICS)
    assert capsys.readouterr().err == "epoch 1/1: loss=0.25, accuracy=0.5\n"


def train(logs=METRICS, **arguments):
    progress = callbacks.ProgressCallback(STEPS * EPOCHS, STEPS, BATCH, **arguments)
    progress.on_train_begin()
    for epoch in range(EPOCHS):
        progress.on_epoch_begin(epoch)
        for batch in range(STEPS):
            progress.on_train_batch_end(batch, logs)
        progress.on_epoch_end(epoch, logs)
    progress.on_train_end()
    return progress


@pytest.fixture
def on_terminal(monkeypatch):
    """Calls a function whose stderr is a terminal with so many columns, and returns what it has written."""

    def run(function, columns=100):
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        monkeypatch.setenv("COLUMNS", str(columns))  # rich asks the process' own streams, which pytest has taken
        with os.fdopen(follower, "w", encoding="utf-8") as file:
            with monkeypatch.context() as patched:
                patched.setattr(sys, "stderr", file)
                function()
            file.flush()
            written = b""
            os.set_blocking(leader, False)
            while piece := _read(leader):
                written += piece
        os.close(leader)
        return written.decode()

    return run


def _read(file):
    try:
        return os.read(file, 1 << 16)
    except OSError:  # nothing is there
        return b""


def shown(text):
    """The lines that a terminal shows in the end."""
    lines = [""]
    place = 0
    for piece in re.findall(r"\r|\n|\x1b\[[0-9;?]*[A-Za-z]|[^\r\n\x1b]+", text):
        if piece == "\r":
            place = 0
        elif piece == "\n":
            lines.append("")
            place = 0
        elif piece == "\x1b[2K":
            lines[-1] = ""
        elif not piece.startswith("\x1b"):
            lines[-1] = lines[-1].ljust(place)[:place] + piece + lines[-1][place + len(piece) :]
            place += len(piece)
    return [line.rstrip() for line in lines if line.strip()]


def test_a_terminal_shows_a_line_for_each_epoch_and_one_that_moves(on_terminal):
    text = on_terminal(train)
    lines = shown(text)
    assert len(lines) == EPOCHS + 1, lines
    for epoch, line in enumerate(lines[:-1]):
        assert re.fullmatch(EPOCH_LINE.format(epoch + 1), line)
    assert re.fullmatch(r"epoch 3/3 100% ━{20} [\d,]+ samples/s, 00:00 left, loss=0\.25, accuracy=0\.5", lines[-1]), (
        lines[-1]
    )
    assert "\x1b[?25l" not in text, "a rank that is killed would leave the terminal without its cursor"


def test_metrics_that_do_not_fit_are_cut_off_the_line_but_not_off_the_epochs(on_terminal):
    many = {f"metric_{number}": number for number in range(20)}
    lines = shown(on_terminal(lambda: train(many), columns=60))
    assert lines[-1].startswith("epoch 3/3 100% ━━━")
    assert lines[-1].endswith("…")
    assert len(lines[-1]) <= 60
    assert len(lines) == EPOCHS + 1
    assert "metric_19=19, " in lines[0]


def test_no_colour_leaves_only_the_moves_of_the_cursor(on_terminal, monkeypatch):
    assert re.search(r"\x1b\[[0-9;]*m", on_terminal(train))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*m", on_terminal(train))


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_gets_plain_lines(on_terminal, monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    text = on_terminal(train)
    assert "\x1b" not in text
    assert len(shown(text)) == EPOCHS


def test_a_file_gets_a_line_for_each_epoch(capfd):
    train()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == EPOCHS
    for epoch, line in enumerate(lines):
        assert re.fullmatch(EPOCH_LINE.format(epoch + 1), line)


def test_other_ranks_measure_and_show_nothing(on_terminal):
    rates = []
    assert on_terminal(lambda: rates.append(train(show=False).samples_per_second)) == ""
    assert rates[0] > 0


def test_a_training_that_was_interrupted_is_measured_in_all_its_runs():
    first = train(show=False)
    again = callbacks.ProgressCallback(STEPS * EPOCHS, STEPS, BATCH, show=False)
    again.on_train_begin()
    again.restore_state(first.checkpoint_state())
    assert again.samples_per_second == pytest.approx(first.samples_per_second)
    again.on_train_end()
    assert first.seconds < again.seconds
    assert again.checkpoint_state()["measured"] == first.checkpoint_state()["measured"]
    assert again.checkpoint_state()["measured"][1] == STEPS * EPOCHS - 1, "the first step is not measured"


def test_the_launcher_passes_the_line_on_and_keeps_it_out_of_the_log(monkeypatch, tmp_path, on_terminal):
    """The rank's own stderr is a pipe; what it writes there moves on the launcher's terminal."""
    piped = io.StringIO()
    monkeypatch.setenv("HVDKIT_PROGRESS", "bar")
    monkeypatch.setenv("COLUMNS", "100")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", piped)
        train()
    text = piped.getvalue()
    before, first, after = text.partition("epoch 2/3:")
    data = f"{before}WARNING of rank 0\n\r{first}{after}".encode()

    def show():
        console = Console("errors", tmp_path)
        for begin in range(0, len(data), 100):
            console.feed(0, data[begin : begin + 100], is_error=True)
        console.finish(0)

    lines = shown(on_terminal(show))
    assert [line.partition(":")[0][:9] for line in lines] == ["epoch 1/3", "WARNING o", "epoch 2/3", *["epoch 3/3"] * 2]
    log = (tmp_path / "rank-0000.log").read_text()
    assert "\x1b" not in log
    assert log.splitlines()[-1].startswith("epoch 3/3 100% ")
    for epoch in range(EPOCHS):
        assert re.search("^" + EPOCH_LINE.format(epoch + 1) + "$", log, re.MULTILINE)


def test_a_line_is_drawn_at_most_twice_a_second(on_terminal):
    def many():
        progress = callbacks.ProgressCallback(10_000, 10_000, BATCH)
        progress.on_train_begin()
        progress.on_epoch_begin(0)
        for batch in range(10_000):
            progress.on_train_batch_end(batch, METRICS)
        progress.on_train_end()

    assert on_terminal(many).count("\x1b[2K") < 10


def test_the_launcher_tells_ranks_of_its_terminal():
    """Started by a terminal, a job's ranks know that somebody watches, and how wide the terminal is."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 93, 0, 0))
    program = "import os; print(os.environ['HVDKIT_PROGRESS'], os.environ['COLUMNS'])"
    command = [sys.executable, "-m", "hvdkit.launch", "-np", "1", "--", sys.executable, "-c", program]
    ended = subprocess.run(command, stdin=follower, stdout=follower, stderr=follower, timeout=120, check=False)
    text = os.read(leader, 1 << 16).decode()
    os.close(leader)
    os.close(follower)
    assert ended.returncode == 0, text
    assert "bar 93" in text
