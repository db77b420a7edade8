"""Runs command lines of `hvdkit` from standard input, each in a forked process, and prints how each ends, as JSON.

A command that begins its work, that is, loads TensorFlow or starts a process, ends there with `BEGINS`.
"""

import importlib.abc
import json
import os
import subprocess
import sys
import tempfile
import traceback

import absl.flags  # noqa: F401  (loaded once, not in each process)
import numpy as np  # noqa: F401

from hvdkit.command import main

BEGINS = 99
HEAVY = ("tensorflow", "keras", "horovod")


class _Work(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in HEAVY:
            os._exit(BEGINS)


def begin(*arguments, **settings):
    os._exit(BEGINS)


def end(line, output):
    """Run one line in this process, and leave it."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    os.chdir(os.environ["OUTCOMES_FOLDER"])
    sys.meta_path.insert(0, _Work())
    subprocess.Popen.__init__ = begin
    subprocess.Popen.__del__ = lambda self: None
    code = 0
    try:
        code = main.main(line.split())
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


found = {}
for line in sys.stdin.read().splitlines():
    with tempfile.TemporaryFile("w+") as output:
        process = os.fork()
        if not process:
            end(line, output)
        _, status = os.waitpid(process, 0)
        output.seek(0)
        found[line] = [os.waitstatus_to_exitcode(status), output.read()]
print(json.dumps(found))
