"""Data of any structure that a function of the user's returns: `path/to/file.py:function`."""

import inspect
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.command import functions
from hvdkit.data.sources.given import Examples, examples_of
from hvdkit.data.sources.schema import AS_COMPILED
from hvdkit.errors import UsageError

_ORDER = {2: ("train", "test"), 3: ("train", "validation", "test")}
_COMPARED = 8  # examples
_FORM = "(train, test), (train, validation, test), or a dict with these names"


class FunctionSource:
    """Examples of any structure; see `Source` for the attributes.

    Its kind is `arrays` if all splits are in memory, otherwise `stream`: examples that are read again in each epoch, so
    that random augmentation differs from epoch to epoch. The label of an example is the tuple of what `fit` takes
    beside the inputs: nothing, targets, or targets and sample weights.

    Args:
        name: the name for messages.
        splits: the examples of each split.

    Raises:
        UsageError: the splits' examples differ in structure, or a split has none.
    """

    def __init__(self, name: str, splits: dict[str, Examples]) -> None:
        self.name = name
        self.task = AS_COMPILED
        self.shape: tuple[int, ...] | None = None
        self.kind = "arrays" if all(examples.in_memory for examples in splits.values()) else "stream"
        self.label_names: list[str] = []
        self.feature_names: list[str] = []
        self.splits = tuple(splits)
        self._splits = splits
        for split, examples in splits.items():
            if not examples.size:
                raise UsageError(f"{name} returned no {split} examples. Return some, or leave that split out.")
        self._check_structures()

    def size(self, split: str) -> int:
        """Number of examples in a split."""
        return self._splits[split].size

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Examples `start` to `stop` of a split."""
        return self._splits[split].read(start, stop)

    def locate(self, split: str, index: int) -> str:
        """The index of an example."""
        return f"example {index}"

    def decode(self, encoded: Any) -> Any:
        """Returns its input: nothing is encoded."""
        return encoded

    def fingerprint(self) -> dict[str, tuple[int, int]]:
        """Returns the size of each split and a checksum of its first examples, to compare over ranks."""
        return {split: (examples.size, _checksum(examples)) for split, examples in self._splits.items()}

    def _check_structures(self) -> None:
        specs = {split: examples.read(0, 1).element_spec for split, examples in self._splits.items()}
        for split, spec in specs.items():
            if not _fit_each_other(specs["train"], spec):
                raise UsageError(
                    f"{self.name} returned {split} examples {_described(spec)}, and train examples "
                    f"{_described(specs['train'])}. Return the same structure, shapes and types for all splits."
                )


def load_function(given: str, seed: int = 0) -> FunctionSource:
    """Calls the function and returns its data.

    Args:
        given: `path/to/file.py:function` or `package.module:function`. Its parameters must have defaults, except
            `seed`.
        seed: the run's seed, for a parameter of that name.

    Raises:
        UsageError: there is no such function, it fails, or it returns something else.
    """
    name, function = functions.find_function(given, "dataset")
    takes_seed = "seed" in inspect.signature(function).parameters
    try:
        returned = function(seed=seed) if takes_seed else function()
    except Exception as error:  # a user's function may raise anything
        raise UsageError(f"--dataset={given} failed: {functions.describe(error)}.") from error
    name = f"{name}:{given.rpartition(':')[2]}"
    splits = _splits_of(returned, given)
    return FunctionSource(name, {split: examples_of(data, f"{name}, {split}") for split, data in splits.items()})


def _splits_of(returned: Any, given: str) -> dict[str, Any]:
    if isinstance(returned, Mapping) and {"train", "test"} <= set(returned) <= {"train", "validation", "test"}:
        return dict(returned)
    if isinstance(returned, (tuple, list)) and len(returned) in _ORDER:
        return dict(zip(_ORDER[len(returned)], returned, strict=True))
    what = f"a {type(returned).__name__}"
    if isinstance(returned, Mapping):
        what = f"a dict with {', '.join(map(str, returned)) or 'nothing'}"
    elif isinstance(returned, (tuple, list)):
        what += f" of {len(returned)}"
    raise UsageError(f"--dataset={given} returned {what}. Return {_FORM}.")


def _fit_each_other(one: Any, other: Any) -> bool:
    try:
        tf.nest.assert_same_structure(one, other)
    except (ValueError, TypeError):
        return False
    pairs = zip(tf.nest.flatten(one), tf.nest.flatten(other), strict=True)
    return all(a.dtype == b.dtype and a.shape.is_compatible_with(b.shape) for a, b in pairs)


def _described(spec: Any) -> str:
    inputs, rest = spec
    return str(describe((inputs, *rest)))


def describe(spec: Any) -> Any:
    """Returns a structure of specs in a short form: shapes with dtypes."""
    if isinstance(spec, Mapping):
        return {name: describe(part) for name, part in spec.items()}
    if isinstance(spec, (tuple, list)):
        return tuple(describe(part) for part in spec)
    return f"{spec.dtype.name}{list(spec.shape) if spec.shape.rank is not None else ''}"


def _checksum(examples: Examples) -> int:
    found = 0
    for example in examples.read(0, min(_COMPARED, examples.size)):
        for leaf in tf.nest.flatten(example, expand_composites=True):
            found = zlib.crc32(
                np.asarray(leaf).tobytes() if leaf.dtype != tf.string else str(leaf.numpy()).encode(), found
            )
    return found
