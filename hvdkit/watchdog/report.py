"""The texts that the watchdog shows: the report of a stall, and the sentence about a failure."""

from collections.abc import Sequence

from hvdkit.watchdog import stall_causes
from hvdkit.watchdog.states import Failure, RankState


def stall_report(
    states: Sequence[RankState], limit: float, aborts: bool, code: int, still: float = 0.0, patience: float = 0.0
) -> str:
    """The report that is shown once for the whole job. Ranks in the same state share a paragraph.

    Args:
        states: the states of all ranks, in rank order.
        limit: the stall limit in seconds.
        aborts: whether a stall ends the job.
        code: exit code of all ranks in that case.
        still: seconds without progress; the limit if not given.
        patience: seconds after which the job ends, if that is later because a rank may be busy.
    """
    still = still or limit
    end = f"all ranks exit with code {code}" if aborts else "the job keeps waiting (HVDKIT_STALL_ACTION=warn)"
    if aborts and patience > still:
        end = (
            f"a rank may be busy where hvdkit cannot see its progress, so all ranks exit with code {code} only after "
            f"{patience:g} s"
        )
    lines = [
        f"hvdkit: the job has made no progress for {still:g} s; {end}.",
        f"Likely cause: {stall_causes.likely_cause(states)}",
    ]
    groups: dict[tuple[str, ...], list[RankState]] = {}
    for state in states:
        groups.setdefault(_alike(state), []).append(state)
    for group in groups.values():
        lines += _paragraph(group)
    if aborts:
        lines.append(f"HVDKIT_STALL_SECONDS sets the limit (now {limit:g}; 0 for none).")
    return "\n".join(lines)


def failure_sentence(failure: Failure) -> str:
    """`hvdkit: rank 1 on host h2 failed: ValueError: no such file. All ranks exit with code 1.`"""
    stop = "" if failure.message.endswith(".") else "."
    return f"hvdkit: {failure}{stop} All ranks exit with code {failure.code}."


def _alike(state: RankState) -> tuple[str, ...]:
    """What must be equal for ranks to share a paragraph."""
    position = (state.status, state.phase, state.place, str(state.collective), state.detail, str(state.last))
    return (*position, *state.stack, *(line for lines in state.threads.values() for line in lines))


def _paragraph(states: Sequence[RankState]) -> list[str]:
    state = states[0]
    hosts = ", ".join(dict.fromkeys(s.host for s in states))
    lines = [f"{stall_causes.ranks_of(states)} on {hosts}: {_doing(state)}"]
    lines += [f"    {line}" for line in state.stack]
    for name, stack in state.threads.items():
        lines += [f"    thread {name}:", *(f"      {line}" for line in stack)]
    return lines


def _doing(state: RankState) -> str:
    if state.status != "living":
        return f"{state.status}; when last heard of: {state.phase}, {state.place}"
    parts = [state.phase, state.place]
    if state.collective:
        parts.append(f"in the collective {state.collective!r}{f' with {state.detail}' if state.detail else ''}")
    if state.last:
        parts.append(f"last collective {state.last!r}")
    if state.busy:
        parts.append(f"here for {state.still:.0f} s")
    return ", ".join(parts)
