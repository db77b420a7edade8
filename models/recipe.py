"""A recipe: a model's defaults, and what they were seen to reach."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained on a data set unless a flag says otherwise.

    Attributes:
        dataset: the data set's name.
        global_batch: examples a step, over all replicas.
        optimizer: a Keras optimizer by name, with arguments: `adam`, `sgd:momentum=0.9`.
        learning_rate: for that global batch.
        epochs: passes over the training split.
        lr_schedule: `constant`, or `cosine` (to zero over the run).
        warmup_epochs: over which the rate is raised from 1/replicas of it.
        max_tokens: for texts, the size of the vocabulary.
        sequence_length: for texts, tokens a text; for models of the next token, tokens of a window.
        accuracy: the test accuracy that it reaches with two ranks, as CI checks; None where nothing is claimed.
        bits_per_byte: likewise for models of the next byte: the test loss in bits that it stays below.
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
    bits_per_byte: float | None = None
