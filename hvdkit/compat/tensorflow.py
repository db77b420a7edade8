"""Private names of TensorFlow, each behind one function. For those on the call stack see `call_stack`."""

from typing import Any

import tensorflow as tf

from hvdkit.compat.lookup import missing_in_tensorflow


def number_collectives_when_traced() -> None:
    """Makes `tf.distribute` number collectives when they are traced, not by values fed into a graph at each call.

    Fed values do not reach a function that is called inside a condition. Keras calls the training step in this way if
    `steps_per_execution` is above 1 ("You must feed a value for placeholder tensor ...").

    Raises:
        MissingNameError: TensorFlow has no such switch.
    """
    name = "CollectiveReplicaLauncher._prefer_unique_instance_key"
    try:
        from tensorflow.python.distribute.cross_device_utils import CollectiveReplicaLauncher
    except ImportError as error:
        raise missing_in_tensorflow(name) from error
    if not hasattr(CollectiveReplicaLauncher, "_prefer_unique_instance_key"):
        raise missing_in_tensorflow(name)
    CollectiveReplicaLauncher._prefer_unique_instance_key = False


def stop_server(server: Any) -> None:
    """Stops a server of tf.data's service, whose public methods can only wait for its end.

    Raises:
        MissingNameError: TensorFlow's servers cannot be stopped.
    """
    if not hasattr(server, "_stop"):
        raise missing_in_tensorflow(f"{type(server).__name__}._stop")
    server._stop()


def run_out_of_order(operation: tf.Operation) -> None:
    """Removes an operation from the order in which a `tf.function` runs stateful operations. Call it when traced.

    Raises:
        MissingNameError: TensorFlow's graphs have no object that keeps this order.
    """
    graph = operation.graph
    if not hasattr(graph, "experimental_acd_manager"):
        raise missing_in_tensorflow("Graph.experimental_acd_manager")
    manager: Any = graph.experimental_acd_manager
    if manager is not None:  # None: outside a tf.function, or in one that keeps no order
        manager.run_independently(operation)
