"""What a gradient looks like on the wire.

A compression turns a tensor into what is sent (`compress`) and what came back into a tensor (`decompress`). The
classes have the interface of `horovod.tensorflow.compression`, whose classes can be passed as well.
"""

from typing import Any

import tensorflow as tf


class NoneCompressor:
    """Sends the gradient as it is."""

    wire_dtype: tf.DType | None = None

    @classmethod
    def compress(cls, tensor: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns what is sent, and the context that `decompress` needs (the tensor's dtype)."""
        if cls.wire_dtype is None or not tensor.dtype.is_floating or tensor.dtype.size <= cls.wire_dtype.size:
            return tensor, tensor.dtype
        return tf.cast(tensor, cls.wire_dtype), tensor.dtype

    @classmethod
    def decompress(cls, tensor: tf.Tensor, ctx: Any) -> tf.Tensor:
        """Returns what came back, in the dtype it had before `compress`."""
        return tensor if tensor.dtype == ctx else tf.cast(tensor, ctx)


class FP16Compressor(NoneCompressor):
    """Sends floats as IEEE float16: half of float32's bytes; 11 bits of precision, overflows beyond 65,504."""

    wire_dtype = tf.float16


class BF16Compressor(NoneCompressor):
    """Sends floats as bfloat16: half of float32's bytes; 8 bits of precision, the range of float32.

    Horovod has no bfloat16, so hvdkit sums it itself, in float32 (see `hvdkit.collectives`).
    """

    wire_dtype = tf.bfloat16
