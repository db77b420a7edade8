"""Predictions against what was measured later."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdkit.errors import UsageError


def score(pairs: Sequence[Mapping[str, Any]]) -> float:
    """The median of |predicted - measured| / measured.

    Args:
        pairs: with `predicted` and `measured`, samples a second.
    """
    return statistics.median(abs(p["predicted"] - p["measured"]) / p["measured"] for p in pairs)


def read(path: str) -> list[dict[str, Any]]:
    """Rows of a file: `{"rows": [{"case": ..., "predicted": ..., "measured": ...}, ...]}`.

    Raises:
        UsageError: the file is not there, or holds something else.
    """
    try:
        rows = json.loads(Path(path).read_text())["rows"]
        return [{**row, "error": (row["predicted"] - row["measured"]) / row["measured"]} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UsageError(
            f"{path} does not hold predictions and measurements ({error}). The form is "
            f'{{"rows": [{{"case": "2 hosts, 1gbit", "predicted": 900, "measured": 1000}}]}}.'
        ) from None
