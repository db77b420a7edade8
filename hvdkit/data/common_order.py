"""Warns of data whose order differs between ranks before they are divided: some examples go to several, others to none.

`tf.data.Dataset.list_files` shuffles by default.
"""

import logging
from typing import Any

from hvdkit import world
from hvdkit.compat import data_contents

_log = logging.getLogger(__name__)


def warn_if_differs(dataset: Any) -> None:
    """Warns, on rank 0, of a `tf.data.Dataset` that is about to be divided, and shuffled without a seed."""
    if data_contents.UNSEEDED in data_contents.seeds_of(dataset) and world.rank() == 0:
        warn()


def warn() -> None:
    """Warns of a `tf.data.Dataset` that was divided in another order on each rank."""
    _log.warning(
        "The data are shuffled in another order on each rank before they are divided over the ranks, so some examples "
        "go to several ranks, and others to none. Give the shuffle the same seed on all ranks (shuffle(n, seed=0), "
        "list_files(..., seed=0)), or shuffle after dividing."
    )
