"""How a process ends when the job fails, and that it goes on once it has left the job."""

import threading

import pytest

from hvdkit.watchdog.ending import Ending
from hvdkit.watchdog.states import Failure

DIED = Failure(1, "h1", "died", "died", 75)


@pytest.fixture
def ended():
    return []


def test_a_rank_that_has_left_the_job_is_not_ended_by_a_later_failure(ended):
    ending, threads = Ending(0, False, ended.append, flush=lambda: None), threading.active_count()
    ending.leave()
    ending.make_sure(DIED, at_once=True)
    ending.take(DIED, at_once=True)
    ending.keep_time()
    assert (ending.failure, ending.seconds_left, ended) == (None, float("inf"), [])
    assert threading.active_count() == threads, "no timer"


def test_a_rank_that_leaves_a_failed_job_is_still_ended(ended):
    ending = Ending(0, False, ended.append, flush=lambda: None)
    ending.take(DIED, at_once=True)
    ending.leave()
    ending.keep_time()
    assert (ending.failure, ended) == (DIED, [75])
