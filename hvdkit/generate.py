"""Generates text with a trained model that predicts the next byte.

    hvdkit generate RUN_FOLDER --prompt "The with statement" --length 200 --temperature 0.8 --top-k 40

RUN_FOLDER is the `--workdir` of `hvdkit train`, or a `.keras` file. The command runs in one process and loads the model
with plain Keras. The same seed gives the same text on the same machine.

Exit codes: 0 success, 2 wrong usage; the message says how to fix it.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as in training

import numpy as np

from hvdkit import outcome
from hvdkit.command.arguments import Parser
from hvdkit.errors import UsageError

_LONG = 256  # tokens, from which on XLA saves more time than it takes

if TYPE_CHECKING:  # they load for seconds, and a wrong command line is told at once
    import keras


def main(argv: list[str]) -> int:
    """Prints the prompt and the generated text byte by byte; returns the exit code."""
    try:
        arguments = parser().parse_args(argv[1:])
        check(arguments.prompt, arguments.length, arguments.temperature, arguments.top_k, arguments.seed)
        model = open_model(Path(arguments.run).expanduser())
        prompt = arguments.prompt.encode("utf-8", "surrogateescape")  # keep bytes that are not valid UTF-8
        draw = {"temperature": arguments.temperature, "top_k": arguments.top_k, "seed": arguments.seed}
        tokens = generate(model, prompt, arguments.length, **draw)
        _show(prompt)
        for token in tokens:
            _show(bytes([token]))
    except UsageError as error:
        print(f"hvdkit.generate: {error}", file=sys.stderr)
        return outcome.USAGE
    _show(b"\n")
    return 0


def open_model(run: Path) -> "keras.Model":
    """Opens the model of a run.

    Args:
        run: the run's folder, or a `.keras` file.

    Raises:
        UsageError: there is no model, it cannot be opened, or it does not predict bytes.
    """
    file = run if run.suffix == ".keras" else run / "model.keras"
    if not file.is_file():
        unfinished = " (the run is not finished: run the same command again to resume it)" if run.is_dir() else ""
        raise UsageError(f"{file} does not exist{unfinished}. Give the folder that hvdkit.train wrote (--workdir).")
    import keras

    from hvdkit.data.sources.tokens import VOCABULARY_SIZE

    try:
        model = keras.saving.load_model(file, compile=False)
    except Exception as error:  # any error that Keras raises for an invalid file or for a user's own layers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{file} cannot be opened ({reason}). Train it again, or give another file.") from error
    window, output = model.input_shape, model.output_shape
    if not (isinstance(window, tuple) and len(window) == 2 and output == (None, window[1], VOCABULARY_SIZE)):
        raise UsageError(
            f"{file} is a model from {window} to {output}, but text needs one from (None, length) to (None, length, "
            f"{VOCABULARY_SIZE}), which predicts the next byte. Give the folder of a run with --model=gpt."
        )
    return model


def generate(
    model: "keras.Model",
    prompt: bytes,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Samples tokens one after another from the model's prediction of the next token.

    A model of `models/gpt.py` keeps what it computed for earlier tokens. When the text fills its window, it goes on
    with the second half of it, so that it sees half a window or more. For long texts XLA compiles the computation of a
    token, which takes a second. Another model computes the last `window` tokens anew for each token.

    Args:
        model: a causal model from tokens (int [batch, window]) to logits [batch, window, vocabulary].
        prompt: the text to continue; at least one token.
        length: number of tokens to sample.
        temperature: divisor of the logits; 0 always takes the most likely token.
        top_k: sample from the k most likely tokens; from all by default.
        seed: seed of the samples.

    Returns:
        An iterator over the sampled tokens.

    Raises:
        UsageError: an argument is out of range.
    """
    check(prompt, length, temperature, top_k, seed)
    return _draw(model, list(prompt), length, temperature, top_k, np.random.default_rng(seed))


def check(prompt: bytes | str, length: int, temperature: float, top_k: int | None, seed: int) -> None:
    """Raises a `UsageError` if an argument of `generate` is out of range."""
    if not prompt:
        raise UsageError("The prompt is empty, but the model needs a text to continue. Give a word, or a newline.")
    if length < 0 or temperature < 0 or (top_k is not None and top_k < 1) or seed < 0:
        raise UsageError(
            f"length={length}, temperature={temperature}, top_k={top_k}, seed={seed}: top_k must be 1 or more, the "
            f"others 0 or more. Correct the one that is not."
        )


def _draw(
    model: "keras.Model",
    tokens: list[int],
    length: int,
    temperature: float,
    top_k: int | None,
    generator: np.random.Generator,
) -> Iterator[int]:
    predict = _prediction(model, length)
    for _ in range(length):
        token = _choose(predict(tokens).astype(np.float64), temperature, top_k, generator)
        tokens.append(token)
        yield token


def _prediction(model: "keras.Model", length: int) -> Callable[[list[int]], np.ndarray]:
    """Returns what gives the logits behind the last one of the tokens, float32 [vocabulary], for `length` tokens."""
    from hvdkit_models import gpt

    try:
        return _Cached(gpt.Cached(model), compiled=length >= _LONG)
    except ValueError:
        return _whole_windows(model)


def _whole_windows(model: "keras.Model") -> Callable[[list[int]], np.ndarray]:
    import tensorflow as tf

    window = model.input_shape[1]

    @tf.function(jit_compile=False, autograph=False)
    def logits_at(places: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        return model(places[None], training=False)[0, last]

    def predict(tokens: list[int]) -> np.ndarray:
        seen = tokens[-window:]
        return logits_at(tf.constant(_filled_up(seen, window)), tf.constant(len(seen) - 1)).numpy()

    return predict


class _Cached:
    """Gives the logits behind the last one of the tokens, of which there is one more at each call."""

    def __init__(self, model: Any, compiled: bool) -> None:
        import tensorflow as tf

        self._window = model.window
        self._fill = tf.function(model, jit_compile=False, autograph=False)
        self._step = tf.function(model, jit_compile=compiled, autograph=False)
        self._empty = self._kept = model.empty()
        self._begin = self._done = 0  # the place in the text of the window's first token, and the tokens kept in it

    def __call__(self, tokens: list[int]) -> np.ndarray:
        import tensorflow as tf

        if self._done and len(tokens) - self._begin <= self._window:
            logits, self._kept = self._step(tf.constant(tokens[-1:]), tf.constant(self._done), self._kept)
            self._done += 1
            return logits[0].numpy()
        self._begin = 0 if len(tokens) <= self._window else len(tokens) - self._window // 2
        seen = tokens[self._begin :]
        filled_up = tf.constant(_filled_up(seen, self._window))
        logits, self._kept = self._fill(filled_up, tf.constant(0), self._empty)
        self._done = len(seen)
        return logits[self._done - 1].numpy()


def _filled_up(tokens: list[int], window: int) -> list[int]:
    """Returns a whole window: a causal model ignores tokens after the last one."""
    return tokens + [0] * (window - len(tokens))


def _choose(logits: np.ndarray, temperature: float, top_k: int | None, generator: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    likeliest = np.argsort(-logits, kind="stable")[:top_k]
    scaled = (logits[likeliest] - logits.max()) / temperature
    chances = np.exp(scaled) / np.exp(scaled).sum()
    return int(generator.choice(likeliest, p=chances))


def _show(text: bytes) -> None:
    """Writes bytes unchanged: a multi-byte character is complete after its last byte."""
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def parser() -> Parser:
    """Returns the command's parser."""
    made = Parser("generate", description=__doc__)
    add: Any = made.add_argument
    add("run", metavar="RUN_FOLDER", help="the --workdir of hvdkit train, or a .keras file")
    add("--prompt", default="\n", help="beginning of the text [a newline]")
    add("--length", type=int, default=200, metavar="N", help="number of bytes to generate [200]")
    add(
        "--temperature",
        type=float,
        default=0.8,
        help="0: the most likely byte; 1: the model's own probabilities [0.8]",
    )
    add("--top-k", type=int, metavar="K", help="sample from the K most likely bytes [all]")
    add("--seed", type=int, default=0, help="seed of the random samples [0]")
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv))
