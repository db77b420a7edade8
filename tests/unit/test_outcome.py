"""The line in which a job's processes tell each other how it ends: written, read, and kept off people's screens."""

import json
import os
import subprocess
import sys

import pytest

from hvdkit import outcome
from hvdkit.outcome import Failed, Resumed, Unknown, Unsaved

DEATH = Failed("death", 75, "died (training)", 1, "h2")


@pytest.fixture
def listened(monkeypatch, tmp_path):
    """Has this process tell into a file."""
    path = tmp_path / "outcome.jsonl"
    monkeypatch.setenv(outcome.VARIABLE, str(path))
    return path


def test_a_line_is_a_record_of_rfc_7464():
    line = outcome.to_line(Resumed(40))
    assert line == '\x1ehvdkit {"kind": "resumed", "step": 40}\n'


@pytest.mark.parametrize(
    "told",
    [DEATH, Failed("stall", 75, 'a "quoted" \x1e word\nand a line'), Unsaved(7, "OSError: Gerät voll"), Resumed(0)],
)
def test_what_is_written_is_read(told):
    line = outcome.to_line(told)
    assert (line.count("\n"), line.isascii()) == (1, True)
    assert outcome.split(line) == outcome.split(line[:-1]) == ("", told)


@pytest.mark.parametrize("bar", ["3/8 ---- 2s 1s/step", " 50%|█████", "{", "\r"])
def test_a_progress_bars_unfinished_line_is_kept(bar):
    assert outcome.split(bar + outcome.to_line(DEATH)) == (bar, DEATH)


def test_half_a_line_is_output_like_any_other():
    line = outcome.to_line(DEATH)
    for length in range(1, len(line) - 2):
        assert outcome.split(line[:length]) == (line[:length], None)
        assert outcome.split(line[length:])[1] is None
    assert outcome.split("hvdkit: rank 1 on host h2 died. All ranks exit with code 75.")[1] is None
    for content in ("[1]", "1", "null", '{"rank": 1}', '{"kind": ["failed"]}', '{"kind": "resumed"}'):
        assert outcome.split(outcome.PREFIX + content) == (outcome.PREFIX + content, None)


def test_another_versions_fields_and_kinds_are_passed_over():
    fields = {"kind": "failed", "why": "error", "code": 3, "rank": "one", "host": None, "weather": "fine", "lines": 1.5}
    assert outcome.split(outcome.PREFIX + json.dumps(fields)) == ("", Failed("error", 3))
    assert outcome.split(outcome.PREFIX + '{"kind": "moved", "to": 3}') == ("", Unknown("moved"))


@pytest.mark.parametrize("letter", ["a", "ä", "🦔", "\ud800"])
def test_a_line_fits_into_a_pipe_at_once(letter):
    line = outcome.to_line(Failed("error", 1, letter * 10_000, 1, "h2"))
    assert len(line) <= 4096
    _, told = outcome.split(line)
    assert told.message.startswith(letter * 100)
    assert set(told.message) == {letter}


def test_people_see_the_sentence_alone_where_nobody_listens(monkeypatch, capfd):
    monkeypatch.delenv(outcome.VARIABLE, raising=False)
    outcome.tell(DEATH, "hvdkit: rank 1 died.")
    outcome.tell(Resumed(3))
    assert capfd.readouterr() == ("", "hvdkit: rank 1 died.\n")


def test_the_sentences_lines_are_announced(monkeypatch, capfd):
    monkeypatch.setenv(outcome.VARIABLE, outcome.STDERR)
    outcome.tell(DEATH, "hvdkit: rank 1 died.\nLikely cause: \udcff")
    line, *text = capfd.readouterr().err.split("\n")
    assert outcome.split(line)[1].lines == 2
    assert text == ["hvdkit: rank 1 died.", "Likely cause: \\udcff", ""]


def test_a_file_is_told_and_people_see_the_sentence(listened, capfd):
    outcome.tell(DEATH, "hvdkit: rank 1 died.")
    outcome.tell(Unsaved(4))
    assert capfd.readouterr() == ("", "hvdkit: rank 1 died.\n")
    assert [type(told) for told in outcome.heard(listened)] == [Failed, Unsaved]


def test_the_last_failure_counts(listened):
    assert outcome.failure(listened) is None
    outcome.tell(DEATH)
    outcome.tell(Failed("rank", 137, "was the first to fail", 0, "h1"))
    outcome.tell(Unsaved(4))
    with listened.open("a") as file:
        file.write(outcome.to_line(DEATH)[:-20])
    assert str(outcome.failure(listened)) == "rank 0 on host h1 was the first to fail"


def test_nothing_fails_because_a_listener_has_gone(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv(outcome.VARIABLE, str(tmp_path / "gone" / "outcome.jsonl"))
    outcome.tell(DEATH, "hvdkit: rank 1 died.")
    assert capfd.readouterr().err == "hvdkit: rank 1 died.\n"


def test_many_processes_may_tell_at_once(listened):
    program = "from hvdkit import outcome\nfor step in range(200): outcome.tell(outcome.Unsaved(step, 'x' * 1000))\n"
    writers = [subprocess.Popen([sys.executable, "-c", program], env=dict(os.environ)) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert sorted(told.step for told in outcome.heard(listened)) == sorted([*range(200)] * 2)


def test_the_exit_codes_are_those_of_the_system():
    """What schedulers and scripts rely on; launch/slurm.sh has 85."""
    assert os.EX_TEMPFAIL == outcome.STALLED
    assert (outcome.USAGE, outcome.PREEMPTED, outcome.UNFIT_SIZE) == (2, 85, 86)
    assert (
        "tensorflow"
        not in subprocess.run(
            [sys.executable, "-c", "import sys, hvdkit.outcome; print(*sys.modules)"], capture_output=True, text=True
        ).stdout.split()
    )


@pytest.mark.parametrize("is_redirected", [True, False])
def test_what_is_said_reaches_the_launcher_once_also_if_standard_error_is_redirected(monkeypatch, capfd, is_redirected):
    read, pipe = os.pipe()
    place = pipe if is_redirected else 2
    monkeypatch.setenv("HVDKIT_STDERR", f"{place}:{os.fstat(place).st_ino}")
    monkeypatch.setenv(outcome.VARIABLE, outcome.STDERR)
    outcome.tell(DEATH, "hvdkit: rank 1 died.")
    os.close(pipe)
    with os.fdopen(read) as reader:
        told = reader.read() if is_redirected else capfd.readouterr().err
    line, sentence = told.split("\n", 1)
    assert (outcome.split(line)[1].message, sentence) == (DEATH.message, "hvdkit: rank 1 died.\n")
    assert capfd.readouterr().err == ("hvdkit: rank 1 died.\n" if is_redirected else "")


def test_another_files_number_is_not_taken_for_the_launchers_pipe(monkeypatch, capfd, tmp_path):
    with (tmp_path / "own.txt").open("w") as file:
        for inode in (os.fstat(file.fileno()).st_ino, 1, ""):
            monkeypatch.setenv("HVDKIT_STDERR", f"{file.fileno()}:{inode}")
            outcome.show("hvdkit: said")
    assert (tmp_path / "own.txt").read_text() == ""
    assert capfd.readouterr().err == "hvdkit: said\n" * 3
