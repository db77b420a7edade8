"""Private names of Keras 3: what each must mean. Run on each supported Keras by tests/versions.py."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdkit.compat import keras3
from hvdkit.compat.lookup import MissingNameError, private
from hvdkit.errors import UsageError

OPTIMIZERS = ("SGD", "RMSprop", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "Nadam", "Ftrl", "Lion")


def dense(**arguments):
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(2, name="first"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.5, **arguments), loss="mse")
    return model


def variables(*values):
    return [keras.Variable(value, name=f"v{place}") for place, value in enumerate(values)]


# ---- The sentence ---------------------------------------------------------------------------------------------------


def test_a_missing_name_is_said_in_a_sentence():
    with pytest.raises(MissingNameError) as caught:
        private(keras.optimizers.SGD(), "_no_such_name")
    said = str(caught.value)
    assert said.startswith(f"Keras {keras.__version__} has no SGD._no_such_name, which hvdkit uses.")
    assert said.endswith("hvdkit is proven with Keras up to 3.15: pip install 'keras<3.16'.")
    assert isinstance(caught.value, UsageError)
    with pytest.raises(MissingNameError, match=r"has no Adam\._gone, which"):
        private(keras.optimizers.Adam, "_gone")


class Renamed:
    """Stands for an object of a Keras that has renamed what hvdkit uses."""

    built = True
    momentum = gradient_accumulation_steps = 2
    variables = ()
    monitor_op = None


@pytest.mark.parametrize(
    ("name", "use"),
    {
        "_trainable_variables": keras3.trained_variables,
        "_variables": keras3.own_variables,
        "_iterations": keras3.calls_of_apply,
        "_learning_rate": keras3.learning_rate_source,
        "_accumulated_gradients": keras3.gradient_accumulators,
        "_model_variables_moving_average": keras3.moving_averages,
        "_filter_empty_gradients": lambda o: keras3.without_empty_gradients(o, [], []),
        "_use_weight_decay": lambda o: keras3.decays(o, None),
        "_clip_gradients": lambda o: keras3.replace_clipping(o, lambda clip: clip),
        "_all_reduce_sum_gradients": keras3.leave_out_reduction,
        "update_step": lambda o: keras3.replace_update(o, print),
        "_get_variable_index": lambda o: keras3.adam_slots(o, None),
        "_flatten_layers": keras3.layers_of,
        "_distribute_strategy": keras3.strategy_of,
        "_initial_epoch": lambda o: keras3.set_first_epoch(o, 1),
        "_symbolic_build": lambda o: keras3.build_on(o, None),
        "_get_metrics_result_or_logs": lambda o: keras3.replace_next_epoch_logs(o, dict),
        "_flatten_metrics_in_order": lambda o: keras3.results_in_order(o, {}),
        "_loss_tracker": keras3.loss_tracker,
        "_clear_losses": keras3.clear_losses,
        "_keras_history": keras3.operation_of,
        "_outbound_nodes": keras3.consumers_of,
        "_reduction_axes": keras3.reduction_axes,
        "_set_monitor_op": keras3.choose_direction,
        "_global_train_batch": keras3.tensorboard_counters,
    }.items(),
)
def test_a_renamed_one_is_not_passed_over(name, use):
    renamed = Renamed()
    with pytest.raises(MissingNameError, match=rf"has no \w+\.{name}, which hvdkit uses"):
        use(renamed)
    assert not vars(renamed)  # nothing that Keras would never read was set


# ---- Variables ------------------------------------------------------------------------------------------------------


def test_the_native_variable_holds_the_values():
    variable = keras.Variable([1.0, 2.0])
    native = keras3.native_variable(variable)
    assert isinstance(native, tf.Variable)
    native.assign([3.0, 4.0])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), [3, 4])
    assert keras3.native_variable(native) is native


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_vector_variable_begins_empty_and_has_slots_of_its_length(dtype):
    variable = keras3.VectorVariable(3, dtype, "part")
    assert variable.trainable
    assert keras3.native_variable(variable).shape.as_list() == [None]
    assert tf.shape(keras3.native_variable(variable)).numpy() == [0]
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    optimizer.build([variable])
    assert [tuple(v.shape) for v in optimizer.variables if "momentum" in v.path] == [(3,)]
    variable.assign(tf.ones([3], dtype))
    optimizer.apply([tf.ones([3], dtype)], [variable])
    np.testing.assert_array_equal(tf.cast(keras3.native_variable(variable), tf.float32), [0.5, 0.5, 0.5])


def test_seeds_are_known_by_their_paths():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dropout(0.5, seed=7), keras.layers.Dense(1)])
    seeds = [v for v in model.variables if keras3.is_seed(v)]
    assert [keras.ops.convert_to_numpy(v).tolist() for v in seeds] == [[7, 0]]
    model(tf.ones([1, 3]), training=True)
    assert keras.ops.convert_to_numpy(seeds[0])[1] > 0  # it moves with each draw
    assert not keras3.is_seed(keras.Variable([7, 0], name="seed"))


def test_asking_for_seeds_does_not_renumber_them():
    keras.utils.clear_session()
    keras3._seed_name.cache_clear()
    assert not keras3.is_seed(keras.Variable(0.0))
    assert keras.random.SeedGenerator(1).name == "seed_generator"


def test_the_global_seed_generator_is_the_one_that_is_drawn_from():
    keras.utils.clear_session()
    keras.utils.set_random_seed(3)
    assert keras3.global_seed_generator() is None
    made = keras3.global_seed_generator(make=True)
    assert keras3.global_seed_generator() is made
    before = keras.ops.convert_to_numpy(made.state).copy()
    first = keras.ops.convert_to_numpy(keras.random.normal([4]))
    assert (keras.ops.convert_to_numpy(made.state) != before).any()
    made.state.assign(before)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(keras.random.normal([4])), first)


# ---- Optimizers -----------------------------------------------------------------------------------------------------


def test_variables_of_an_optimizer():
    trained = variables(1.0, 2.0)
    inner = keras.optimizers.SGD(0.5, momentum=0.9)
    outer = keras.optimizers.LossScaleOptimizer(inner)
    outer.build(trained)
    assert [id(v) for v in keras3.trained_variables(inner)] == [id(v) for v in trained]
    own = keras3.own_variables(outer)
    assert len(own) == 4  # iteration, learning rate, steps, scale
    assert [id(v) for v in (*own, *inner.variables)] == [id(v) for v in outer.variables]


def test_calls_of_apply_are_counted_and_iterations_are_updates():
    (variable,) = variables(1.0)
    optimizer = keras.optimizers.SGD(0.5, gradient_accumulation_steps=2)
    for _ in range(3):
        optimizer.apply([tf.constant(1.0)], [variable])
    assert int(keras3.calls_of_apply(optimizer).numpy()) == 3
    assert int(optimizer.iterations) == 1


def test_where_the_learning_rate_comes_from():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.9)
    assert keras3.learning_rate_source(keras.optimizers.SGD(schedule)) is schedule
    optimizer = keras.optimizers.SGD(0.5)
    source = keras3.learning_rate_source(optimizer)
    assert any(source is v for v in optimizer.variables)
    source.assign(0.25)
    assert float(optimizer.learning_rate) == 0.25


def test_gradient_accumulators_hold_the_sum_until_the_update():
    trained = variables([1.0, 1.0])
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9, gradient_accumulation_steps=3)
    assert keras3.gradient_accumulators(optimizer) == []
    optimizer.build(trained)
    (accumulator,) = keras3.gradient_accumulators(optimizer)
    assert any(accumulator is v for v in optimizer.variables)
    for _ in range(2):
        optimizer.apply([tf.constant([1.0, 2.0])], trained)
    np.testing.assert_array_equal(accumulator.numpy(), [2, 4])
    optimizer.apply([tf.constant([1.0, 2.0])], trained)
    np.testing.assert_array_equal(accumulator.numpy(), [0, 0])
    np.testing.assert_array_equal(trained[0].numpy(), [0.5, 0])
    plain = keras.optimizers.SGD()
    plain.build(trained)
    assert keras3.gradient_accumulators(plain) == []


def test_moving_averages_are_of_the_weights():
    trained = variables(1.0)
    optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5)
    for _ in range(2):
        optimizer.apply([tf.constant(1.0)], trained)
    (average,) = keras3.moving_averages(optimizer)
    assert float(average.numpy()) == pytest.approx(0.25)  # of 0.5 and 0.0
    optimizer.finalize_variable_values(trained)
    assert trained[0].numpy() == average.numpy()


def test_empty_gradients_are_left_out_with_a_warning():
    trained = variables(1.0, 2.0)
    optimizer = keras.optimizers.SGD(0.5)
    with pytest.warns(UserWarning, match="v0"):
        grads, left = keras3.without_empty_gradients(optimizer, [None, tf.constant(3.0)], trained)
    assert [float(g) for g in grads] == [3.0]
    assert list(left) == trained[1:]


def test_exclusions_from_weight_decay_are_known_and_copied():
    trained = variables(1.0, 2.0, 3.0)
    optimizer, other = (keras.optimizers.AdamW(weight_decay=0.1) for _ in range(2))
    optimizer.exclude_from_weight_decay(var_list=trained[:1], var_names=["v2"])
    natives = [keras3.native_variable(v) for v in trained]
    expected = [False, True, False]
    assert [keras3.decays(optimizer, v) for v in natives] == expected
    assert all(keras3.decays(other, v) for v in natives)
    keras3.copy_decay_exclusions(keras.optimizers.AdamW(), other)  # one without exclusions
    assert all(keras3.decays(other, v) for v in natives)
    keras3.copy_decay_exclusions(optimizer, other)
    assert [keras3.decays(other, v) for v in natives] == expected


@pytest.mark.parametrize("clip", [{}, {"clipvalue": 0.5}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}])
@pytest.mark.parametrize("accumulates", [False, True])
def test_replaced_clipping_is_called_once_an_update_with_all_gradients(clip, accumulates):
    trained = variables(1.0, 2.0)
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2 if accumulates else None, **clip)
    calls = []

    def make(keras_clip):
        def replacement(grads):
            calls.append(len(grads))
            return [g + 10.0 for g in keras_clip(grads)]

        return replacement

    keras3.replace_clipping(optimizer, make)
    grads = [tf.constant(0.25), tf.constant(0.25)]
    step = tf.function(lambda: optimizer.apply(grads, trained))
    with tf.init_scope():
        optimizer.build(trained)
    for _ in range(2 if accumulates else 1):
        step()
    assert calls == [2]  # traced once, into the branch that is taken every second call
    np.testing.assert_allclose([v.numpy() for v in trained], [1 - 10.25, 2 - 10.25], rtol=1e-6)


def test_the_reduction_gets_and_returns_pairs():
    (variable,) = variables(1.0)
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build([variable])
    seen = []
    reduce = optimizer._all_reduce_sum_gradients
    optimizer._all_reduce_sum_gradients = lambda pairs: seen.append(list(pairs)) or reduce(pairs)
    optimizer.apply([tf.constant(0.5)], [variable])
    ((gradient, owner),) = seen[0]  # Keras calls it in each update, with a pair a variable
    assert float(gradient) == 0.5
    assert owner is keras3.native_variable(variable)
    keras3.leave_out_reduction(optimizer)
    optimizer.apply([tf.constant(0.25)], [variable])
    assert len(seen) == 1
    assert variable.numpy() == 0.25
    pairs = [(gradient, owner)]
    assert list(optimizer._all_reduce_sum_gradients(pairs)) == pairs


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_of_a_class_updates_one_variable(name):
    kind = getattr(keras.optimizers, name)
    (variable,) = variables([1.0, 1.0])
    optimizer = kind(0.5)
    optimizer.build([variable])
    keras3.update_of(kind)(optimizer, tf.constant([1.0, 0.0]), keras3.native_variable(variable), 0.5)
    assert variable.numpy()[0] != 1
    assert keras3.update_of(kind) is not keras3.update_of(keras.optimizers.Optimizer)


def test_subclasses_share_the_update_or_have_their_own():
    assert keras3.update_of(keras.optimizers.AdamW) is keras3.update_of(keras.optimizers.Adam)
    assert keras3.update_of(keras.optimizers.Nadam) is not keras3.update_of(keras.optimizers.Adam)


def test_a_replaced_update_is_called_for_each_variable():
    trained = variables(1.0, 2.0)
    optimizer = keras.optimizers.SGD(0.5)
    assert not keras3.has_own_update(optimizer)
    seen = []
    keras3.replace_update(optimizer, lambda g, v, rate: seen.append((float(g), v is not None, float(rate))))
    assert keras3.has_own_update(optimizer)
    optimizer.apply([tf.constant(3.0), tf.constant(4.0)], trained)
    assert seen == [(3.0, True, 0.5), (4.0, True, 0.5)]
    assert [float(v.numpy()) for v in trained] == [1.0, 2.0]


def test_slots_of_adam_and_sgd():
    trained = variables(1.0, 2.0)
    adam = keras.optimizers.Adam(0.1, beta_1=0.5, beta_2=0.75)
    adam.apply([tf.constant(2.0), tf.constant(4.0)], trained)
    mean, square = keras3.adam_slots(adam, keras3.native_variable(trained[1]))
    assert (float(mean.numpy()), float(square.numpy())) == (2.0, 4.0)
    sgd = keras.optimizers.SGD(0.5, momentum=0.9)
    sgd.apply([tf.constant(2.0), tf.constant(4.0)], trained)
    assert float(keras3.sgd_slot(sgd, keras3.native_variable(trained[1])).numpy()) == -2.0


@pytest.mark.parametrize("kind", [keras.optimizers.SGD, keras.optimizers.RMSprop])
def test_momentum_slots_sum_up_rate_times_gradient(kind):
    trained = variables(1.0, 2.0)
    optimizer = kind(0.5, momentum=0.9)
    assert keras3.momentum_slots(optimizer) == []  # not built
    optimizer.apply([tf.constant(2.0), tf.constant(0.0)], trained)
    first, second = keras3.momentum_slots(optimizer)
    assert abs(float(first.numpy())) == pytest.approx(abs(1.0 - float(trained[0].numpy())), rel=1e-5)
    assert float(second.numpy()) == 0
    plain = kind(0.5)
    plain.build(trained)
    assert keras3.momentum_slots(plain) == []


def test_momentum_slots_of_another_name_are_not_passed_over(monkeypatch):
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    optimizer.build(variables(1.0))
    monkeypatch.delattr(optimizer, "momentums")
    with pytest.raises(MissingNameError, match="momentums"):
        keras3.momentum_slots(optimizer)


@pytest.mark.skipif(not hasattr(keras.optimizers, "Muon"), reason="this Keras has no Muon")
def test_momentum_slots_without_the_rate_are_left_out():
    muon = keras.optimizers.Muon(0.5, momentum=0.9)
    muon.build([keras.Variable(np.ones([2, 2]), name="kernel")])
    assert any(v.path.endswith("momentum") for v in muon.variables), "or this test proves nothing"
    assert keras3.momentum_slots(muon) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_names_of_slots_tell_what_they_are_and_whose(name):
    trained = [keras.Variable(1.0, name="v1"), keras.Variable([2.0, 3.0], name="v11")]
    momentum = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    optimizer = getattr(keras.optimizers, name)(0.5, use_ema=True, **momentum)
    optimizer.build(trained)
    roles = [[keras3.role_of_slot(s, v) for s in optimizer.variables] for v in trained]
    found = [[role for role in of_one if role] for of_one in roles]
    assert found[0] == found[1]
    assert "average" in found[0]
    assert len(set(found[0])) == len(found[0]) >= 2
    for slot, *of in zip(optimizer.variables, *roles, strict=True):
        if slot.shape == trained[1].shape:  # only the second's are vectors
            assert of == [None, of[1]]
            assert of[1] is not None


# ---- Models ---------------------------------------------------------------------------------------------------------


def test_layers_of_a_model_at_whatever_depth():
    inner = keras.Sequential([keras.Input([3]), keras.layers.Dense(2, name="deep")], name="inner")
    model = keras.Sequential([keras.Input([3]), inner, keras.layers.Dense(1, name="flat")], name="outer")
    names = [layer.name for layer in keras3.layers_of(model)]
    assert names[0] == "outer"
    assert {"inner", "deep", "flat"} <= set(names)
    assert "outer" not in [layer.name for layer in keras3.layers_of(model, include_self=False)]


def test_the_strategy_in_whose_scope_a_model_was_made():
    assert keras3.strategy_of(dense()) is None
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        assert keras3.strategy_of(dense()) is strategy


def test_fit_begins_with_the_first_epoch_that_a_callback_sets():
    model, begun = dense(), []

    class FromTwo(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            keras3.set_first_epoch(self.model, 2)

        def on_epoch_begin(self, epoch, logs=None):
            begun.append(epoch)

    assert keras3.first_epoch(model) is None
    model.fit(np.ones([4, 3]), np.ones([4, 1]), epochs=4, verbose=0, callbacks=[FromTwo()])
    assert begun == [2, 3]
    assert keras3.first_epoch(model) == 2
    keras3.set_first_epoch(model, None)
    model.fit(np.ones([4, 3]), np.ones([4, 1]), epochs=2, initial_epoch=1, verbose=0, callbacks=[])
    assert keras3.first_epoch(model) is None


def test_a_model_is_built_on_a_batch_of_symbols():
    model = keras.Sequential([keras.layers.Dense(2), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(), loss="mse", metrics=["mae"])
    assert not model.built
    keras3.build_on(model, (keras.KerasTensor([None, 3]), keras.KerasTensor([None, 1])))
    assert [tuple(w.shape) for w in model.weights] == [(3, 2), (2,), (2, 1), (1,)]
    assert model.optimizer.built
    assert sum(len(m.variables) for m in model.metrics) == 4  # loss and mae: sum and count


def test_logs_of_the_next_epoch_are_replaced_once():
    model, seen = dense(), []

    class Replace(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            keras3.replace_next_epoch_logs(self.model, lambda given: seen.append(sorted(given)) or {"mine": 7.0})

    history = model.fit(np.ones([4, 3]), np.ones([4, 1]), epochs=2, verbose=0, callbacks=[Replace()]).history
    assert seen == [["loss"]]
    assert history["mine"] == [7.0]
    assert len(history["loss"]) == 1


def test_results_are_in_the_order_that_evaluate_returns_them():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    model.compile("sgd", loss="mse", metrics=["mae", keras.metrics.RootMeanSquaredError(name="a_root")])
    data = (np.arange(12.0).reshape(4, 3), np.ones([4, 1]))
    named = model.evaluate(*data, return_dict=True, verbose=0)
    assert keras3.results_in_order(model, named) == pytest.approx(model.evaluate(*data, verbose=0))
    assert list(named.values()) != pytest.approx(keras3.results_in_order(model, named)[::-1])


def test_the_loss_tracker_is_the_loss_that_fit_shows():
    model = dense()
    history = model.fit(np.ones([4, 3]), np.ones([4, 1]), verbose=0).history
    assert float(keras3.loss_tracker(model).result()) == pytest.approx(history["loss"][0])


def test_losses_that_layers_added_are_forgotten():
    layer = keras.layers.Dense(1, activity_regularizer=keras.regularizers.L2(1.0))
    model = keras.Sequential([keras.Input([3]), layer])
    model(tf.ones([1, 3]))
    assert len(layer.losses) == 1
    keras3.clear_losses(model)
    assert layer.losses == []


def test_graphs_of_models():
    sequential = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    graph = keras3.graph_of(sequential)
    assert [operation.name for operation in graph.operations][1:] == [sequential.layers[0].name]
    inputs = keras.Input([3])
    functional = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    assert keras3.graph_of(functional) is functional
    assert keras3.graph_of(keras.Sequential([keras.layers.Dense(1)])) is None

    class Subclass(keras.Model):
        pass

    assert keras3.graph_of(Subclass()) is None


def test_masks_of_symbolic_tensors():
    tokens = keras.Input([4], dtype="int32")
    masked = keras.layers.Embedding(3, 2, mask_zero=True)(tokens)
    assert keras3.has_mask(masked)
    assert not keras3.has_mask(keras.layers.Embedding(3, 2)(tokens))
    assert not keras3.has_mask(keras.layers.GlobalAveragePooling1D()(masked))


def test_operations_and_those_that_take_their_outputs():
    inputs = keras.Input([3])
    first, second, third = (keras.layers.Dense(3, name=name) for name in "abc")
    middle = first(inputs)
    total = second(middle) + third(middle)
    assert keras3.operation_of(middle) is first
    assert keras3.consumers_of(first) == [second, third]
    assert keras3.consumers_of(second) == [keras3.operation_of(total)]
    assert keras3.consumers_of(keras3.operation_of(total)) == []


# ---- Layers ---------------------------------------------------------------------------------------------------------


def test_moments_are_replaced_in_training_only():
    layer = keras.layers.BatchNormalization(momentum=0.0, epsilon=0.0)
    inputs = tf.constant([[1.0, 2.0], [3.0, 6.0]])
    layer.build([None, 2])
    assert tuple(keras3.reduction_axes(layer)) == (0,)
    original = keras3.moments_of_keras()
    mean, variance = original(layer, inputs, None)
    np.testing.assert_allclose(np.ravel(mean), [2, 4])
    np.testing.assert_allclose(np.ravel(variance), [1, 4])
    calls = []

    def moments(self, values, mask):
        calls.append((self, mask))
        return tf.constant([1.0, 2.0]), tf.constant([4.0, 16.0])

    keras3.replace_moments(moments)
    try:
        np.testing.assert_allclose(layer(inputs, training=True), [[0, 0], [1, 1]], atol=1e-6)
        layer(inputs, training=False)
    finally:
        keras3.replace_moments(original)
    assert calls == [(layer, None)]
    np.testing.assert_allclose(layer.moving_mean.numpy(), [1, 2])
    assert keras3.moments_of_keras() is original
    images = keras.layers.BatchNormalization()
    images.build([None, 4, 4, 3])
    assert tuple(keras3.reduction_axes(images)) == (0, 1, 2)


def test_the_output_projection_of_attention_is_replaced():
    class Doubled(keras3.MultiHeadAttention):
        def output_projection(self, keras_own):
            self.given = keras_own.name

            class Twice(keras.layers.EinsumDense):
                def call(self, inputs):
                    return 2 * super().call(inputs)

            return Twice(**keras_own.get_config())

    inputs = tf.random.stateless_normal([2, 4, 6], [0, 1])
    plain, doubled = keras.layers.MultiHeadAttention(2, 3), Doubled(2, 3)
    expected = plain(inputs, inputs)
    doubled(inputs, inputs)
    doubled.set_weights(plain.get_weights())
    np.testing.assert_allclose(doubled(inputs, inputs), 2 * expected, rtol=1e-5)
    assert doubled.given == "attention_output"
    kept = keras3.MultiHeadAttention(2, 3)
    kept(inputs, inputs)
    kept.set_weights(plain.get_weights())
    np.testing.assert_allclose(kept(inputs, inputs), expected, rtol=1e-5)


# ---- Callbacks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"save_best_only": True, "monitor": "loss"}, {"save_freq": 1}])
def test_a_checkpoint_that_may_not_write_does_not(tmp_path, options):
    class Quiet(keras3.ModelCheckpoint):
        def may_write(self):
            return False

    for kind, written in ((keras3.ModelCheckpoint, True), (Quiet, False)):
        path = tmp_path / f"{kind.__name__}.keras"
        dense().fit(np.ones([4, 3]), np.ones([4, 1]), verbose=0, callbacks=[kind(path, **options)])
        assert path.exists() is written


def test_attributes_that_all_callbacks_have_are_left_out():
    class Counting(keras.callbacks.Callback):
        mine = 0

        def on_train_begin(self, logs=None):
            self.count = 3

    callback = Counting()
    dense().fit(np.ones([4, 3]), np.ones([4, 1]), verbose=0, callbacks=[callback])
    assert keras3.attributes_of_callback(callback) == {"count": 3}


def test_early_stopping_chooses_its_direction_once():
    callback = keras.callbacks.EarlyStopping(monitor="loss", min_delta=0.1)
    assert keras3.chooses_direction_late(callback)
    assert callback.monitor_op is None
    callback.set_model(dense())
    keras3.choose_direction(callback)
    assert callback.monitor_op(1.0, 2.0)  # less is better
    assert callback.min_delta == -0.1
    keras3.choose_direction(callback)
    assert callback.min_delta == -0.1
    assert not keras3.chooses_direction_late(keras.callbacks.Callback())


def test_keras_says_whether_less_of_a_metric_is_better():
    model = dense()
    model.compile("sgd", "mse", metrics=[keras.metrics.CosineSimilarity(name="similar"), "mae", lambda y, z: y - z])
    model.fit(np.ones([4, 3]), np.ones([4, 1]), verbose=0)
    found = {name: keras3.less_is_better(model, name) for name in ("val_similar", "mae", "val_loss", "other")}
    assert found == {"val_similar": False, "mae": True, "val_loss": True, "other": None}


def test_attributes_of_own_class_are_those_that_keras_does_not_set():
    class Own(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.count, self.list, self.dict = 3, [1, 2], {"a": 1}

        def call(self, x):
            return x

    class Counted(keras.metrics.Mean):
        seen = 0

        def update_state(self, *args, **kwargs):
            self.seen += 1

    model = keras.Sequential([keras.layers.Input([3]), Own(), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=[Counted()], jit_compile=False)
    model.fit(np.ones([4, 3]), np.ones([4, 1]), verbose=0)
    found = keras3.attributes_of_own_class(model.layers[0])
    assert {name: value for name, value in found.items() if name[0] != "_"} == {
        "count": 3,
        "list": [1, 2],
        "dict": {"a": 1},
    }
    assert [type(found[name]) for name in ("list", "dict")] == [list, dict]
    assert keras3.attributes_of_own_class(model.layers[1]) == {}
    metric = Counted()
    metric.update_state(1)
    assert keras3.attributes_of_own_class(metric)["seen"] == 1


def test_inputs_of_a_layer_are_the_tensors_on_which_the_model_calls_it():
    inputs = [keras.Input([3]), keras.Input([3])]
    shared, once = keras.layers.Dense(3), keras.layers.Dense(3)
    model = keras.Model(inputs, once(keras.layers.Add()([shared(inputs[0]), shared(inputs[1])])))
    assert [[t is i for t in call] for call, i in zip(keras3.inputs_in(model, shared), inputs, strict=True)] == [
        [True]
    ] * 2
    ((tensor,),) = keras3.inputs_in(model, once)
    assert keras3.operation_of(tensor).name.startswith("add")


def test_counters_of_tensorboard_count_batches(tmp_path):
    callback = keras.callbacks.TensorBoard(tmp_path)
    data = np.ones([8, 3]), np.ones([8, 1])
    dense().fit(*data, batch_size=2, epochs=2, validation_data=data, verbose=0, callbacks=[callback])
    counters = keras3.tensorboard_counters(callback)
    assert counters["_global_train_batch"] == 8
    assert all(isinstance(value, int) for value in counters.values())


def test_a_csv_file_goes_back_to_what_it_was(tmp_path):
    path = tmp_path / "log.csv"
    states = []

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            states.append(keras3.csv_state(logger))
            if epoch == 2:
                keras3.restore_csv(logger, states[0])

    logger = keras.callbacks.CSVLogger(path)
    assert keras3.csv_state(keras.callbacks.CSVLogger(path)) == {} if hasattr(logger, "csv_file") else True
    dense().fit(np.ones([4, 3]), np.ones([4, 1]), epochs=4, verbose=0, callbacks=[logger, Keep()])
    assert "loss" in states[0]["keys"]
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["epoch", "0", "3"]
