"""The standard input of launched ranks, which is empty: a program that reads it is told, instead of getting nothing."""

import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


def explain_if_empty() -> None:
    """Replaces `sys.stdin` by one that warns when it is first read, if it is /dev/null and the program's own."""
    try:
        is_empty = os.fstat(0).st_rdev == Path(os.devnull).stat().st_rdev
    except OSError:  # closed
        return
    if is_empty and sys.stdin is sys.__stdin__:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(_Nothing()), encoding="utf-8")


class _Nothing(io.RawIOBase):
    """An empty file, which warns once."""

    _is_said = False

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 0

    def readinto(self, buffer: Any) -> int:
        if not self._is_said:
            self._is_said = True
            _log.warning(
                "This program reads its standard input, which is empty: the launcher gives ranks none. Read from a "
                "file that all ranks see, or pass the values as arguments. (A debugger needs it, too: run one process "
                "without the launcher.)"
            )
        return 0
