"""From texts to token numbers, with one vocabulary that is the same on all ranks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from hvdkit.data.shard import even_share
from hvdkit.data.sources import Source


class Vocabulary:
    """Turns texts into token numbers of a fixed length: 0 for padding, 1 for unknown words, 2 the most frequent word.

    Args:
        tokens: the words in order of decreasing frequency, without the entries for padding and unknown words.
        sequence_length: tokens per text; longer texts are cut, shorter ones padded at the end.
    """

    def __init__(self, tokens: Sequence[str], sequence_length: int) -> None:
        self.tokens = list(tokens)
        self.sequence_length = sequence_length
        self._layer = _vectorizer(len(self.tokens) + 2, sequence_length)
        self._layer.set_vocabulary(self.tokens)

    @property
    def size(self) -> int:
        """Number of different token numbers."""
        return len(self.tokens) + 2

    def encode(self, text: Any) -> tf.Tensor:
        """Turns a text (string) into token numbers, int32 [sequence_length]; a graph function."""
        return tf.ensure_shape(tf.cast(self._layer(text), tf.int32), [self.sequence_length])

    def save(self, path: Path) -> None:
        """Writes the words, one per line, in order of decreasing frequency."""
        path.write_text("".join(f"{token}\n" for token in self.tokens), encoding="utf-8")


def learn_tokens(
    source: Source,
    max_tokens: int,
    share: int = 0,
    shares: int = 1,
    adapt: Callable[[keras.layers.TextVectorization, tf.data.Dataset], None] = keras.layers.TextVectorization.adapt,
) -> list[str]:
    """Returns the most frequent words of the train split, in order of decreasing frequency.

    Words are lower-cased. Of the punctuation, only ! and ? are kept, each as a word.

    Args:
        source: a source of texts.
        max_tokens: size of the vocabulary, including padding and unknown words.
        share: index of the share of the texts to read.
        shares: number of shares.
        adapt: lets a layer learn from texts; with several shares, from those that all ranks read.
    """
    start, stop = even_share(source.size("train"), share, shares)
    texts = source.read("train", start, stop).map(lambda text, _: source.decode(text))
    layer = _vectorizer(max_tokens, None)
    adapt(layer, texts.batch(1024))
    return layer.get_vocabulary(include_special_tokens=False)


@keras.saving.register_keras_serializable("hvdkit")
def standardize(text: Any) -> tf.Tensor:
    """Lower-cases a text and keeps words, numbers, apostrophes inside words, and the marks ! and ?."""
    text = tf.strings.lower(text)
    text = tf.strings.regex_replace(text, r"[^\p{L}\p{N}'!?]+", " ")
    text = tf.strings.regex_replace(text, r"(^|[^\p{L}\p{N}])'+", r"\1 ")  # quotes before a word ...
    text = tf.strings.regex_replace(text, r"'+([^\p{L}\p{N}]|$)", r" \1")  # ... and after one
    return tf.strings.regex_replace(text, r"([!?])", r" \1 ")


def _vectorizer(max_tokens: int, length: int | None) -> keras.layers.TextVectorization:
    # The layer runs in the input pipeline on the CPU. The model itself takes token numbers.
    return keras.layers.TextVectorization(max_tokens=max_tokens, standardize=standardize, output_sequence_length=length)
