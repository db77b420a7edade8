"""Texts and labels from a CSV or TSV file."""

import csv
import io
from pathlib import Path

import numpy as np

from hvdkit.data.sources.arrays import ArraySource, hold_out
from hvdkit.errors import UsageError

_TEXT_NAMES = ("text", "sentence", "review", "content", "input")
_LABEL_NAMES = ("label", "class", "category", "target", "sentiment")


def load_table(path: Path) -> ArraySource:
    """Reads a file whose header names a text and a label column (`text,label`); labels may be names or numbers.

    Classes are numbered in the sorted order of their names. If `train.csv` has a `test.csv` beside it, that file is the
    test split. Otherwise a fifth of the rows is held out, the same rows in every run.

    Raises:
        UsageError: the file does not exist, lacks a column, or has a row without text or label (the message gives the
            line).
    """
    texts, labels = _read(path)
    companion = path.with_stem("test")
    names = sorted(set(labels), key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
    if len(names) < 2:
        raise UsageError(f"{path} has one class only ({names[0]!r}); a classifier needs two or more.")
    number = {name: i for i, name in enumerate(names)}
    train = (np.asarray(texts, object), np.asarray([number[label] for label in labels]))
    if path.stem != "train" or not companion.exists():
        return ArraySource(path.name, "text", names, hold_out(*train))
    test_texts, test_labels = _read(companion)
    unknown = sorted(set(test_labels) - set(names))
    if unknown:
        raise UsageError(f"{companion} has classes that {path.name} lacks: {', '.join(unknown)}.")
    test = (np.asarray(test_texts, object), np.asarray([number[label] for label in test_labels]))
    return ArraySource(path.name, "text", names, {"train": train, "test": test})


def _read(path: Path) -> tuple[list[str], list[str]]:
    if not path.is_file():
        raise UsageError(f"The data set {path} does not exist. Give the path of a .csv or .tsv file.")
    try:
        content = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark first
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (at byte {error.start}). Save it as UTF-8.") from None
    with io.StringIO(content, newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        columns = {name.strip().lower(): name for name in rows.fieldnames or []}
        text, label = (next((columns[n] for n in names if n in columns), None) for names in (_TEXT_NAMES, _LABEL_NAMES))
        if text is None or label is None:
            raise UsageError(
                f"{path} needs a header line with a text column ({', '.join(_TEXT_NAMES)}) and a label column "
                f"({', '.join(_LABEL_NAMES)}), but its first line is: {','.join(rows.fieldnames or []) or 'empty'}."
            )
        texts, labels = [], []
        for row in rows:
            if not (row[text] or "").strip() or not (row[label] or "").strip():
                raise UsageError(
                    f"{path}, line {rows.line_num}: the text or the label is empty. Fill it in, or remove the row."
                )
            texts.append(row[text])
            labels.append(row[label].strip())
    if not texts:
        raise UsageError(f"{path} has a header line but no rows.")
    return texts, labels
