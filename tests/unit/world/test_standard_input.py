"""Ranks have no standard input, and a program that reads it is told."""

import subprocess
import sys

from tests.conftest import run_command

READS = (
    "import logging; logging.basicConfig(format='%(message)s')\n"
    "from hvdkit.world.standard_input import explain_if_empty\n"
    "explain_if_empty()\n"
    "import sys; print([sys.stdin.read(), *sys.stdin], sys.stdin.fileno())\n"
    "try:\n"
    "    input()\n"
    "except EOFError:\n"
    "    print('the end')\n"
)


def test_a_program_that_reads_an_empty_standard_input_is_told_once():
    ended = run_command([sys.executable, "-c", READS], timeout=60)
    assert ended.code == 0, ended.output
    assert ended.output.count("This program reads its standard input, which is empty") == 1
    assert "[''] 0" in ended.output
    assert "the end" in ended.output


def test_a_standard_input_with_content_stays():
    ended = subprocess.run([sys.executable, "-c", READS], input=b"a", capture_output=True, timeout=60, check=True)
    assert (ended.stdout, ended.stderr) == (b"['a'] 0\nthe end\n", b"")
