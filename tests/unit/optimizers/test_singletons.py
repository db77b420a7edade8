"""Values that hold variables: one for eager execution and for `tf.function`s, another one for each TF 1 graph."""

import tensorflow as tf

from hvdkit.optimizers.singletons import OncePerGraph


def test_a_value_that_is_made_in_a_graph_does_not_break_eager_execution():
    current = OncePerGraph(lambda: tf.Variable(1.0))
    with tf.Graph().as_default():
        of_graph = current()
        assert current() is of_graph

    @tf.function
    def traced():
        return current() + 1.0

    assert float(traced()) == 2.0, "made in a tf.function, for eager execution"
    eager = current()
    eager.assign(2.0)
    assert float(traced()) == 3.0
    assert eager is not of_graph
    with tf.Graph().as_default():
        assert current() not in (eager, of_graph)
