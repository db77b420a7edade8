"""`RootOutputCallback`: one progress bar for the job, not one per rank."""

import keras

from hvdkit import world


class RootOutputCallback(keras.callbacks.Callback):
    """Silences Keras' own progress output on all ranks but 0."""

    def set_params(self, params: dict) -> None:
        """Changes the parameters that `fit` passes to all callbacks. The progress bar is the last one to read them."""
        if world.rank() != 0:
            params["verbose"] = 0
        super().set_params(params)
