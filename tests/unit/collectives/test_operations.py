"""The operations in a job of one rank: each is the identity."""

import numpy as np
import pytest
import tensorflow as tf

import hvdkit as hvd
from hvdkit.collectives import wire


def test_each_is_the_identity():
    value, rows = tf.constant([1.0, 2.0]), tf.IndexedSlices(tf.ones([1, 2]), [0], [3, 2])
    for call in (hvd.allreduce, hvd.allgather, hvd.reducescatter, hvd.alltoall, lambda v: hvd.broadcast(v, 0)):
        assert call(value).numpy().tolist() == [1.0, 2.0]
    for several in (hvd.grouped_allreduce, hvd.grouped_allgather, hvd.grouped_reducescatter):
        assert [t.numpy().tolist() for t in several([value, [3]])] == [[1.0, 2.0], [3]]
        assert several([]) == []
    assert hvd.allreduce(rows).values.numpy().tolist() == [[1.0, 1.0]]
    assert hvd.allreduce([3], prescale_factor=2, postscale_factor=3).numpy().tolist() == [18]
    assert hvd.allreduce(tf.constant([1.0], tf.float64), prescale_factor=0.1).numpy().tolist() == [0.1]
    integers = hvd.allreduce(tf.IndexedSlices(tf.constant([[3]]), [0], [3, 1]))
    assert (integers.values.numpy().tolist(), integers.values.dtype) == ([[3]], tf.float64), "as on many ranks"
    received, splits = hvd.alltoall(value, splits=[2])
    assert (received.numpy().tolist(), splits.numpy().tolist()) == ([1.0, 2.0], [2])
    assert int(hvd.join()) == 0
    assert hvd.barrier() is None
    assert hvd.broadcast_global_variables(0) is None
    assert (hvd.broadcast_object({"a": 1}), hvd.allgather_object("x")) == ({"a": 1}, ["x"])
    assert hvd.broadcast_object_fn(0)({"a": 1}) == {"a": 1}
    variable = tf.Variable([1.0])
    assert hvd.broadcast_variables([variable], root_rank=0) is None
    assert [v.numpy().tolist() for v in hvd.broadcast_([variable], 0)] == [[1.0]]
    assert hvd.gpu_available("tensorflow") == bool(tf.config.list_physical_devices("GPU"))


def test_refusals_are_those_of_many_ranks():
    with pytest.raises(TypeError, match="cannot reduce values of dtype bool"):
        hvd.allreduce([True])
    with pytest.raises(ValueError, match="was given a scalar"):
        hvd.allgather(1.0)
    with pytest.raises(ValueError, match="root_rank=1 does not take part"):
        hvd.broadcast(1.0, 1)
    with pytest.warns(DeprecationWarning, match="`average` has been replaced"):
        hvd.allreduce(1.0, average=True)


def test_an_unnamed_call_is_known_by_its_line():
    names = {wire.caller("allreduce"), wire.caller("allreduce")}
    here = "hvdkit.allreduce.test_operations.py.test_an_unnamed_call_is_known_by_its_line."
    assert len(names) == 1
    assert names.pop().startswith(here)
    assert wire.caller("broadcast", line=False) == here.replace("allreduce", "broadcast")[:-1]


def test_in_converted_code_the_random_file_name_is_left_out():
    found = []

    @tf.function
    def traced(x):
        if tf.reduce_sum(x) > 0:  # what autograph is for
            x += 1
        found.append(wire.caller("allreduce"))
        return x

    traced(tf.constant(np.ones(2)))
    assert found[0].startswith("hvdkit.allreduce.tf__traced.")
