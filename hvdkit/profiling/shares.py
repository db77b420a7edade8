"""Computes from the recorded times how a step divides, which rank is slow, and what to change.

The parts of a step are input, computation, waiting and gradient exchange (allreduce). All ranks end an allreduce at the
same time, except for the latency of a message. This synchronizes the clocks of several hosts: a rank's clock offset is
the median difference of its `reduced` from rank 0's, and the spread of these differences is the offset's error.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

PARTS = ("input", "compute", "waiting", "exchange")
_SLOWER = 0.05  # a rank is slow if it takes this much longer than the median of the others
_MUCH = 0.25  # share of a step from which a part is worth changing


@dataclasses.dataclass(frozen=True)
class Profile:
    """The measured parts of a step.

    Attributes:
        seconds: seconds of each part of a step, median over steps, float64 [ranks, 4], in the order of `PARTS`.
        own: seconds of a step that a rank itself needs: input and computation, float64 [ranks].
        step: seconds of a step, median.
        clock_error: error of the clock offsets between ranks, in seconds.
        times: times of the marks on rank 0's clock, float64 [ranks, steps, 4].
    """

    seconds: np.ndarray
    own: np.ndarray
    step: float
    clock_error: float
    times: np.ndarray


def analyse(times: Sequence[np.ndarray]) -> Profile:
    """Computes the parts of a step from the marks of all ranks.

    Args:
        times: for each rank, seconds, float64 [steps, 4] in the order of `hvdkit.profiling.marks.NAMES`.

    Raises:
        ValueError: all ranks have fewer than three recorded steps in common.
    """
    steps = min(len(t) for t in times)
    if steps < 3:
        raise ValueError(f"{steps} steps are too few for a profile: three at least are needed.")
    noted = np.stack([t[:steps] for t in times])
    noted[:, :, 1:3] = np.where(noted[:, :, 1:3] > 0, noted[:, :, 1:3], noted[:, :, 3:])
    offsets = noted[:, :, 2] - noted[0, :, 2]
    noted = noted - np.median(offsets, axis=1)[:, np.newaxis, np.newaxis]
    error = float(np.max(np.subtract(*np.quantile(offsets, [0.75, 0.25], axis=1)) / 2))
    batch, ready, reduced, end = np.moveaxis(noted, 2, 0)
    last = ready.max(axis=0)
    waiting = np.clip(last - ready, 0, reduced - ready)
    parts = [
        batch[:, 1:] - end[:, :-1],
        (ready - batch + end - reduced)[:, 1:],
        waiting[:, 1:],
        (reduced - ready - waiting)[:, 1:],
    ]
    seconds = np.stack([np.median(np.maximum(part, 0), axis=1) for part in parts], axis=1)
    own = np.median(parts[0] + parts[1], axis=1)
    return Profile(seconds, own, float(np.median(np.diff(end, axis=1))), error, noted)


def verdict(profile: Profile, names: Sequence[str]) -> str:
    """Says in a sentence which rank is slow, and why.

    Args:
        profile: the measurement.
        names: names of the ranks, such as `rank 3 on h2`.
    """
    if len(names) == 1:
        return "There is one rank, and nobody to wait for."
    slowest = int(np.argmax(profile.own))
    others = float(np.median(np.delete(profile.own, slowest)))
    slower = profile.own[slowest] / others - 1 if others > 0 else 0.0
    if slower < _SLOWER:
        return f"No rank is slower than the others by {_SLOWER:.0%} or more."
    more = profile.seconds[slowest, :2] - np.median(np.delete(profile.seconds[:, :2], slowest, axis=0), axis=0)
    return f"{names[slowest]} is {slower:.0%} slower than the others: {PARTS[int(np.argmax(more))]} bound."


def advice(profile: Profile) -> list[str]:
    """What to change, each with the share of the step that is the reason."""
    share = dict(zip(PARTS, profile.seconds.mean(axis=0) / max(profile.step, 1e-12), strict=True))
    fixes = {
        "exchange": "send less (--compression=bf16, int8, topk, powersgd), or less often (--local-steps, a larger "
        "--local-batch); `python -m hvdkit.plan` says what each would bring",
        "waiting": "find what holds the slow rank up (the verdict above): other work on its host, a slower device, a "
        "share of data that takes longer",
        "input": "keep examples in memory (--cache-gb), decode less, or raise --steps-per-execution",
    }
    found = [f"{name} takes {share[name]:.0%} of a step: {fix}." for name, fix in fixes.items() if share[name] >= _MUCH]
    return found or [f"Computation takes {share['compute']:.0%} of a step: there is little to win besides it."]


def page(profile: Profile, names: Sequence[str]) -> str:
    """The summary, in Markdown."""
    lines = [
        f"# Where the time of {profile.times.shape[1]} steps went",
        "",
        f"A step takes {profile.step * 1e3:.2f} ms (median).",
        "",
        "| rank | " + " | ".join(f"{part}, ms" for part in PARTS) + " | " + " | ".join(PARTS) + " |",
        "|---" * (2 * len(PARTS) + 1) + "|",
    ]
    for name, row in zip(names, profile.seconds, strict=True):
        shares = row / max(profile.step, 1e-12)
        cells = [name, *(f"{value * 1e3:.2f}" for value in row), *(f"{value:.0%}" for value in shares)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", verdict(profile, names), "", *(f"- {line}" for line in advice(profile)), ""]
    return "\n".join([*lines, _LEGEND.format(error=profile.clock_error * 1e3)])


_LEGEND = """
*input*: from the end of a step to the next batch, with what Python does between executions. *compute*: forward,
backward and update. *waiting*: from this rank's gradients to the last rank's. *exchange*: the rest, until all have the
sum. Clocks of the ranks are known to each other within {error:.2f} ms. Medians of parts need not add up to the median
step.
"""
