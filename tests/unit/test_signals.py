"""Signals before there is anything to save."""

import signal
import subprocess
import sys
import time

import pytest

from hvdkit.signals import Preempted, exiting_at_once, leaving_at_once
from tests.conftest import ROOT


@leaving_at_once()
def told_to_leave():
    signal.raise_signal(signal.SIGTERM)
    time.sleep(60)


def test_before_training_a_signal_leaves_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="SIGTERM arrived while there was nothing to save") as left:
        told_to_leave()
    assert (left.value.code, left.value.agreed) == (85, False)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_does_not_interrupt_the_clean_up():
    cleaned = []

    @leaving_at_once()
    def told_twice():
        try:
            signal.raise_signal(signal.SIGUSR1)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)

    with pytest.raises(Preempted, match="SIGUSR1"):
        told_twice()
    assert cleaned


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_main_job_leaves_with_85_while_it_loads(number):
    """What it loads first never ends, and catches every exception."""
    program = f"""
import os, signal, sys
class Loading:
    def find_spec(self, name, *_):
        if name == "tensorflow":
            try:
                os.kill(os.getpid(), {int(number)})
                signal.pause()
            except BaseException:
                sys.exit(1)
sys.meta_path.insert(0, Loading())
from hvdkit.train.__main__ import main
sys.exit(main(["hvdkit.train"]))
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False)
    assert ended.returncode == 85


def test_outside_signals_do_what_they_did():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with exiting_at_once():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
