"""What a model is to learn from a data set, and from which of its columns: for when a guess would be wrong."""

import dataclasses

CLASSIFICATION = "classification"
REGRESSION = "regression"
MULTILABEL = "multilabel"
AS_COMPILED = "compiled"  # whatever the loss that the model is compiled with takes


@dataclasses.dataclass(frozen=True)
class Schema:
    """What the user says about a data set. Sources decide what is left open, from the data.

    Attributes:
        task: `classification`: one of several classes; `regression`: measured values; `multilabel`: any number of
            labels; `auto`: what the labels look like, but never `regression`.
        label_column: name of the column of labels.
        text_column: name of the column of texts.
        feature_columns: names of the columns of numbers and categories; empty for all but the label.
        encoding: Python's name of a text file's encoding.
    """

    task: str = "auto"
    label_column: str | None = None
    text_column: str | None = None
    feature_columns: tuple[str, ...] = ()
    encoding: str | None = None

    def names_columns(self) -> bool:
        """Returns whether it names a column."""
        return bool(self.label_column or self.text_column or self.feature_columns)
