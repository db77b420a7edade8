"""A recipe: a model's default settings, and the accuracy that they reach."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Default settings to train a model on a data set; flags override them.

    Attributes:
        dataset: the data set's name.
        global_batch: examples per step, over all replicas.
        optimizer: a Keras optimizer by name, with arguments: `adam`, `sgd:momentum=0.9`.
        learning_rate: the learning rate for this global batch.
        epochs: passes over the training split.
        lr_schedule: `constant`, or `cosine` (to zero over the run).
        warmup_epochs: epochs in which the rate rises from 1/replicas of its value.
        max_tokens: for texts, the size of the vocabulary.
        sequence_length: for texts, tokens per text; for models that predict the next token, tokens per window.
        accuracy: the test accuracy that two ranks reach, which CI checks; None if there is no claim.
        metrics: the least values of other metrics of the test split that two ranks reach, which CI checks.
        bits_per_byte: for models that predict the next byte, the upper limit of the test loss in bits, which CI checks.
    """

    dataset: str = "digits"
    global_batch: int = 128
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    epochs: int = 5
    lr_schedule: str = "constant"
    warmup_epochs: float = 0
    max_tokens: int = 20_000
    sequence_length: int = 64
    accuracy: float | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bits_per_byte: float | None = None
