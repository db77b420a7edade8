"""Plain Keras models, one per file, each with the recipes to train it. Models do not use ranks or import hvdkit.

Installed as `hvdkit_models`. `load` finds a file by its name, without registration. It defines `build`,
`RECIPES`, and `KIND`: the kind of data that it learns from.
"""

import importlib
import pkgutil
from types import ModuleType

_NOT_MODELS = ("boxes", "recipe")


def names() -> list[str]:
    """Returns the models' names, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_MODELS)


def load(name: str) -> ModuleType:
    """Returns the module of a model, with its `build` function, its `RECIPES` and its `KIND`."""
    return importlib.import_module(f"{__name__}.{name}")
