"""What is checked and warned of when the model is compiled."""

import types

import numpy as np

from hvdkit.train import compiled
from hvdkit.train.build import (
    build_model,
    find_model,
)


def test_measured_values_that_a_model_does_not_scale_are_warned_of(caplog):
    job = types.SimpleNamespace(model_source=find_model("cifar_cnn"), source=types.SimpleNamespace(name="x.npz"))
    given = {"label_mean": (3.0,), "label_variance": (40_000.0,)}
    compiled._warn_of_units(job, given)
    assert "The model cifar_cnn starts with values near 0, and those of x.npz are about 200," in caplog.text
    caplog.clear()
    compiled._warn_of_units(job, {"label_mean": (3.0,), "label_variance": (4.0,)})
    job.model_source = find_model("text_classifier")
    compiled._warn_of_units(job, given)
    assert not caplog.text
    model = build_model(
        find_model("text_classifier"), given | {"vocabulary_size": 9, "sequence_length": 6, "num_classes": 1}
    )
    assert np.abs(model(np.ones([1, 6], "int32")) - 3).max() < 200, "in the values' unit"
