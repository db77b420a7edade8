"""Which transport carries what."""

import pytest
import tensorflow as tf

from hvdkit.collectives import transports
from hvdkit.collectives.transports.base import Scale, Transport
from hvdkit.collectives.transports.horovod import Horovod
from hvdkit.collectives.transports.shared_memory import SharedMemory
from hvdkit.collectives.transports.sockets import Sockets
from hvdkit.world import World

EVERYONE = type("EveryRank", (), {"process_set_id": 0, "ranks": None})()
MEMORY, HOROVOD = SharedMemory(1, 2, "token", own_core=False), Horovod()
SOCKETS = Sockets(1, [0, 1], spins=False, within=None)


@pytest.fixture
def in_use(monkeypatch):
    return lambda *given: monkeypatch.setattr(transports, "_in_use", given)


@pytest.mark.parametrize(
    ("kind", "dtype", "chosen"),
    [
        ("allreduce", "float32", MEMORY),
        ("allreduce", "bfloat16", MEMORY),
        ("allreduce", "int64", HOROVOD),
        ("allgather", "int64", MEMORY),
        ("allgather", "bool", MEMORY),
        ("allgather", "complex64", HOROVOD),
        ("transfer", "float16", MEMORY),
        ("transfer", "complex64", HOROVOD),
    ],
)
def test_the_first_that_serves_a_request_carries_it(in_use, kind, dtype, chosen):
    in_use(MEMORY, HOROVOD)
    assert transports.choose(kind, dtype, EVERYONE) is chosen
    in_use(SOCKETS, HOROVOD)
    assert transports.choose(kind, dtype, EVERYONE) is (SOCKETS if chosen is MEMORY else HOROVOD)
    in_use(HOROVOD)
    assert transports.choose(kind, tf.as_dtype(dtype), EVERYONE) is HOROVOD


def test_before_a_job_begins_and_after_its_end_there_is_horovod(in_use):
    assert [type(transport) for transport in transports.in_use()] == [Horovod]
    in_use(MEMORY, HOROVOD)
    transports.stop()
    assert [type(transport) for transport in transports.in_use()] == [Horovod]


def test_those_that_cannot_be_used_are_left_out_and_the_others_keep_their_order(in_use, monkeypatch):
    class Between(Horovod):
        name = "between"

    class Lacking(Horovod):
        @classmethod
        def start(cls, world, preferred):
            return None

    in_use(HOROVOD)
    monkeypatch.setattr(transports, "_KNOWN", (Lacking, Between, Horovod))
    monkeypatch.setattr(Horovod, "describe", lambda self: self.name)  # asks a Horovod that is not initialised
    transports.start(World.single())
    assert [transport.name for transport in transports.in_use()] == ["between", "horovod"]


def test_a_transport_says_what_it_costs_and_whether_ranks_may_leave_it(in_use):
    assert MEMORY.allreduce_bytes(1000, 4) == HOROVOD.allreduce_bytes(1000, 4) == 1500
    assert (MEMORY.scatters_by_allreduce, HOROVOD.scatters_by_allreduce) == (True, False)
    assert HOROVOD.usage() is None
    in_use(MEMORY, HOROVOD)
    transports.refuse_to_join()  # nothing went through memory yet


def test_what_receives_by_gathering_brings_no_rows():
    shape = tf.constant([8, 3, 2])
    assert MEMORY.room(shape).numpy().tolist() == [0, 3, 2]
    assert HOROVOD.room(shape).numpy().tolist() == [8, 3, 2]


def test_a_transport_must_say_what_it_can_do():
    assert Transport.__abstractmethods__ == {"start", "serves", "allreduce", "allgather", "describe"}
    assert Scale() == Scale(before=1.0, after=1.0, average=False)


def test_memory_is_described_by_where_and_how_ranks_wait():
    assert MEMORY.describe() == "shared memory (/dev/shm, 2 ranks, which sleep while they wait)"
