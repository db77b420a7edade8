"""Readable Python stacks: the user's own lines in full, the frames of libraries as a count."""

import linecache
import os
import site
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import FrameType

MOST_LINES = 40
MOST_THREADS = 4
_PACKAGE = str(Path(__file__).resolve().parent.parent)
_LIBRARIES = tuple(
    {
        os.path.realpath(path)
        for path in (*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages())
        if path and path not in (sys.prefix, sys.base_prefix)
    }
)
# Files that call Python code which feeds a data set: generators, py_functions and Keras' data adapters.
_INPUT = ("/from_generator_op.py", "/script_ops.py", "/keras/src/trainers/data_adapters/", "/data/ops/iterator_ops.py")


def is_own(filename: str) -> bool:
    """Whether a file is the user's own: not part of Python, an installed library or hvdkit."""
    if filename.startswith("<"):
        return filename.startswith("<ipython")  # Horovod and TensorFlow define functions in "<string>"
    path = os.path.realpath(filename)
    return not path.startswith((*_LIBRARIES, _PACKAGE)) and "__autograph_generated_file" not in path


def readable(frame: FrameType | None) -> list[str]:
    """A stack as text, the outermost call first. The user's own lines start with "> "; others show the library's name.

    Args:
        frame: the innermost frame.
    """
    entries = [(f.f_code.co_filename, number, f.f_code.co_name) for f, number in traceback.walk_stack(frame)]
    lines = []
    for own, group in groupby(reversed(entries), key=lambda entry: is_own(entry[0])):
        members = list(group)
        if own:
            lines += [f"> {place(*entry)}" for entry in members]
        else:
            lines.append(f"  ... {len(members)} in {', '.join(_names(members))}; the innermost is {members[-1][2]}()")
    return [line[:300] for line in lines[-MOST_LINES:]]


def place(filename: str, number: int, function: str) -> str:
    """`train.py:12 in main: model.fit(x)`."""
    text = linecache.getline(filename, number).strip()
    return f"{shown(filename)}:{number} in {function}" + (f": {text}" if text else "")


def shown(filename: str) -> str:
    """A path as seen from the working directory, if that is shorter."""
    try:
        return min(os.path.relpath(filename), filename, key=len)
    except (OSError, ValueError):  # the working directory is gone
        return filename


def own_line(frame: FrameType | None) -> str | None:
    """The innermost of the user's own lines in a stack."""
    own = ((f, n) for f, n in traceback.walk_stack(frame) if is_own(f.f_code.co_filename))
    found = next(own, None)
    return found and place(found[0].f_code.co_filename, found[1], found[0].f_code.co_name)


def reads_input(frame: FrameType | None) -> bool:
    """Whether a stack is inside Python code that feeds a data set."""
    return any(part in f.f_code.co_filename for f, _ in traceback.walk_stack(frame) for part in _INPUT)


def main_frame() -> FrameType | None:
    """Where the main thread is now."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def reading() -> str | None:
    """The line of Python code that feeds a data set now, in any thread of this process."""
    main = main_frame()  # sorted last: it waits for the thread that reads
    frames = sorted((f for _, f in _threads() if reads_input(f)), key=lambda f: f is main)
    frame = frames[0] if frames else None
    return frame and (own_line(frame) or place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))


def others() -> dict[str, list[str]]:
    """The stacks of the other threads that run the user's code, by thread name."""
    found = {name: readable(f) for name, f in _threads() if f is not main_frame() and own_line(f)}
    return dict(list(found.items())[:MOST_THREADS])


def _threads() -> Iterator[tuple[str, FrameType]]:
    """All threads except the watchdog's own. TensorFlow's threads have no Python name."""
    names = {t.ident: t.name for t in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            yield names.get(ident, f"of TensorFlow ({ident})"), frame


def _names(entries: list[tuple[str, int, str]]) -> list[str]:
    """The libraries of a sequence of frames, each once, in order."""
    return list(dict.fromkeys(_library(filename) for filename, _, _ in entries))


def _library(filename: str) -> str:
    if filename.startswith(_PACKAGE):
        return "hvdkit"
    parts = Path(filename).parts
    folder = next((i for i, part in enumerate(parts) if part in ("site-packages", "dist-packages")), None)
    return Path(parts[folder + 1]).stem if folder is not None and folder + 1 < len(parts) else "Python"
