"""Private names of TensorFlow: what each must mean."""

import types

import pytest
import tensorflow as tf

from hvdkit.compat import tensorflow
from hvdkit.compat.lookup import MissingNameError


def test_collectives_are_numbered_when_traced():
    from tensorflow.python.distribute import cross_device_utils

    launcher = cross_device_utils.CollectiveReplicaLauncher
    before = launcher._prefer_unique_instance_key
    try:
        tensorflow.number_collectives_when_traced()
        assert launcher._use_unique_instance_key(object.__new__(launcher)) is False  # asked whenever one is traced
    finally:
        launcher._prefer_unique_instance_key = before


def test_a_switch_of_another_name_is_not_passed_over(monkeypatch):
    from tensorflow.python.distribute import cross_device_utils

    monkeypatch.delattr(cross_device_utils.CollectiveReplicaLauncher, "_prefer_unique_instance_key")
    with pytest.raises(MissingNameError, match=r"^TensorFlow 2\..* has no CollectiveReplicaLauncher\._") as caught:
        tensorflow.number_collectives_when_traced()
    assert str(caught.value).endswith("proven with TensorFlow 2.16 to 2.21: pip install 'tensorflow==2.21.*'.")


def test_a_server_of_the_data_service_ends():
    server = tf.data.experimental.service.DispatchServer()
    tensorflow.stop_server(server)
    server.join()  # returns
    with pytest.raises(MissingNameError, match=r"has no SimpleNamespace\._stop"):
        tensorflow.stop_server(types.SimpleNamespace())


def _order(independent):
    """Whether the second of two stateful operations waits for the first."""

    def two():
        first = tf.raw_ops.RandomUniform(shape=[1], dtype=tf.float32)
        second = tf.raw_ops.RandomUniform(shape=[1], dtype=tf.float32)
        third = tf.py_function(lambda: 1.0, [], tf.float32)
        fourth = tf.py_function(lambda: 2.0, [], tf.float32)
        if independent:
            tensorflow.run_out_of_order(fourth.op)
        names.extend([third.op.name, fourth.op.name])
        return first + second + third + fourth

    names = []
    graph = tf.function(two).get_concrete_function().graph
    third, fourth = (graph.get_operation_by_name(name) for name in names)
    return third in fourth.control_inputs


def test_an_operation_is_taken_out_of_the_order_of_stateful_ones():
    assert _order(independent=False)
    assert not _order(independent=True)


def test_outside_of_a_function_there_is_no_order():
    with tf.Graph().as_default():
        tensorflow.run_out_of_order(tf.constant(1.0).op)


def test_a_graph_without_a_manager_is_not_passed_over():
    operation = types.SimpleNamespace(graph=types.SimpleNamespace())
    with pytest.raises(MissingNameError, match=r"has no Graph\.experimental_acd_manager"):
        tensorflow.run_out_of_order(operation)
