"""Hugging Face's `datasets`."""

from typing import Any, NoReturn

import numpy as np

from hvdkit.data.rounds import steps_of
from hvdkit.errors import UsageError


def divide(dataset: Any, rank: int, size: int, uneven: str) -> Any:
    """Returns the examples `rank`, `rank + size`, ... as a `datasets.Dataset`, in its format."""
    examples = len(dataset)
    return dataset.select((rank + size * np.arange(steps_of(examples, size, uneven, "examples"))) % examples)


def refuse(dataset: Any, *_: Any) -> NoReturn:
    """Says what to write for what has several data sets, or no length.

    Raises:
        UsageError: always.
    """
    name = type(dataset).__name__
    if name.endswith("Dict"):
        raise UsageError(f"A {name} holds several data sets. Divide one: hvd.data.shard(dataset['train']).")
    raise UsageError(
        f"A {name} has neither a length nor elements by index. Divide what it yields: "
        f"hvd.data.shard(iter(dataset.batch(32))), or load it with streaming=False."
    )
