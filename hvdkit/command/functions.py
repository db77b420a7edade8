"""Functions of the user's that a flag names: `path/to/file.py:function` or `package.module:function`."""

import importlib
import importlib.util
import itertools
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvdkit.errors import UsageError


def names_function(given: str) -> bool:
    """Returns whether a flag's value has the form of a function's name."""
    return bool(re.search(r"\.py(:|$)", given) or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", given))


def find_function(given: str, flag: str) -> tuple[str, Callable[..., Any]]:
    """Imports a function, and returns it with the short name of its file or module.

    Args:
        given: `path/to/file.py:function` or `package.module:function`.
        flag: the flag that names it, for messages.

    Raises:
        UsageError: there is no such file, module or function, or it cannot be imported.
    """
    place, _, function = given.partition(":")
    path = Path(place).expanduser()
    if path.suffix == ".py":
        if not path.is_file() or not function:
            missing = "names no function" if path.is_file() else f"names the file {path}, which is not there"
            raise UsageError(f"--{flag}={given} {missing}. The form is path/to/file.py:function.")
        found, name = getattr(_import_file(path), function, None), path.stem
    else:
        found, name = getattr(_import_module(place, "."), function, None), place.rpartition(".")[2]
    if not callable(found):
        raise UsageError(f"{place} has no function {function!r} that --{flag}={given} could call.")
    return name, found


def describe(error: Exception) -> str:
    """Returns an error of the user's code as one sentence, with the line that raised it."""
    if isinstance(error, SyntaxError):
        line, file, message = error.lineno, error.filename, error.msg
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        line, file, message = last.lineno, last.filename, first_line(error)
    return f"{type(error).__name__}: {message} (line {line} of {file})"


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _import_file(path: Path) -> Any:
    """Imports a file: as part of its package if it is in one, so that relative imports work."""
    path = path.resolve()
    sys.path.insert(0, str(path.parent))  # like `python file.py`, for modules in the same folder
    packages = list(itertools.takewhile(lambda folder: (folder / "__init__.py").is_file(), path.parents))
    if packages:
        names = [folder.name for folder in reversed(packages)]
        return _import_module(".".join([*names, path.stem]), str(packages[-1].parent))
    name = f"user_model_{path.stem}"
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(path):
        return sys.modules[name]  # --model and --dataset may name the same file, whose classes Keras registers once
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for dataclasses, pickle and autograph
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise UsageError(f"{path} cannot be imported: {describe(error)}.") from error
    return module


def _import_module(name: str, folder: str) -> Any:
    """Imports a module by its name, also from a folder."""
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UsageError(f"The module {name} cannot be imported: {describe(error)}.") from error
