"""Compare predictions with later measurements."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdkit.errors import UsageError


def score(pairs: Sequence[Mapping[str, Any]]) -> float:
    """Return the median relative error: |predicted - measured| / measured.

    Args:
        pairs: rows with `predicted` and `measured`, in samples per second.
    """
    return statistics.median(abs(p["predicted"] - p["measured"]) / p["measured"] for p in pairs)


def read(path: str) -> list[dict[str, Any]]:
    """Read the rows of a file: `{"rows": [{"case": ..., "predicted": ..., "measured": ...}, ...]}`.

    Raises:
        UsageError: the file is missing or has another form.
    """
    try:
        rows = json.loads(Path(path).read_text())["rows"]
        return [{**row, "error": (row["predicted"] - row["measured"]) / row["measured"]} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UsageError(
            f"{path} does not hold predictions and measurements ({error}). The form is "
            f'{{"rows": [{{"case": "2 hosts, 1gbit", "predicted": 900, "measured": 1000}}]}}.'
        ) from None
