"""The contract that every transport keeps: one list of cases, run over each.

A new transport is added to `TRANSPORTS`, with the environment that makes a job on this machine use it.
"""

import hashlib

import numpy as np
import pytest

TRANSPORTS = {
    "shared memory": {},
    "sockets": {"HVDKIT_SHARED_MEMORY": "0"},
    "horovod": {"HVDKIT_SHARED_MEMORY": "0", "HVDKIT_SOCKETS": "0"},
}
BOUNDS = {"float16": 4e-3, "bfloat16": 4e-2, "float32": 1e-6, "float64": 1e-12, "int32": 0, "int64": 0}
SHAPES = [[3], [], [0], [700, 512], [131072], [5, 7]]  # about three chunks of shared memory in float32; one ends in one
LENGTHS = {"ragged": [2, 0, 5], "none": [0, 0, 0], "more than a chunk": [70_000, 1, 100_000]}


@pytest.fixture(params=["shared memory", "sockets", pytest.param("horovod", marks=pytest.mark.slow)])
def on_three_ranks(request, ranks):
    """Calls a function on three ranks that use the transport, with its name."""
    return lambda function: ranks(3, function, transport=request.param, env=TRANSPORTS[request.param])


def _start(transport):
    """This rank, and the sets of ranks over which each case runs."""
    import hvdkit as hvd
    from hvdkit.collectives import transports

    pair = hvd.ProcessSet([0, 2])
    me = hvd.init(process_sets=[pair])
    assert transports.choose("allreduce", "float32", pair).name == transport
    sets = {"everyone": (hvd.global_process_set, [0, 1, 2]), "pair": (pair, [0, 2])}
    return me, {name: found for name, found in sets.items() if me.rank in found[1]}


def _end():
    """Waits for all ranks: Horovod drops the sets of ranks when one of them ends."""
    from hvdkit import collectives

    collectives.barrier(name="end")


def summed(transport):
    """What was wrong, and the bits of all sums."""
    import tensorflow as tf

    from hvdkit.collectives import wire
    from hvdkit.collectives.transports import Scale

    me, sets = _start(transport)
    generator = np.random.default_rng(4)
    given = [[generator.normal(size=shape) * 9 for shape in SHAPES] for _ in range(3)]
    scales = {"sum": Scale(), "average": Scale(average=True), "scaled": Scale(1 / 3, 3.1, average=True)}
    wrong, bits = [], {}
    for dtype, bound in BOUNDS.items():
        parts = [[tf.cast(part, dtype) for part in rank] for rank in given]
        for (place, (ranks, members)), (how, scale) in _product(sets, scales):
            if dtype.startswith("int") and how != "sum":
                continue
            name = f"{dtype}.{place}.{how}"
            traced = tf.function(
                lambda x, n=name, r=ranks, s=scale: wire.allreduce(x, f"{n}.graph", r, s), autograph=False
            )
            traced(parts[me.rank])
            graph, eager = traced(parts[me.rank]), wire.allreduce(parts[me.rank], name, ranks, scale)
            factor = scale.before * scale.after / (len(members) if scale.average else 1)
            for place_in, tensors in enumerate(zip(graph, eager, strict=True)):
                exact = factor * sum(np.asarray(tf.cast(parts[r][place_in], "float64")) for r in members)
                wrong += [
                    (name, SHAPES[place_in], tensor.dtype.name)
                    for tensor in tensors
                    if tensor.dtype != dtype
                    or not np.allclose(tf.cast(tensor, "float64"), exact, rtol=bound, atol=30 * bound)
                ]
            bits[name] = _digest([*graph, *eager])
    _end()
    return wrong, bits


def _digest(tensors):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def _product(sets, others):
    return [(one, other) for one in sets.items() for other in others.items()]


def test_sums_are_right_for_every_dtype_scale_and_set_of_ranks_and_alike_on_all(on_three_ranks):
    found = on_three_ranks(summed)
    assert [wrong for wrong, _ in found] == [[], [], []]
    assert len(found[0][1]) == 2 * (4 * 3 + 2)
    assert found[0][1] == found[2][1]
    assert {name: found[0][1][name] for name in found[1][1]} == found[1][1]


def started(transport):
    """What was wrong with sums that one graph starts and another one ends, and the bits of all sums."""
    import tensorflow as tf

    from hvdkit.collectives import wire
    from hvdkit.collectives.transports import Scale

    me, sets = _start(transport)
    generator = np.random.default_rng(4)
    given = [[generator.normal(size=shape) * 9 for shape in SHAPES] for _ in range(3)]
    scale, wrong, bits = Scale(0.25, 3.0, average=True), [], {}
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        parts = [[tf.cast(part, dtype) for part in rank] for rank in given]
        for place, (ranks, _) in sets.items():
            name, right = f"{dtype}.{place}", wire.allreduce(parts[me.rank], f"{dtype}.{place}", ranks, scale)

            def start(x, n=name, r=ranks):
                wire.allreduce_start(x, f"{n}.start", r, scale, slot=f"{n}.slot")

            def done(x, is_started, n=name, r=ranks):
                return wire.allreduce_done(x, f"{n}.done", r, scale, f"{n}.slot", is_started)

            mine = parts[me.rank]
            for how, (begin, end) in {"graph": (tf.function(start), tf.function(done)), "eager": (start, done)}.items():
                begin([t + 1 for t in mine])  # dropped
                begin(mine)
                after_start = end(mine, tf.constant(True))
                without_start = end(mine, tf.constant(False))
                for got in (after_start, without_start):
                    if [t.numpy().tobytes() for t in got] != [t.numpy().tobytes() for t in right]:
                        wrong.append((name, how, got[0].numpy(), right[0].numpy()))
            bits[name] = _digest(right)
    _end()
    return wrong, bits


def test_a_sum_that_one_graph_starts_and_another_ends_has_the_same_bits(on_three_ranks):
    found = on_three_ranks(started)
    assert [wrong for wrong, _ in found] == [[], [], []]
    assert found[0][1] == found[2][1]


def gathered(transport):
    import tensorflow as tf

    from hvdkit.collectives import wire

    me, sets = _start(transport)

    def rows(rank, dtype, lengths):
        return tf.cast(np.arange(lengths[rank] * 3).reshape(-1, 3) % 99 + rank, dtype)

    wrong = []
    for dtype in ("float16", "bfloat16", "float32", "float64", "bool", "int8", "uint16", "uint32", "int64"):
        for (place, (ranks, members)), (how, lengths) in _product(sets, LENGTHS):
            name, mine = f"{dtype}.{place}.{how}", rows(me.rank, dtype, lengths)
            whole = tf.concat([rows(rank, dtype, lengths) for rank in members], axis=0)
            traced = tf.function(lambda x, n=name, r=ranks: wire.allgather(x, f"{n}.graph", r), autograph=False)
            for got in (wire.allgather(mine, name, ranks), traced(mine)):
                if got.dtype != dtype or not np.array_equal(got, whole):
                    wrong.append((name, got.shape))
    _end()
    return wrong


def test_rows_are_gathered_whatever_their_number_and_dtype(on_three_ranks):
    assert on_three_ranks(gathered) == [[], [], []]


def mismatched(transport, kind):
    """What this rank is told when the other one passes tensors of other shapes."""
    import tensorflow as tf

    import hvdkit as hvd
    from hvdkit.collectives import transports, wire
    from hvdkit.collectives.transports import Scale

    first, everyone = hvd.init().rank == 0, hvd.global_process_set
    assert transports.choose("allreduce", "float32", everyone).name == transport
    try:
        if kind == "rows":
            wire.allgather(tf.zeros([2, 7 if first else 9]), kind, everyone)
        elif kind == "shapes":  # as many elements
            wire.allreduce([tf.zeros([2 if first else 4]), tf.zeros([4 if first else 2])], kind, everyone, Scale())
        elif kind == "nothing":
            wire.allreduce([tf.zeros([0 if first else 4])], kind, everyone, Scale())
        else:
            wire.allreduce([tf.zeros([4])] * (1 if first else 2), kind, everyone, Scale())
    except tf.errors.OpError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("kind", ["sizes", "shapes", "rows", "nothing"])
@pytest.mark.parametrize("transport", ["shared memory", "sockets"])
def test_tensors_of_other_shapes_are_told_and_never_mixed_up(ranks, transport, kind):
    told = ranks(2, mismatched, transport=transport, kind=kind, env=TRANSPORTS[transport], timeout=60)
    assert "no error" not in told
    if transport == "shared memory":  # all ranks compare the layouts of all
        expected = {
            "sizes": "number 1 of the ranks passed 8 elements where this rank passed 4",
            "shapes": "number 1 of the ranks passed other shapes than this rank",
            "rows": "number 1 of the ranks passed 9 elements where this rank passed 7",
            "nothing": "number 1 of the ranks passed 4 elements where this rank passed 0",
        }
        assert f"Mismatched shapes: {expected[kind]}" in told[0]
        assert "Mismatched shapes: number 0 of the ranks" in told[1]
        return
    expected = {  # the rank that sees it first closes the connection
        "sizes": ("rank 1 sent 32 bytes where this rank expected 16", "rank 0 sent 16 bytes"),
        "shapes": ("Mismatched shapes: rank 1 passed other shapes", "Mismatched shapes: rank 0 passed other shapes"),
        "rows": ("Mismatched shapes: rank 1 passed other shapes", "Mismatched shapes: rank 0 passed other shapes"),
        "nothing": ("rank 1 sent 16 bytes where this rank expected 0", "rank 0 sent 0 bytes"),
    }
    assert any(text in said for text, said in zip(expected[kind], told, strict=True)), told


def transferred(transport):
    """Rank 2 sends to rank 0, and back, in one graph; and what arrived."""
    import tensorflow as tf

    from hvdkit.collectives import wire

    me, sets = _start(transport)
    pair, found = sets.get("pair", [None])[0], {}
    for dtype in ("float32", "bfloat16", "int32") if pair else ():
        mine = tf.cast(tf.reshape(tf.range(6), [3, 2]) + me.rank, dtype)
        shape = tf.constant([3, 2])

        @tf.function
        def step(x, dtype=dtype, shape=shape):
            if me.rank == 2:
                return wire.send(x, f"{dtype}.there", pair), wire.receive(shape, dtype, f"{dtype}.back", pair, 0)
            there = wire.receive(shape, dtype, f"{dtype}.there", pair, 2)
            return wire.send(x + there, f"{dtype}.back", pair), there

        found[dtype] = tf.cast(step(mine)[1], "float64").numpy().tolist()
    _end()
    return found


def test_a_tensor_goes_to_one_rank_and_comes_back(on_three_ranks):
    there = [[2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    back = [[2.0, 4.0], [6.0, 8.0], [10.0, 12.0]]
    found = on_three_ranks(transferred)
    assert found == [dict.fromkeys(("float32", "bfloat16", "int32"), there), {}, dict.fromkeys(found[2], back)]


def wakes():
    """How often the busiest of this process's threads woke up in a second without a collective."""
    import re
    import time
    from pathlib import Path

    import hvdkit as hvd

    def counts():
        texts = {task.name: (task / "status").read_text() for task in Path("/proc/self/task").iterdir()}
        return {name: int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", texts[name], re.M)[1]) for name in texts}

    hvd.init()
    hvd.barrier()
    time.sleep(0.5)
    before = counts()
    time.sleep(1)
    found = max(count - before.get(name, 0) for name, count in counts().items())
    hvd.barrier()
    return found


def test_horovods_threads_rest_where_another_transport_carries_gradients(ranks):
    assert max(ranks(2, wakes)) < 200, "20 cycles; Horovod's own are 1,000"
