"""How the bench runs commands: on which cores, and what it says of one that fails."""

import sys

import pytest

from hvdkit.bench import jobs
from hvdkit.errors import UsageError


def test_a_command_is_bound_to_its_cores():
    core = jobs.usable_cores()[-1]
    show = [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"]
    assert jobs.run([*jobs.bound_to([core]), *show]).split() == [str(core)]
    assert jobs.bound_to(None) == []


def test_a_command_that_fails_is_told_with_its_last_lines():
    program = "for number in range(20): print('line', number)\nraise SystemExit(3)"
    with pytest.raises(UsageError, match=r"ended with 3:\nline 5\n(line \d+\n)+line 19$"):
        jobs.run([sys.executable, "-c", program])


def test_a_command_that_takes_too_long_is_ended():
    program = "import time; print('begun', flush=True); time.sleep(600)"
    with pytest.raises(UsageError, match="was not done within 3 s"):
        jobs.run([sys.executable, "-c", program], limit=3)
