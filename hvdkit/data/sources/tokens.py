"""Text as windows of bytes, for models that predict the next token. There are no classes."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from hvdkit.data.sources.schema import CLASSIFICATION
from hvdkit.errors import UsageError

VOCABULARY_SIZE = 256  # a token is a byte
_HELD_OUT = 0.1  # fraction at the end of a text to use as the test split if there is none
_NOT_TEXT = b"\0"
_log = logging.getLogger(__name__)


class TokenSource:
    """Windows of a text; see `Source` for the attributes.

    Window i holds the bytes `i * L` to `(i + 1) * L`, where L is the sequence length. The label of a byte is the byte
    after it. So an epoch predicts each byte once, except the first one and those at the end that do not fill a window.
    Every rank keeps the full text in memory.

    Args:
        name: the name that the user gave.
        texts: the text of each split.
        sequence_length: L, tokens per window; by default 64, or less if a split is shorter.

    Raises:
        UsageError: a split is shorter than a window plus one byte.
    """

    kind = "tokens"
    task = CLASSIFICATION
    vocabulary_size = VOCABULARY_SIZE

    def __init__(self, name: str, texts: dict[str, bytes], sequence_length: int | None = None) -> None:
        sequence_length = sequence_length or min(64, *(max(1, len(text) - 1) for text in texts.values()))
        self.name = name
        self.label_names: list[str] = []
        self.feature_names: list[str] = []
        self.splits = tuple(texts)
        self.shape: tuple[int, ...] | None = None
        self.sequence_length = sequence_length
        self._texts = texts
        for split, text in texts.items():
            if len(text) <= sequence_length:
                raise UsageError(
                    f"The {split} part of {name} has {len(text)} bytes, and a window of {sequence_length} needs "
                    f"{sequence_length + 1}. Give a longer text, or a smaller --sequence-length."
                )

    def cut(self, sequence_length: int) -> "TokenSource":
        """Returns the same text in windows of a different length."""
        return TokenSource(self.name, self._texts, sequence_length)

    def hold_out(self, share: float) -> "TokenSource":
        """Returns the same text with a validation split: the last `share` of the train split's bytes."""
        text = self._texts["train"]
        cut = len(text) - round(len(text) * share)
        return TokenSource(self.name, {**self._texts, "train": text[:cut], "validation": text[cut:]})

    def length(self, split: str) -> int:
        """Number of bytes in a split."""
        return len(self._texts[split])

    def size(self, split: str) -> int:
        """Number of windows in a split."""
        return (len(self._texts[split]) - 1) // self.sequence_length

    def read(self, split: str, start: int, stop: int) -> tf.data.Dataset:
        """Windows `start` to `stop` of a split, uint8 [sequence_length], with labels, int32 [sequence_length]."""
        text = np.frombuffer(self._texts[split], np.uint8)
        inputs, labels = (self._windows(text[shift:], start, stop) for shift in (0, 1))
        windows = tf.data.Dataset.from_tensor_slices((inputs, labels))
        return windows.map(lambda x, y: (x, tf.cast(y, tf.int32)), num_parallel_calls=tf.data.AUTOTUNE)

    def locate(self, split: str, index: int) -> str:
        """The index of an example."""
        return f"example {index}"

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
    """Loads the texts that this Python's `help()` shows for keywords and topics (PSF licence).

    Topics share paragraphs. Each paragraph is used once: otherwise the test split would contain training text. The text
    depends on the Python version; 3.11 has 0.4 MB.

    Raises:
        UsageError: this Python was installed without the texts.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError(
            "This Python has no module pydoc_data, which contains the texts of the data set pydoc. Install the full "
            "standard library, or give your own text with --dataset=text:PATH."
        ) from None
    paragraphs = (part for topic in topics.values() for part in topic.strip("\n").split("\n\n"))
    text = "\n\n".join(dict.fromkeys(paragraphs))
    return TokenSource("pydoc", hold_out_end(text.encode()))


def load_text(path: Path) -> TokenSource:
    """Reads a file, or all files of a folder and its subfolders in the order of their names, byte for byte.

    Skips hidden files and files that are not text (they contain a zero byte).

    Raises:
        UsageError: there is no text, or a file cannot be read.
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
            f"There is no text in {path}: of {len(texts)} file(s), {len(others)} are not text (they contain a zero "
            f"byte), the others are empty. Give a text file, or a folder of text files."
        )
    if others:
        _log.warning("%s: %d of %d files are not text, such as %s", path, len(others), len(texts), others[0].name)
    return TokenSource(path.name or str(path), hold_out_end(text))


def join(texts: Iterable[bytes]) -> bytes:
    """Concatenates texts and ends each one with a newline."""
    return b"".join(text if text.endswith(b"\n") else text + b"\n" for text in texts if text)


def _shown(file: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(folder).parts)
