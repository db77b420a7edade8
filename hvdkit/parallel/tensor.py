"""`split_tensors`: tensor parallelism, which divides the large matrices of a plain Keras model over a row of the mesh.

The rules are those of M. Shoeybi et al., "Megatron-LM", 2019, https://arxiv.org/abs/1909.08053. Of two consecutive
Dense layers, the first keeps columns and the second rows, so no communication is needed between them. Attention is
divided by heads, an embedding by its vocabulary. As in `keras.distribution.LayoutMap`, a layout maps patterns of weight
paths to the axis along which these weights are divided. If any other layer needs a whole tensor, the parts are gathered
before it.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

import keras

from hvdkit import world
from hvdkit.collectives.mesh import Mesh, Shard, mark
from hvdkit.compat.keras3 import consumers_of, operation_of
from hvdkit.errors import UsageError
from hvdkit.parallel import graph, whole_model
from hvdkit.parallel import layers as parts

_log = logging.getLogger(__name__)

Layout = Mapping[str, tuple[str | None, ...]]

_ELEMENTWISE = {
    "linear",
    "relu",
    "relu6",
    "gelu",
    "silu",
    "swish",
    "tanh",
    "sigmoid",
    "elu",
    "selu",
    "softplus",
    "leaky_relu",
}
_PASS_THROUGH = (keras.layers.Activation, keras.layers.Dropout, keras.layers.ReLU, keras.layers.LeakyReLU)


def split_tensors(model: keras.Model, mesh: Mesh, layout: Layout | None = None) -> keras.Model:
    """Divides the matrices of a model and returns this rank's part.

    Its weights are copies of parts of `model`'s, so you may delete `model` afterwards. The ranks of a row have the same
    random seeds for dropout.

    Args:
        model: a built functional or sequential model, the same on all ranks; compiled or not.
        mesh: the ranks.
        layout: maps patterns of weight paths (`re.search`) to a tuple with "model" at the axis to divide and None at
            the others, for example `{"mlp_up/kernel": (None, "model"), "mlp_down/kernel": ("model", None)}`. A bias
            follows its kernel; the other kernels of an attention layer follow its query kernel. By default
            `automatic_layout`.

    Returns:
        A model with the same inputs and outputs. It is not compiled.

    Raises:
        UsageError: a layout matches no weight of the model, or a layer that cannot be divided in this way.
    """
    functional = graph.functional(model)
    layout = automatic_layout(model, mesh) if layout is None else layout
    plan = plan_of(functional, layout)
    if not plan:
        raise UsageError(
            f"The model {model.name!r} has no layers that can be divided automatically: attentions, embeddings and "
            f"pairs of Dense layers whose sizes are multiples of {mesh.model}. Give a layout, or use another strategy."
        )
    if world.rank() == 0:
        _log.info("%s\n%s", mesh.describe(), "\n".join(f"{path}: {axes}" for path, axes in layout.items()))
    build = _Builder(functional, mesh, plan)
    divided = keras.models.clone_model(functional, clone_function=build.layer, call_function=build.call)
    _take_weights(divided, functional, mesh)
    return whole_model.remember(divided, model)


def automatic_layout(model: keras.Model, mesh: Mesh) -> dict[str, tuple[str | None, ...]]:
    """Returns a layout for the layers of a model that can be divided and are worth it.

    These are attentions, embeddings, and pairs of Dense layers with only elementwise layers between them.
    """
    functional = graph.functional(model)
    layout: dict[str, tuple[str | None, ...]] = {}
    taken: set[str] = set()
    for layer in functional.layers:
        path = _pattern(layer)
        if type(layer) is keras.layers.MultiHeadAttention and layer.num_heads % mesh.model == 0:
            layout[f"{path}/query/kernel$"] = (None, "model", None)
        elif type(layer) is keras.layers.Embedding and layer.input_dim % mesh.model == 0:
            layout[f"{path}/embeddings$"] = ("model", None)
        elif _is_dense(layer, mesh) and layer.name not in taken:
            second = _dense_behind(layer)
            if second is not None and second.name not in taken:
                taken |= {layer.name, second.name}
                layout[f"{path}/kernel$"] = (None, "model")
                layout[f"{_pattern(second)}/kernel$"] = ("model", None)
    return layout


class _Builder:
    """Builds the divided model layer by layer, and keeps track of the tensors that are parts."""

    def __init__(self, model: keras.Model, mesh: Mesh, plan: dict[str, int]) -> None:
        self._mesh, self._plan = mesh, plan
        self._axes: dict[int, tuple[Any, int]] = {}  # from a tensor's id to the tensor and the axis of its division
        self._last = {operation_of(t).name for t in keras.tree.flatten(model.outputs)}

    def layer(self, layer: keras.layers.Layer) -> keras.layers.Layer:
        """Returns the layer that replaces `layer`."""
        config = layer.get_config()
        if not isinstance(layer, keras.layers.Layer):  # an operation, such as x + y
            return type(layer).from_config(config)
        axis = self._plan.get(layer.name)
        if axis is None:
            return type(layer).from_config(config)
        if isinstance(layer, keras.layers.MultiHeadAttention):
            return parts.HeadsAttention(self._mesh, **_without(config, "query_shape", "key_shape", "value_shape"))
        if isinstance(layer, keras.layers.EinsumDense):
            cls: Any = parts.ColumnEinsumDense if _gives_part(layer, axis) else parts.RowEinsumDense
            return cls(self._mesh, axis, **config)
        if isinstance(layer, keras.layers.Embedding):
            cls = parts.ColumnEmbedding if axis == 1 else parts.VocabularyEmbedding
            return cls(self._mesh, **config)
        return (parts.ColumnDense if axis == 1 else parts.RowDense)(self._mesh, **config)

    def call(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a layer with parts of tensors if it takes parts, with whole tensors otherwise."""
        if isinstance(layer, (parts.RowDense, parts.RowEinsumDense)):
            args = (self._part(args[0], _input_axis(layer), layer.name), *args[1:])
            output = layer(*args, **kwargs)
        elif (axis := self._passes(layer, args)) is not None:
            output = layer(*args, **kwargs)
            self._axes[id(output)] = (output, axis)
        else:
            args, kwargs = keras.tree.map_structure(lambda x: self._whole(x, layer.name), (args, kwargs))
            output = layer(*args, **kwargs)
            if isinstance(layer, (parts.ColumnDense, parts.ColumnEmbedding)):
                self._axes[id(output)] = (output, -1)
            elif isinstance(layer, parts.ColumnEinsumDense):
                self._axes[id(output)] = (output, layer.output_axis)
        if layer.name in self._last:
            output = keras.tree.map_structure(lambda x: self._whole(x, layer.name), output)
        return output

    def _passes(self, layer: Any, args: Any) -> int | None:
        """Returns the axis along which the layer's input is divided, if its output is divided in the same way."""
        if isinstance(layer, _PASS_THROUGH) and len(args) == 1 and id(args[0]) in self._axes:
            name = getattr(getattr(layer, "activation", None), "__name__", "linear")
            return self._axes[id(args[0])][1] if name in _ELEMENTWISE else None
        return None

    def _whole(self, x: Any, layer: str) -> Any:
        if id(x) not in self._axes:
            return x
        axis = self._axes[id(x)][1]
        return parts.JoinParts(self._mesh, axis, name=f"{operation_of(x).name}_joined_for_{layer}")(x)

    def _part(self, x: Any, axis: int, layer: str) -> Any:
        if id(x) in self._axes and self._axes[id(x)][1] % len(x.shape) == axis % len(x.shape):
            return x
        return parts.OwnPart(self._mesh, axis, name=f"{layer}_own_part")(self._whole(x, layer))


def plan_of(model: keras.Model, layout: Layout) -> dict[str, int]:
    """Returns for each divided layer's name the axis along which its kernel is divided.

    Raises:
        UsageError: see `split_tensors`.
    """
    plan: dict[str, int] = {}
    for pattern, axes in layout.items():
        found = [(layer, w) for layer in model.layers for w in layer.weights if re.search(pattern, w.path)]
        if not found:
            raise UsageError(
                f"The layout's pattern {pattern!r} matches no weight of the model {model.name!r}. Its weights are "
                f"{', '.join(w.path for w in model.weights[:6])}, ..."
            )
        for layer, weight in found:
            axis = _axis(layer, weight, axes)
            if axis is not None:
                plan[layer.name] = axis
    return plan


def _axis(layer: Any, weight: Any, axes: tuple[str | None, ...]) -> int | None:
    """Returns the axis of the kernel along which `axes` divides a layer; None if it divides none."""
    if len(axes) != len(weight.shape) or set(axes) - {None, "model"} or axes.count("model") > 1:
        raise UsageError(
            f'The layout gives {weight.path} the axes {axes}; write {len(weight.shape)} axes, one of them "model" and '
            f"the others None."
        )
    if "model" not in axes or weight.path.endswith("/bias"):
        return None  # a bias follows its kernel
    axis = axes.index("model")
    kind = type(layer)
    if kind is keras.layers.MultiHeadAttention:
        right = axis == (0 if weight.path.endswith("attention_output/kernel") else 1)
    elif kind is keras.layers.EinsumDense:
        x, kernel, output = parts.letters(layer.equation)
        right = (kernel[axis] in output) != (kernel[axis] in x)
    else:
        right = kind in (keras.layers.Dense, keras.layers.Embedding)
    if kind is keras.layers.Dense and axis == 1:
        right = getattr(layer.activation, "__name__", "") in _ELEMENTWISE
    if not right:
        raise UsageError(
            f"The layout divides {weight.path} along axis {axis}, which a {kind.__name__} cannot do. Dense, "
            f"EinsumDense and Embedding layers can be divided along both of their axes (a Dense by columns only with "
            f"an elementwise activation), MultiHeadAttention along its heads."
        )
    return axis


def _take_weights(divided: keras.Model, model: keras.Model, mesh: Mesh) -> None:
    """Copies this rank's parts of the whole model's weights into the divided model."""
    for layer in divided.layers:
        if not layer.weights:
            continue
        axes = getattr(layer, "split_axes", {})
        for weight, source in zip(layer.weights, model.get_layer(layer.name).weights, strict=True):
            value = keras.ops.convert_to_numpy(source)
            whole_model.part_of(weight, source.path)
            axis = next((a for name, a in axes.items() if weight.path.endswith(f"{layer.name}/{name}")), None)
            if axis is not None:
                size = weight.shape[axis]
                value = value.take(range(mesh.model_index * size, (mesh.model_index + 1) * size), axis)
                mark(weight, Shard(mesh, axis))
            weight.assign(value)


def _pattern(layer: Any) -> str:
    return f"(^|/){re.escape(layer.name)}"


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def _is_dense(layer: Any, mesh: Mesh) -> bool:
    elementwise = type(layer) is keras.layers.Dense and getattr(layer.activation, "__name__", "") in _ELEMENTWISE
    return elementwise and layer.units % mesh.model == 0


def _dense_behind(layer: Any) -> Any:
    """Returns the Dense layer that is the only consumer of a layer's output, skipping elementwise layers."""
    while len(takers := consumers_of(layer)) == 1:
        layer = takers[0]
        if type(layer) is keras.layers.Dense:
            return layer
        if not isinstance(layer, _PASS_THROUGH):
            return None
    return None


def _gives_part(layer: Any, axis: int) -> bool:
    _, kernel, output = parts.letters(layer.equation)
    return kernel[axis] in output


def _input_axis(layer: Any) -> int:
    if isinstance(layer, parts.RowDense):
        return -1
    x, kernel, _ = parts.letters(layer.equation)
    return x.index(kernel[layer.split_axes["kernel"]]) - len(x)
