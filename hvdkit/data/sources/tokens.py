"""Running text as bytes, in windows: for models that predict the next token. There are no classes."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.errors import UsageError

VOCABULARY_SIZE = 256  # a token is a byte
_HELD_OUT = 0.1  # the end of a text that is the test split, where there is none
_NOT_TEXT = b"\0"
_log = logging.getLogger(__name__)


class TokenSource:
    """Windows of a text; see `Source` for the attributes.

    Window i is the bytes `i * L` to `(i + 1) * L`, where L is the sequence length; its labels are the bytes that follow
    each of them. So in an epoch each byte but the first is predicted once; those at the end that fill no window are
    not. The text lies in memory on every rank.

    Args:
        name: what the user calls it.
        texts: for `train` and `test` the text.
        sequence_length: L, tokens of a window; by default 64, or as many as the shorter split has.

    Raises:
        UsageError: a split is shorter than a window and the byte after it.
    """

    kind = "tokens"
    vocabulary_size = VOCABULARY_SIZE

    def __init__(self, name: str, texts: dict[str, bytes], sequence_length: int | None = None) -> None:
        sequence_length = sequence_length or min(64, *(max(1, len(text) - 1) for text in texts.values()))
        self.name = name
        self.label_names: list[str] = []
        self.shape: tuple[int, int, int] | None = None
        self.sequence_length = sequence_length
        self._texts = texts
        for split, text in texts.items():
            if len(text) <= sequence_length:
                raise UsageError(
                    f"The {split} part of {name} has {len(text)} bytes, and a window of {sequence_length} needs "
                    f"{sequence_length + 1}. Give a longer text, or a smaller --sequence_length."
                )

    def cut(self, sequence_length: int) -> "TokenSource":
        """The same text in windows of another length."""
        return TokenSource(self.name, self._texts, sequence_length)

    def length(self, split: str) -> int:
        """Bytes of a split."""
        return len(self._texts[split])

    def size(self, split: str) -> int:
        """Number of windows in split `train` or `test`."""
        return (len(self._texts[split]) - 1) // self.sequence_length

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Windows `start` to `stop` of a split, uint8 [sequence_length], and their labels, int32 alike."""
        text = np.frombuffer(self._texts[split], np.uint8)
        inputs, labels = (self._windows(text[shift:], start, stop) for shift in (0, 1))
        windows = tf.data.Dataset.from_tensor_slices((inputs, labels))
        return windows.map(lambda x, y: (x, tf.cast(y, tf.int32)), num_parallel_calls=tf.data.AUTOTUNE)

    def decode(self, encoded: Any) -> tf.Tensor:
        """Bytes as token numbers, int32."""
        return tf.cast(encoded, tf.int32)

    def _windows(self, text: np.ndarray, start: int, stop: int) -> np.ndarray:
        length = self.sequence_length
        return text[start * length : stop * length].reshape(stop - start, length)


def hold_out_end(text: bytes) -> dict[str, bytes]:
    """Splits a text into `train` and, the last 10 % of its bytes, `test`."""
    cut = len(text) - round(len(text) * _HELD_OUT)
    return {"train": text[:cut], "test": text[cut:]}


def load_pydoc() -> TokenSource:
    """The reference texts of the Python that runs, those that `help()` shows for keywords and topics (PSF licence).

    Topics share paragraphs; each is taken once, since otherwise the test split would be known from training. The text
    is that of the Python version: 3.11 has 0.4 MB of it.

    Raises:
        UsageError: this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError(
            "This Python has no module pydoc_data, which holds the texts of the data set pydoc. Install the whole "
            "standard library, or give a text of your own with --dataset=text:PATH."
        ) from None
    paragraphs = (part for topic in topics.values() for part in topic.strip("\n").split("\n\n"))
    text = "\n\n".join(dict.fromkeys(paragraphs))
    return TokenSource("pydoc", hold_out_end(text.encode()))


def load_text(path: Path) -> TokenSource:
    """Reads a file, or all files of a folder and its folders in the order of their names, as they are.

    Hidden files, and files that are no text (they have a byte 0), are passed over.

    Raises:
        UsageError: there is no text, or it cannot be read.
    """
    try:
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _shown(p, path))
        texts = {file: file.read_bytes() for file in found}
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read ({error.strerror}). Make it readable, or move it.") from None
    others = [file for file, text in texts.items() if _NOT_TEXT in text]
    text = join(text for text in texts.values() if _NOT_TEXT not in text)
    if not text:
        raise UsageError(
            f"There is no text in {path}: of {len(texts)} file(s), {len(others)} are no text (they have a byte 0), the "
            f"others are empty. Give a text file, or a folder of text files."
        )
    if others:
        _log.warning("%s: %d of %d files are no text, such as %s", path, len(others), len(texts), others[0].name)
    return TokenSource(path.name or str(path), hold_out_end(text))


def join(texts: Iterable[bytes]) -> bytes:
    """One text of many, each ended by a line's end."""
    return b"".join(text if text.endswith(b"\n") else text + b"\n" for text in texts if text)


def _shown(file: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(folder).parts)
