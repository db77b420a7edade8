"""Plain Keras models, one a file, each with the recipes that train it. No model here knows of ranks or of hvdkit.

Installed as `hvdkit_models`. A file that defines `build` and `RECIPES` is found by its name; nothing is registered.
"""

import importlib
import pkgutil
from types import ModuleType

_NOT_MODELS = ("recipe",)


def names() -> list[str]:
    """The models' names, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_MODELS)


def load(name: str) -> ModuleType:
    """The module of a model: its `build` function and its `RECIPES`."""
    return importlib.import_module(f"{__name__}.{name}")
