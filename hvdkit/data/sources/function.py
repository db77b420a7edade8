"""Data of any structure that a function of the user's returns: `path/to/file.py:function`."""

import inspect
import logging
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.command import functions
from hvdkit.data.sources.given import Examples
from hvdkit.data.sources.given_kinds import examples_of
from hvdkit.data.sources.schema import AS_COMPILED
from hvdkit.data.sources.structure import describe
from hvdkit.errors import UsageError

_log = logging.getLogger(__name__)
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
        self._warn_of_other_orders()

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

    def fingerprint(self) -> dict[str, tuple[int, int | None]]:
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

    def _warn_of_other_orders(self) -> None:
        """Warns of a split whose targets change when it is read again: then an index is no longer one example."""
        for split, examples in self._splits.items():
            if not examples.in_memory and _checksum(examples, targets=True) != _checksum(examples, targets=True):
                _log.warning(
                    "The targets of the first %s examples of %s are others when they are read again. If it shuffles, "
                    "leave that to hvdkit: validation examples may be trained on, and a resumed run does not go on "
                    "where it stopped. Random augmentation of the targets may stay.",
                    split,
                    self.name,
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
    short = f"{name}:{given.rpartition(':')[2]}"
    try:
        splits = _splits_of(function(seed=seed) if takes_seed else function(), given)
        examples = {split: examples_of(data, f"{short}, {split}") for split, data in splits.items()}
    except UsageError:
        raise
    except Exception as error:  # a user's function, and what it returns, may raise anything
        raise UsageError(f"--dataset={given} failed: {functions.describe(error)}.") from error
    return FunctionSource(short, examples)


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


def _checksum(examples: Examples, targets: bool = False) -> int | None:
    """Returns a checksum of the first examples, or only of their targets and weights.

    None if they cannot be read: what is wrong with them is said where they are put into batches.
    """
    found = 0
    try:
        for pair in examples.read(0, min(_COMPARED, examples.size)):
            example = pair[1] if targets else pair
            for leaf in tf.nest.flatten(example, expand_composites=True):
                data = np.asarray(leaf).tobytes() if leaf.dtype != tf.string else str(leaf.numpy()).encode()
                found = zlib.crc32(data, found)
    except tf.errors.OpError:
        return None
    return found
