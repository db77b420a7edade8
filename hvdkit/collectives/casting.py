"""Compression by casting: the dtype in which gradients are sent.

`compress` converts a tensor to what is sent, and `decompress` converts what was received back. The classes have the
interface of `horovod.tensorflow.compression`, whose classes also work here.
"""

from typing import Any

import tensorflow as tf


class NoneCompressor:
    """Sends the gradient unchanged."""

    wire_dtype: tf.DType | None = None

    @classmethod
    def compress(cls, tensor: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Returns the tensor to send, and the context that `decompress` needs (the original dtype)."""
        if cls.wire_dtype is None or not tensor.dtype.is_floating or tensor.dtype.size <= cls.wire_dtype.size:
            return tensor, tensor.dtype
        return tf.cast(tensor, cls.wire_dtype), tensor.dtype

    @classmethod
    def decompress(cls, tensor: tf.Tensor, ctx: Any) -> tf.Tensor:
        """Returns the received tensor in the dtype it had before `compress`."""
        return tensor if tensor.dtype == ctx else tf.cast(tensor, ctx)


class FP16Compressor(NoneCompressor):
    """Sends floats as IEEE float16: half the bytes of float32; 11 bits of precision, overflows beyond 65,504."""

    wire_dtype = tf.float16


class BF16Compressor(NoneCompressor):
    """Sends floats as bfloat16: half the bytes of float32; 8 bits of precision, the range of float32.

    Horovod does not support bfloat16, so hvdkit sums it itself, in float32 (see `hvdkit.collectives`).
    """

    wire_dtype = tf.bfloat16
