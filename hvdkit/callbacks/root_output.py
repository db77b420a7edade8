"""`RootOutputCallback`: one progress bar for the job, not one a rank."""

import keras

from hvdkit import world


class RootOutputCallback(keras.callbacks.Callback):
    """Silences Keras' own progress output on all ranks but 0."""

    def set_params(self, params: dict) -> None:
        """Changes the parameters that `fit` shares with all callbacks; the progress bar, last in line, reads them."""
        if world.rank() != 0:
            params["verbose"] = 0
        super().set_params(params)
