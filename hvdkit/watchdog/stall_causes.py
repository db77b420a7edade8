"""The likely cause of a stall: rules over the ranks' states, the most certain first. No I/O, no clock."""

import itertools
from collections.abc import Sequence
from typing import Any

from hvdkit.watchdog.states import RankState

States = Sequence[RankState]


def likely_cause(states: States) -> str:
    """Returns one or two sentences: why these ranks stall, and what to check.

    Args:
        states: the states of all ranks at the same time, in rank order.
    """
    rules = (
        _a_rank_is_dead,
        _a_rank_is_frozen,
        _a_rank_has_left,
        mismatch,
        _other_order,
        _uneven_data,
        _not_all_enter,
        _slow_input,
        _not_there_yet,
    )
    found = next(filter(None, (rule(states) for rule in rules)), None)
    return found or (
        "not clear: no rank is missing, and all are at the same place. Each is in TensorFlow's compiled step, where "
        "Python cannot see whether it computes, reads data or communicates. Possible causes: a slow data set "
        "(tf.data), a network that drops packets, or a layer whose collectives have other names on each rank."
    )


def mismatch(states: States) -> str | None:
    """Says which ranks enter the same collective with tensors of different shape or dtype; None if none do."""
    return _mismatch_of_details(states) or mismatch_of_signatures(states)


def mismatch_of_signatures(states: States) -> str | None:
    """Compares the traced signatures: the n-th signature of a name must be the same on all ranks."""
    for name in dict.fromkeys(name for s in states for name in s.traced):
        for number in range(max(len(s.traced.get(name, [])) for s in states)):
            there = [s for s in states if len(s.traced.get(name, [])) > number]
            for other in there[1:]:
                difference = _difference(there[0], other, name, number)
                if difference:
                    return difference
    return None


def ranks_of(states: States) -> str:
    """`rank 0`, `ranks 0, 2 and 3`, `ranks 0, 1, 2, 3, 4, 5 and 250 more`."""
    numbers = [str(s.rank) for s in states]
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > 8:
        return f"ranks {', '.join(numbers[:6])} and {len(numbers) - 6} more"
    return f"ranks {', '.join(numbers[:-1])} and {numbers[-1]}"


def crossed(states: States) -> str | None:
    """Says which ranks are deadlocked, each in a collective that the other has not entered; None if there are none.

    Horovod matches collectives by name, so a rank stays in one until all ranks have called it as often. The result
    holds although the states may be from different moments: two ranks that miss each other's call stay deadlocked. A
    rank that has made the call already is only ahead, for example after a broadcast to a slower rank.
    """
    for one, other in itertools.combinations(states, 2):
        if one.inside and other.inside and _ahead(one, other) and _ahead(other, one):
            return (
                f"the ranks are in different collectives, and would wait for each other forever: {ranks_of([one])} "
                f"is in {one.inside!r}{_at(one)}, {ranks_of([other])} in {other.inside!r}{_at(other)}. Every rank "
                f"must call the same ones, in the same order, and none may be inside `if rank == 0`."
            )
    return None


def _ahead(one: RankState, other: RankState) -> bool:
    """Whether a rank is in a collective that another rank has called fewer times."""
    name = one.inside or ""
    return one.calls.get(name, 0) > other.calls.get(name, 0)


def _a_rank_is_dead(states: States) -> str | None:
    dead = [s for s in states if s.status == "dead"]
    if dead:
        return (
            f"{_with_hosts(dead)} died: the connection broke without a goodbye. Look at that rank's own output, and "
            f"at its host's memory (dmesg) if it was killed."
        )
    return None


def _a_rank_is_frozen(states: States) -> str | None:
    frozen = [s for s in states if s.status == "frozen"]
    if frozen:
        return (
            f"{_with_hosts(frozen)} does not answer: its process is stopped (SIGSTOP, a debugger), its host hangs or "
            f"cannot be reached, or its code holds Python's interpreter lock."
        )
    return None


def _a_rank_has_left(states: States) -> str | None:
    left = [s for s in states if s.status == "left"]
    waiting = [s for s in states if s.status == "living" and s.busy]
    if not left or not waiting:
        return None
    where = f"the collective {waiting[0].collective!r}" if waiting[0].collective else waiting[0].place
    return (
        f"{_with_hosts(left)} has ended its program (after {left[0].place}), but {ranks_of(waiting)} still "
        f"{_needs(waiting)} it in {where}{_at(waiting[0])}. All ranks must take as many steps and enter the same "
        f"collectives: is the data uneven (hvdkit.data.shard makes it even), or does only one rank run that code?"
    )


def _mismatch_of_details(states: States) -> str | None:
    met: dict[str, list[tuple[RankState, str]]] = {}
    for state in states:
        name, detail = (state.collective, state.detail) if state.collective else (state.last, state.last_detail)
        if name and detail:
            met.setdefault(name, []).append((state, detail))
    for name, entries in met.items():
        (first, detail), *rest = entries
        differing = next(((s, d) for s, d in rest if d != detail), None)
        if differing:
            return (
                f"the ranks have different tensors in the collective {name!r}: {ranks_of([first])} has {detail}, and "
                f"{ranks_of([differing[0]])} has {differing[1]}."
            )
    return None


def _difference(first: RankState, other: RankState, name: str, number: int) -> str | None:
    one, two = first.traced[name][number], other.traced[name][number]
    for (shape, dtype, path), (other_shape, other_dtype, other_path) in zip(one, two, strict=False):
        if dtype != other_dtype and None in (dtype, other_dtype):
            has, lacks = (other, first) if dtype is None else (first, other)
            return (
                f"the ranks' gradients differ: in the collective {name!r} {path if lacks is other else other_path} has "
                f"a gradient on {ranks_of([has])} and none on {ranks_of([lacks])}, where the loss does not depend on "
                f"it. In a graph all ranks need the same gradients: add 0 * keras.ops.sum(variable) to the loss there, "
                f"or use run_eagerly=True, where a missing gradient counts as zero."
            )
        if dtype != other_dtype or not _fits(shape, other_shape):
            also = "" if path == other_path else f" ({other_path} there)"
            return (
                f"the ranks' models differ: in the collective {name!r} {path} is {_tensor(shape, dtype)} on "
                f"{ranks_of([first])} and {_tensor(other_shape, other_dtype)} on {ranks_of([other])}{also}. Build the "
                f"same model on every rank."
            )
    if len(one) != len(two):
        longer, states = (one, (first, other)) if len(one) > len(two) else (two, (other, first))
        extra = longer[min(len(one), len(two))][2]
        return (
            f"the ranks' models differ: the collective {name!r} has {len(one)} tensors on {ranks_of([first])} and "
            f"{len(two)} on {ranks_of([other])}; {extra} is on {ranks_of([states[0]])} only. Build the same model, "
            f"with the same trainable layers, on every rank."
        )
    return None


def _fits(shape: Any, other: Any) -> bool:
    """Whether two shapes are compatible. None, for a dimension or a whole shape, matches anything."""
    if shape is None or other is None:
        return True
    return len(shape) == len(other) and all(n == m or None in (n, m) for n, m in zip(shape, other, strict=True))


def _other_order(states: States) -> str | None:
    waiting = [s for s in states if s.collective]
    other = next((s for s in waiting if s.collective != waiting[0].collective), None)
    if other is None:
        return None
    return (
        f"the ranks call collectives in different order: {ranks_of(_in(waiting, waiting[0].collective))} is in "
        f"{waiting[0].collective!r}{_at(waiting[0])}, {ranks_of(_in(waiting, other.collective))} in "
        f"{other.collective!r}{_at(other)}. Every rank must call the same ones, in the same order."
    )


def _uneven_data(states: States) -> str | None:
    """One rank is in a step of an epoch that another rank, out of data, has finished."""
    stepping = [s for s in states if s.in_step and s.phase != "evaluating" and s.step is not None]
    done = [s for s in states if s.phase in ("between", "evaluating") and s.step is not None]
    pairs = [(m, e) for m in stepping for e in done if m.epoch == e.epoch and _step(m) > _step(e)]
    if not pairs:
        return None
    most, least = pairs[0]
    where = f"is in the collective {least.collective!r}" if least.collective else "has left the training loop"
    return (
        f"uneven data: {ranks_of([least])} is done after {least.place} and {where}{_at(least)}, while "
        f"{ranks_of([most])} is in {most.place}. Give every rank as many batches: hvdkit.data.shard does, before "
        f"batch(), or pass steps_per_epoch."
    )


def _not_all_enter(states: States) -> str | None:
    """Some ranks are in a collective; the others wait elsewhere, or are past it."""
    inside = [s for s in states if s.collective]
    elsewhere = [s for s in states if s.in_step]
    if not inside or not elsewhere:
        return None
    return (
        f"code that not all ranks run: only {ranks_of(inside)} entered the collective {inside[0].collective!r}"
        f"{_at(inside[0])}, while {ranks_of(elsewhere)} is in {elsewhere[0].place} ({elsewhere[0].phase})"
        f"{_at(elsewhere[0])}. A collective must not be inside `if rank == 0`."
    )


def _slow_input(states: States) -> str | None:
    readers = [s for s in states if s.reading]
    if not readers or len(readers) == len(states):
        return None
    line = f", in {readers[0].reading}" if readers[0].reading else ""
    return (
        f"slow input: {ranks_of(readers)} is reading its data{line}, while the others wait. Read from a faster place, "
        f"or raise HVDKIT_STALL_SECONDS if it must take so long."
    )


def _not_there_yet(states: States) -> str | None:
    inside = [s for s in states if s.busy]
    missing = [s for s in states if not s.busy]
    if not inside or not missing:
        return None
    where = f"the collective {inside[0].collective!r}{_at(inside[0])}" if inside[0].collective else inside[0].place
    return (
        f"{ranks_of(missing)} has not come to {where}, where {ranks_of(inside)} {_wait(inside)}: it is still busy"
        f"{_at(missing[0])}. If only {ranks_of(inside)} is meant to run that code, it must not call a collective; if "
        f"the others' work takes so long, raise HVDKIT_STALL_SECONDS."
    )


def _with_hosts(states: States) -> str:
    hosts = ", ".join(dict.fromkeys(s.host for s in states))
    return f"{ranks_of(states)} on host {hosts}"


def _in(states: States, collective: str | None) -> list[RankState]:
    return [s for s in states if s.collective == collective]


def _at(state: RankState) -> str:
    return f", at {state.line}" if state.line else ""


def _needs(states: States) -> str:
    return "needs" if len(states) == 1 else "need"


def _wait(states: States) -> str:
    return "waits" if len(states) == 1 else "wait"


def _step(state: RankState) -> int:
    return -1 if state.step is None else state.step


def _tensor(shape: Any, dtype: str) -> str:
    return f"{dtype}[{', '.join('any' if n is None else str(n) for n in shape) if shape is not None else '?'}]"
