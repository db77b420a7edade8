"""`adapt`: layers learn from the data of all ranks what they would learn in one process.

`layer.adapt(data)` sees only this rank's data. Here the ranks exchange what a layer has counted, before it computes its
result: counts, means and squared deviations for `Normalization`; counts of tokens for `StringLookup`, `IntegerLookup`
and `TextVectorization`; order statistics for `Discretization`. Keras then does the rest, such as the order of tokens.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdkit import collectives, world
from hvdkit.compat.keras3 import graph_of, inputs_in, layers_of
from hvdkit.compat.preprocessing import LEARNING, LOOKUPS, can_learn, lookup_of, remember
from hvdkit.data.moments import Moments
from hvdkit.errors import UsageError

_CHUNK = 1 << 20  # elements of an array that are turned into float64 at once
_BATCH = 1024


def adapt(layer: Any, data: Any, **options: Any) -> None:
    """Adapts a layer, or all layers of a model, to the data of all ranks together. A collective call.

    Afterwards all ranks have learnt the same, and what one process learns from all of the data:

    - `Normalization`: mean and variance, which here are summed up in float64;
    - `StringLookup`, `IntegerLookup`, `TextVectorization`: vocabularies, also with `max_tokens`, and weights of TF-IDF;
    - `Discretization`: bins; of arrays exactly those of one array with the values of all ranks, of batches within
      `epsilon`, the layer's tolerance, as in Keras itself, where they depend on the order of the batches;
    - `keras.utils.FeatureSpace`: each of its features.

    Args:
        layer: one of these layers; or a functional or sequential model, of which all such layers are adapted, one after
            the other, to the data as they arrive there.
        data: this rank's part of the data, such as `hvd.data.shard` gives it, in any form that the layer's own `adapt`
            takes; ranks may have different amounts. For a model: arrays, or a batched `tf.data.Dataset`, in the
            structure of its inputs; labels in a data set are left out.
        **options: options of the layer's own `adapt`, such as `steps`.

    Raises:
        UsageError: there is nothing to adapt, or hvdkit cannot combine what this kind of layer learns.

    Example: `hvd.adapt(normalization, features[hvd.rank()::hvd.size()])`
    """
    if isinstance(layer, keras.Model):
        _adapt_model(layer, data, **options)
    elif world.size() == 1:
        layer.adapt(data, **options)
    elif isinstance(layer, keras.utils.FeatureSpace):
        _adapt_features(layer, data, **options)
    elif isinstance(layer, keras.layers.Normalization):
        _adapt_moments(layer, data, **options)
    elif isinstance(layer, keras.layers.Discretization):
        _adapt_bins(layer, data, **options)
    elif isinstance(layer, LOOKUPS):
        with _before_it_is_final(layer, lambda: _add_up_counts(lookup_of(layer))):
            type(layer).adapt(layer, data, **options)
    else:
        raise UsageError(
            f"hvd.adapt does not know how to combine what {type(layer).__name__} learns on several ranks. Give its own "
            f"adapt all of the data, in the same order on all ranks; or pass a layer of "
            f"{', '.join(kind.__name__ for kind in LEARNING)}."
        )


@contextlib.contextmanager
def _before_it_is_final(layer: Any, combine: Callable[[], None]) -> Iterator[None]:
    """Makes the layer's own `adapt` call `combine` between its last batch and its result."""
    keras_own = layer.finalize_state

    def finalize_state() -> None:
        combine()
        keras_own()

    layer.finalize_state = finalize_state
    try:
        yield
    finally:
        del layer.finalize_state


# ---- Vocabularies ---------------------------------------------------------------------------------------------------


def _add_up_counts(lookup: Any) -> None:
    """Makes the counts of tokens, and of documents for TF-IDF, those of all ranks."""
    by_document = lookup.output_mode == "tf_idf"
    tables = [lookup.token_counts, *([lookup.token_document_counts] if by_document else [])]
    mine = [[t.numpy() for t in table.export()] for table in tables], int(lookup.num_documents) if by_document else 0
    everyone = collectives.allgather_object(mine, name="adapt.tokens")
    for rank, (counted, documents) in enumerate(everyone):
        if rank == world.rank():
            continue
        for table, (tokens, counts) in zip(tables, counted, strict=True):
            if len(tokens):
                table.insert(tokens, counts + table.lookup(tokens))
        if by_document:
            lookup.num_documents.assign_add(documents)


# ---- Moments --------------------------------------------------------------------------------------------------------


def _adapt_moments(layer: keras.layers.Normalization, data: Any) -> None:
    if layer.input_mean is not None:
        raise UsageError(f"Layer {layer.name!r} was given its mean and variance, so there is nothing to adapt.")
    shape: tuple[int, ...] | None = None
    mine = Moments()
    for batch in _batches(data):
        shape = shape or batch.shape
        keep = {axis % batch.ndim for axis in layer.axis}
        mine += Moments.of(batch, tuple(axis for axis in range(batch.ndim) if axis not in keep))
    everyone = collectives.allgather_object((shape, mine), name="adapt.moments")
    shape = next((shape for shape, _ in everyone if shape is not None), None)
    if shape is None:
        raise UsageError(f"Layer {layer.name!r} cannot be adapted: there is no data on any rank.")
    if not layer.built:
        layer.build(shape)
    # All ranks add up in the same order, so that they get the same bits.
    total = sum((moments for _, moments in everyone), Moments())
    if np.shape(total.mean) != tuple(layer.adapt_mean.shape):
        raise UsageError(
            f"Layer {layer.name!r} was built for statistics of shape {tuple(layer.adapt_mean.shape)}, but these data "
            f"of shape {shape} have {np.shape(total.mean)}."
        )
    layer.adapt_mean.assign(total.mean)
    layer.adapt_variance.assign(total.deviations / total.count)
    layer.finalize_state()
    remember(layer)


def _batches(data: Any) -> Iterator[np.ndarray]:
    """Yields the inputs of all batches, in the forms that `Normalization.adapt` takes, as arrays."""
    if isinstance(data, (np.ndarray, tf.Tensor)):
        yield from _chunks(np.asarray(data))
        return
    batches: Iterable[Any] = data
    if isinstance(data, tf.data.Dataset):
        spec = data.element_spec[0] if isinstance(data.element_spec, tuple) else data.element_spec
        batches = data.batch(128) if spec.shape.rank == 1 else data
    elif isinstance(data, keras.utils.PyDataset):
        batches = (data[number] for number in range(data.num_batches))
    elif not hasattr(data, "__iter__"):
        raise UsageError(
            f"Data to adapt to must be an array, a tf.data.Dataset, a PyDataset or batches, but are a "
            f"{type(data).__name__}."
        )
    for batch in batches:
        inputs = np.asarray(keras.ops.convert_to_numpy(batch[0] if isinstance(batch, tuple) else batch))
        if inputs.size:
            yield inputs


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _CHUNK // max(1, array[:1].size))
    for begin in range(0, len(array), rows):
        yield array[begin : begin + rows]


# ---- Bins -----------------------------------------------------------------------------------------------------------


def _adapt_bins(layer: keras.layers.Discretization, data: Any, steps: int | None = None) -> None:
    is_array = isinstance(data, (np.ndarray, tf.Tensor))
    kinds = collectives.allgather_object(is_array, name="adapt.kinds")
    if len(set(kinds)) > 1:
        raise UsageError(f"Layer {layer.name!r} needs data of one kind, but some ranks gave arrays and others batches.")
    if not is_array or layer.num_bins is None:
        with _before_it_is_final(layer, lambda: _merge_summaries(layer)):
            type(layer).adapt(layer, data, steps=steps)
        return
    layer.reset_state()
    layer.summary = _summary_of_all(np.asarray(data, np.float32).ravel(), layer.epsilon)
    layer.update_state(np.zeros([0]))  # Keras compresses the summary
    layer.finalize_state()
    remember(layer)


def _merge_summaries(layer: keras.layers.Discretization) -> None:
    """Merges the ranks' summaries, float32 [2, n]: values in increasing order, and how many values each stands for."""
    summaries = collectives.allgather_object(np.asarray(layer.summary), name="adapt.summaries")
    merged = np.concatenate(summaries, axis=1)
    layer.summary = merged[:, np.argsort(merged[0], kind="stable")].astype("float32")


def _summary_of_all(values: np.ndarray, epsilon: float) -> np.ndarray:
    """Returns the summary that Keras makes of one array, for the values of all ranks: every n-th in increasing order.

    Args:
        values: this rank's values, float32 [n].
        epsilon: the tolerance of the layer: the summary has about 1 / epsilon values.
    """
    total = int(collectives.allreduce_sum(np.array([len(values)]), name="adapt.values")[0])
    step = max(total / (1.0 / epsilon), 1)  # rounded as Keras rounds it
    places = np.arange(int(step - 1), total, int(step))
    return np.stack([order_statistics(values, places), np.full(len(places), step)]).astype("float32")


def order_statistics(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Returns the values at some places of all ranks' values in increasing order, without gathering them.

    Bisects the 32 bits of a float32, and counts on each rank the values up to the middle. A collective call.

    Args:
        values: this rank's values, float32 [n].
        places: places from 0, int [m].
    """
    keys = np.sort(_ordered(values))
    low, high = np.zeros(len(places), np.int64), np.full(len(places), 2**32 - 1, np.int64)
    for _ in range(32):
        middle = (low + high) // 2
        counts = np.searchsorted(keys, middle.astype(np.uint32), side="right").astype(np.int64)
        reached = collectives.allreduce_sum(counts, name="adapt.counts") > places
        low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
    return _unordered(high.astype(np.uint32))


_SIGN = np.uint32(1 << 31)


def _ordered(values: np.ndarray) -> np.ndarray:
    """Maps float32 to uint32 in the same order."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _unordered(keys: np.ndarray) -> np.ndarray:
    return np.where(keys & _SIGN, keys ^ _SIGN, ~keys).view(np.float32)


# ---- Several layers -------------------------------------------------------------------------------------------------


def _adapt_features(space: Any, data: Any) -> None:
    """Lets a `FeatureSpace` adapt its layers by `adapt`."""
    layers = [layer for layer in space.preprocessors.values() if hasattr(layer, "adapt")]
    for layer in layers:
        layer.adapt = functools.partial(adapt, layer)
    try:
        space.adapt(data)
    finally:
        for layer in layers:
            del layer.adapt


def _adapt_model(model: keras.Model, data: Any) -> None:
    learning = [layer for layer in layers_of(model, include_self=False) if can_learn(layer)]
    if not learning:
        raise UsageError(f"Model {model.name!r} has no layer that learns in adapt, such as Normalization.")
    graph = graph_of(model)
    if graph is None:
        raise UsageError(
            f"hvd.adapt cannot see which data reach layer {learning[0].name!r} of {model.name!r}, which is not a "
            f"functional model, or not built. Pass the layer, and the data as they arrive there."
        )
    for layer in model.layers:
        if any(inside in learning for inside in layers_of(layer)):
            calls = inputs_in(graph, layer)
            if len(calls) != 1:
                raise UsageError(
                    f"Layer {layer.name!r} is called {len(calls)} times in {model.name!r}: pass it, and its data."
                )
            adapt(layer, _arriving_at(calls[0], graph, data))
    model.train_function = model.test_function = model.predict_function = None  # traced with what was learnt before


def _arriving_at(tensors: list[Any], graph: Any, data: Any) -> Any:
    """Returns the data that a model computes at some of its symbolic tensors, from data for its inputs."""
    inputs = {id(tensor): place for place, tensor in enumerate(keras.tree.flatten(graph.input))}
    places = [inputs.get(id(tensor)) for tensor in tensors]

    def pick(x: Any) -> Any:
        names = [tensor.name for tensor in tensors]
        if isinstance(x, dict) and all(name in x for name in names):
            picked = [x[name] for name in names]
        else:
            picked = [keras.tree.flatten(x)[place] for place in places]
        return picked[0] if len(picked) == 1 else picked

    def compute(x: Any) -> Any:
        return before(x)

    direct = None not in places
    if not direct:
        before = keras.Model(graph.input, tensors[0] if len(tensors) == 1 else tensors)
    arrive = pick if direct else compute
    if isinstance(data, tf.data.Dataset):
        return data.map(lambda *element: arrive(element[0]))
    if direct:
        return pick(data)
    return tf.data.Dataset.from_tensor_slices({"x": data}).batch(_BATCH).map(lambda element: arrive(element["x"]))
