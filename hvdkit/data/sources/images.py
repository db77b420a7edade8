"""Decode image files into 8 bits a channel: what TensorFlow decodes, 16 bits, and formats that only Pillow reads."""

import io
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_LARGEST = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))  # values of white in sensors that store 16 bits
_HEAD = 26  # bytes of a file that tell its format, and the depth of a PNG
_DEPTH_AT = 24  # the byte of a PNG with its bits a channel (PNG specification, section 11.2.2)
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises
_PNG = b"\x89PNG\r\n\x1a\n"
_SIGNATURES = (_PNG, b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")  # BMP and WebP: see is_encoded


def decode(encoded: tf.Tensor, white: int) -> tf.Tensor:
    """Graph function from the bytes of an image file to uint8 [height, width, 3]; of an animation the first image.

    Args:
        encoded: the bytes of a file, a string scalar.
        white: the value that becomes 255 in an image of 16 bits; see `white_of`.

    Raises:
        tf.errors.InvalidArgumentError: the file is damaged, is no image, or has values larger than `white`.
    """
    head = tf.io.decode_raw(tf.strings.substr(encoded, 0, _HEAD), tf.uint8)
    head = tf.pad(head, [[0, _HEAD - tf.size(head)]])
    is_png = _begins(head, _PNG)
    is_tiff = _begins(head, b"II*\0") | _begins(head, b"MM\0*")
    is_webp = _begins(head, b"RIFF") & _begins(head[8:], b"WEBP")
    return tf.case(
        [
            (is_png & (head[_DEPTH_AT] == 16), lambda: to_8_bits(tf.io.decode_png(encoded, 3, tf.uint16), white)),
            (is_tiff | is_webp, lambda: _decode_by_pillow(encoded, white)),
        ],
        default=lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
        exclusive=True,
    )


def to_8_bits(image: tf.Tensor, white: int) -> tf.Tensor:
    """Scales an image of 16 bits, so that `white` becomes 255, to uint8.

    Raises:
        tf.errors.InvalidArgumentError: a value is larger than `white`.
    """
    largest = tf.cast(tf.reduce_max(image), tf.int32)
    message = f"The image has values above {white}, the largest that the first images have, rounded up to whole bits."
    with tf.control_dependencies([tf.debugging.assert_less_equal(largest, white, message)]):
        return tf.cast(tf.round(tf.cast(image, tf.float32) * (255 / white)), tf.uint8)


def white_of(images: Iterable[np.ndarray]) -> int:
    """Returns the value of white in images of 16 bits: what cameras of 8, 10, 12, 14 or 16 bits store at most.

    It is that of 16 bits if there are no images.
    """
    largest = max((int(image.max()) for image in images), default=_LARGEST[-1])
    return next((value for value in _LARGEST if largest <= value), largest)


def is_encoded(content: bytes) -> bool:
    """Returns whether bytes begin as an image file does."""
    is_webp = (content[:4], content[8:12]) == (b"RIFF", b"WEBP")
    is_bmp = (content[:2], content[6:10]) == (b"BM", bytes(4))
    return content.startswith(_SIGNATURES) or is_webp or is_bmp


def look_at(content: bytes) -> tuple[tuple[int, int], np.ndarray | None]:
    """Returns the (width, height) of the image in a file's content, and its pixels if they have 16 bits.

    Raises:
        ValueError: it cannot be read as an image.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "PNG" and content[_DEPTH_AT] == 16:  # Pillow keeps 8 bits of those in color
                return image.size, tf.io.decode_png(content, dtype=tf.uint16).numpy()
            return image.size, np.asarray(image) if image.mode.startswith("I") else None
    except (*_UNREADABLE, tf.errors.InvalidArgumentError) as error:
        raise ValueError(_reason(error)) from error


def resize(image: tf.Tensor, size: int) -> tf.Tensor:
    """Resizes a uint8 image to `size` by `size` pixels, bilinearly and with antialiasing."""
    resized = tf.image.resize(image, [size, size], antialias=True)
    return tf.cast(tf.round(tf.clip_by_value(resized, 0, 255)), tf.uint8)


def _begins(head: tf.Tensor, signature: bytes) -> tf.Tensor:
    return tf.reduce_all(head[: len(signature)] == np.frombuffer(signature, np.uint8))


def _decode_by_pillow(encoded: tf.Tensor, white: int) -> tf.Tensor:
    pixels, is_deep = tf.numpy_function(_pixels, [encoded], [tf.int32, tf.bool])
    pixels = tf.ensure_shape(pixels, [None, None, 3])
    return tf.cond(is_deep, lambda: to_8_bits(pixels, white), lambda: tf.cast(pixels, tf.uint8))


def _pixels(encoded: Any) -> tuple[np.ndarray, np.bool_]:
    """Returns the pixels, int32 [height, width, 3], and whether they have 16 bits."""
    try:
        with Image.open(io.BytesIO(np.asarray(encoded).item())) as image:
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits a channel")
            is_deep = image.mode.startswith("I")
            pixels = np.asarray(image if is_deep else image.convert("RGB"), np.int32)
    except _UNREADABLE as error:
        raise ValueError(_reason(error)) from error
    return np.ascontiguousarray(np.repeat(pixels[..., np.newaxis], 3, axis=2) if is_deep else pixels), np.bool_(is_deep)


def _reason(error: Any) -> str:
    return "it is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else first_line(error)


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, at most 200 characters of it, without TensorFlow's additions."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines or [type(error).__name__])[0].split("[Op:")[0]
    return re.sub(r"^\{\{[^}]*\}\} ?|^\w*Error: ", "", text).strip()[:200]
