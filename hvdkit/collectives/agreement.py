"""Shared errors: if one rank fails, all ranks stop together with the same error."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hvdkit import collectives, world
from hvdkit.errors import ReplicasDiverged, UsageError


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends a block on all ranks with the `UsageError` of the first rank that raised one.

    The block must not contain a collective: if a rank failed before it, the other ranks would hang. All ranks must run
    the same blocks.
    """
    mistake: UsageError | None = None
    try:
        yield
    except UsageError as error:
        mistake = error
    if not world.is_initialized():  # the error is in the flags or the launch, so it is the same on all ranks
        if mistake:
            raise mistake
        return
    messages = collectives.allgather_object(None if mistake is None else str(mistake), name="together")
    first = next((m for m in messages if m is not None), None)
    if first is not None:
        raise UsageError(first) from mistake


def check_equal(names: Sequence[str], digests: Sequence[str]) -> None:
    """Compares digests over all ranks, position by position.

    Args:
        names: what each digest belongs to, for the message.
        digests: digests from `collectives.digest`.

    Raises:
        ReplicasDiverged: digests differ; the message names the ranks and the first name that differs.
    """
    everyone = collectives.allgather_object(list(digests), name="digests")
    for place, name in enumerate(names):
        strangers = [rank for rank, other in enumerate(everyone) if other[place] != everyone[0][place]]
        if strangers:
            raise ReplicasDiverged(
                f"The replicas' weights differ: {name} on rank(s) {', '.join(map(str, strangers))} is not that of rank "
                f"0 (of {world.size()} ranks), so they are several models. A layer that changes weights by itself, or "
                f"code that one rank alone runs, does this: look at what makes {name}."
            )


def check_equal_plans(plan: Mapping[str, Any]) -> None:
    """Compares, before training starts, when the ranks train and validate.

    A rank that validates alone, or trains for more epochs, would wait for the others, or add up other numbers.

    Args:
        plan: the arguments of `fit` that decide this, by name.

    Raises:
        UsageError: on all ranks, if they differ.
    """
    everyone = collectives.allgather_object(dict(plan), name="plans")
    for name, here in everyone[0].items():
        others = [rank for rank, other in enumerate(everyone) if other[name] != here]
        if others:
            raise UsageError(
                f"fit has {name}={here!r} on rank 0, and {name}={everyone[others[0]][name]!r} on rank(s) "
                f"{', '.join(map(str, others[:16]))}: all ranks must train and validate together. Give all the same, "
                f"and to each its part of the validation data, hvd.data.shard(validation), whose metrics are combined."
            )


def check_equal_steps(steps: int | None) -> None:
    """Compares the number of steps per epoch over all ranks, before training starts.

    A rank with one step more than the others would hang in its gradient allreduce.

    Args:
        steps: the number on this rank; None if unknown, such as for a generator: this rank is then not compared.

    Raises:
        UsageError: on all ranks, if the known numbers differ.
    """
    everyone = collectives.allgather_object(steps, name="steps")
    if len({number for number in everyone if number is not None}) < 2:
        return
    shown = [f"rank {rank}: {'unknown' if number is None else number}" for rank, number in enumerate(everyone[:16])]
    raise UsageError(
        f"The ranks have different numbers of steps an epoch ({', '.join(shown)}{', ...' * (len(everyone) > 16)}), and "
        f"those with more would wait for ever for the others. Divide the data with hvd.data.shard(dataset, "
        f"uneven='drop', 'pad' or 'join'), or give fit the same steps_per_epoch on all ranks."
    )
