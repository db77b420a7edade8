"""Text from a model that a run has trained to predict the next byte.

    python -m hvdkit.generate RUN_FOLDER --prompt "The with statement" --length 200 --temperature 0.8 --top_k 40

RUN_FOLDER is the `--workdir` of `hvdkit.train`, or a `.keras` file. One process; the model is opened by plain Keras.
The same seed gives the same text on the same machine.

Exit code: 0 done, 2 something is wrong that one sentence tells how to mend.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as in training

import keras
import numpy as np
import tensorflow as tf

from hvdkit import outcome
from hvdkit.data.sources.tokens import VOCABULARY_SIZE
from hvdkit.errors import UsageError


def main(argv: list[str]) -> int:
    """Prints the prompt and what the model goes on with, as it comes; returns the exit code."""
    try:
        arguments = _parse(argv[1:])
        model = open_model(Path(arguments.run).expanduser())
        prompt = arguments.prompt.encode("utf-8", "surrogateescape")  # bytes that the shell gave stay as they are
        tokens = generate(
            model, prompt, arguments.length,
            temperature=arguments.temperature, top_k=arguments.top_k, seed=arguments.seed,
        )  # fmt: skip
        _show(prompt)
        for token in tokens:
            _show(bytes([token]))
    except UsageError as error:
        print(f"hvdkit.generate: {error}", file=sys.stderr)
        return outcome.USAGE
    _show(b"\n")
    return 0


def open_model(run: Path) -> keras.Model:
    """Opens the model of a run.

    Args:
        run: the run's folder, or a `.keras` file.

    Raises:
        UsageError: there is none, it cannot be opened, or it does not predict bytes.
    """
    file = run if run.suffix == ".keras" else run / "model.keras"
    if not file.is_file():
        unfinished = " (the run is not finished: the same command goes on with it)" if run.is_dir() else ""
        raise UsageError(f"{file} is not there{unfinished}. Give the folder that hvdkit.train has written (--workdir).")
    try:
        model = keras.saving.load_model(file, compile=False)
    except Exception as error:  # whatever a file that is no model, or a user's own layers, make Keras raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{file} cannot be opened ({reason}). Train it anew, or give another.") from error
    window, output = model.input_shape, model.output_shape
    if not (isinstance(window, tuple) and len(window) == 2 and output == (None, window[1], VOCABULARY_SIZE)):
        raise UsageError(
            f"{file} is a model from {window} to {output}, and text needs one from (None, length) to (None, length, "
            f"{VOCABULARY_SIZE}), which predicts the next byte. Give the folder of a run with --model=gpt."
        )
    return model


def generate(
    model: keras.Model,
    prompt: bytes,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Draws one token after another, each from what the model expects after those before it.

    The model looks back as far as its window is long: of a longer text, at its end alone.

    Args:
        model: from tokens (int [batch, window]) to logits [batch, window, vocabulary], where no place sees a later one.
        prompt: what comes before; one token at least.
        length: tokens to draw.
        temperature: the logits are divided by it; 0 takes the likeliest token each time.
        top_k: draw from so many of the likeliest tokens; all by default.
        seed: makes the draws the same again.

    Returns:
        The tokens, as they are drawn.

    Raises:
        UsageError: an argument is out of its range.
    """
    if not prompt:
        raise UsageError("The prompt is empty, and a model goes on from something. Give a word, or a line's end.")
    if length < 0 or temperature < 0 or (top_k is not None and top_k < 1) or seed < 0:
        raise UsageError(
            f"length={length}, temperature={temperature}, top_k={top_k}, seed={seed}: expected are a top_k of 1 or "
            f"more, and otherwise 0 or more. Correct the one that is not."
        )
    return _draw(model, list(prompt), length, temperature, top_k, np.random.default_rng(seed))


def _draw(
    model: keras.Model,
    tokens: list[int],
    length: int,
    temperature: float,
    top_k: int | None,
    generator: np.random.Generator,
) -> Iterator[int]:
    window = model.input_shape[1]

    @tf.function(jit_compile=False)
    def logits_at(places: tf.Tensor, last: tf.Tensor) -> tf.Tensor:
        return model(places[None], training=False)[0, last]

    for _ in range(length):
        seen = tokens[-window:]
        padded = seen + [0] * (window - len(seen))  # places behind the last one do not count: the model is causal
        logits = logits_at(tf.constant(padded, tf.int32), tf.constant(len(seen) - 1)).numpy().astype(np.float64)
        token = _choose(logits, temperature, top_k, generator)
        tokens.append(token)
        yield token


def _choose(logits: np.ndarray, temperature: float, top_k: int | None, generator: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    likeliest = np.argsort(-logits, kind="stable")[:top_k]
    scaled = (logits[likeliest] - logits.max()) / temperature
    chances = np.exp(scaled) / np.exp(scaled).sum()
    return int(generator.choice(likeliest, p=chances))


def _show(text: bytes) -> None:
    """Writes bytes as they are: a character of several is whole once the last of them has come."""
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hvdkit.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Any = parser.add_argument
    add("run", metavar="RUN_FOLDER", help="what hvdkit.train has written, or a .keras file")
    add("--prompt", default="\n", help="what the text begins with [a line's end]")
    add("--length", type=int, default=200, metavar="N", help="bytes to write [200]")
    add(
        "--temperature",
        type=float,
        default=0.8,
        help="0: the likeliest byte; 1: as the model expects [0.8]",
    )
    add("--top_k", type=int, metavar="K", help="draw from the K likeliest bytes [all]")
    add("--seed", type=int, default=0, help="another one gives another text [0]")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
