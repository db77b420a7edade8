"""Which kind of data the user's code gives: `examples_of` chooses how their examples are read.

Classes of other libraries are recognized by name, as Keras does it, so that nothing of them is imported.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

from hvdkit.compat import grain, pytorch
from hvdkit.data.sources.given import Arrays, Examples, Indexed, Passes, Stream
from hvdkit.errors import UsageError


def examples_of(data: Any, where: str) -> Examples:
    """Returns the examples of what a user's function returned for a split.

    Args:
        data: arrays; a `tf.data.Dataset`; a `PyDataset`; a data set or loader of Grain; a `DataLoader` of PyTorch; a
            function that begins a generator of batches; or another object with batches by index and a length, or one
            that can be iterated over again and again.
        where: what a message calls it.

    Raises:
        UsageError: it is of another kind, is empty or infinite, can be read once only, or its arrays differ in length.
    """
    if isinstance(data, tf.data.Dataset):
        return Stream(data, where)
    if isinstance(data, keras.utils.PyDataset):
        if data.num_batches is None:
            raise UsageError(f"{where} is an infinite {type(data).__name__}. Give it a length: __len__.")
        return Indexed(data, data.num_batches, where, batched=True)
    for parent in type(data).__mro__:
        kind = _OF_LIBRARIES.get((parent.__module__.partition(".")[0], parent.__name__))
        if kind:
            return kind(data, where)
    if isinstance(data, Iterator):
        raise UsageError(
            f"{where} is a {type(data).__name__}, which can be read once only, and each epoch reads again. Return the "
            f"function that begins it, uncalled (return train_batches, test_batches), or arrays."
        )
    if callable(data) and not isinstance(data, Iterable):
        return Passes(_Begun(data, where), where)
    if hasattr(data, "__array__") or isinstance(data, (tf.RaggedTensor, tuple, list, dict, str, bytes)):
        return Arrays(data, where)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):  # such as a Sequence of Keras 2
        return Indexed(data, len(data), where, batched=True)
    return Passes(data, where) if isinstance(data, Iterable) else Arrays(data, where)


class _Begun:
    """Calls a function of the user's for each pass.

    Args:
        function: returns an iterator or another iterable; takes no arguments.
        where: what a message calls it.

    Raises:
        UsageError: it needs arguments.
    """

    def __init__(self, function: Callable[[], Iterable[Any]], where: str) -> None:
        if name := _needed(function):
            raise UsageError(
                f"{where} is a function that needs an argument, {name}. Return one without arguments that begins a "
                f"generator of batches: functools.partial(...) or a lambda."
            )
        self._function, self._where = function, where

    def __iter__(self) -> Iterator[Any]:
        begun = self._function()
        if not isinstance(begun, Iterable) or hasattr(begun, "__array__"):
            raise UsageError(
                f"{self._where} is a function that returned a {type(begun).__name__}, and batches one after another "
                f"are expected. Let it yield them, or return what it returns."
            )
        return iter(begun)


def _needed(function: Callable) -> str:
    """Returns the first argument that a function cannot do without; empty if there is none, or nobody knows."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return ""
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return next((p.name for p in parameters if p.default is p.empty and p.kind not in optional), "")


# ---- Grain ----------------------------------------------------------------------------------------------------------


def _of_map_dataset(dataset: Any, where: str) -> Examples:
    if len(dataset) == sys.maxsize:
        raise _infinite(dataset, where)
    return Indexed(dataset, len(dataset), where, batched=grain.is_batched(dataset))


def _of_iter_dataset(dataset: Any, where: str) -> Examples:
    if grain.is_repeated(dataset):
        raise _infinite(dataset, where)
    return Passes(dataset, where, batched=grain.is_batched(dataset))


def _of_grain_loader(loader: Any, where: str) -> Examples:
    if grain.records_of(loader) == sys.maxsize:
        raise _infinite(loader, where)
    if grain.shard_options(loader).shard_count > 1:
        raise UsageError(f"{where} is already divided by its shard_options. Give it grain.sharding.NoSharding().")
    return Passes(loader, where, batched=grain.is_batched(loader))


def _infinite(data: Any, where: str) -> UsageError:
    return UsageError(
        f"{where} is an infinite {type(data).__name__}. Leave repeat() out, or give a sampler num_epochs=1."
    )


# ---- PyTorch --------------------------------------------------------------------------------------------------------

_ORDERS = ("SequentialSampler", "RandomSampler")  # of all examples, each once


def _of_torch_loader(loader: Any, where: str) -> Examples:
    """Returns the examples of a loader's data set by their index, or those that it yields if they have none."""
    if pytorch.is_iterable(loader):
        return Passes(loader, where)
    sampler, batches = type(loader.sampler).__name__, type(loader.batch_sampler).__name__
    all_once = sampler in _ORDERS and len(loader.sampler) == len(loader.dataset)
    if not all_once or getattr(loader.sampler, "replacement", False) or batches not in ("BatchSampler", "NoneType"):
        raise UsageError(
            f"{where} is a DataLoader with a {sampler if batches == 'BatchSampler' else batches}, and hvdkit chooses "
            f"and orders examples itself. Give a loader without it, of a torch.utils.data.Subset if it leaves some out."
        )
    collated = _Collated(loader)
    return Indexed(collated, len(collated), where, batched=True)


class _Collated:
    """The batches of a PyTorch `DataLoader` by their index, in the order of its data set.

    Args:
        loader: a loader of a data set with indices.
    """

    def __init__(self, loader: Any) -> None:
        self._dataset, self._collate = loader.dataset, loader.collate_fn
        self._size = loader.batch_size  # None if each element of the data set is a batch

    def __len__(self) -> int:
        return -(-len(self._dataset) // (self._size or 1))

    def __getitem__(self, index: int) -> Any:
        if self._size is None:
            return self._collate(self._dataset[index])
        places = range(index * self._size, min((index + 1) * self._size, len(self._dataset)))
        return self._collate([self._dataset[place] for place in places])


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def _of_hugging_face(dataset: Any, where: str) -> Examples:
    raise UsageError(
        f"{where} is a datasets.{type(dataset).__name__}, of which it is not known which columns are inputs. Return "
        f"dataset.to_tf_dataset(columns=[...], label_cols=[...]), or arrays: "
        f"(numpy.array(dataset['text']), numpy.array(dataset['label']))."
    )


_OF_LIBRARIES: dict[tuple[str, str], Callable[[Any, str], Examples]] = {
    ("grain", "MapDataset"): _of_map_dataset,
    ("grain", "IterDataset"): _of_iter_dataset,
    ("grain", "DataLoader"): _of_grain_loader,
    ("torch", "DataLoader"): _of_torch_loader,
    ("datasets", "Dataset"): _of_hugging_face,
    ("datasets", "IterableDataset"): _of_hugging_face,
    ("datasets", "DatasetDict"): _of_hugging_face,
    ("datasets", "IterableDatasetDict"): _of_hugging_face,
}
