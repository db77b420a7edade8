"""Every private name of Keras and TensorFlow that hvdkit uses: one function for each name, with a test of its own.

- `keras3`: of Keras' variables, optimizers, models, layers and callbacks;
- `fit_loop`: of a `Model.fit` that runs, its local variables and its iterator over steps;
- `call_stack`: what only the call stack tells of the Keras and TensorFlow objects around a call;
- `tensorflow`: of TensorFlow;
- `keras2`: no private names, but what Keras 3 no longer has;
- `lookup`: the sentence for a version that lacks a name.

`tests/unit/compat` says of each what it must mean, and proves that no other module uses one.
"""
