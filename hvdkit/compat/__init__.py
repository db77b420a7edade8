"""Every private name of Keras and TensorFlow that hvdkit uses: one function per name, each with its own test.

- `keras3`: variables, optimizers, models, layers and callbacks of Keras;
- `fit_loop`: a running `Model.fit`, its local variables and its iterator over steps;
- `call_stack`: Keras and TensorFlow objects around a call that only the call stack shows;
- `tensorflow`: TensorFlow;
- `keras2`: no private names, but what Keras 3 has removed;
- `lookup`: the error for a version that lacks a name.

`tests/unit/compat` specifies what each name must mean, and checks that no other module uses one.
"""
