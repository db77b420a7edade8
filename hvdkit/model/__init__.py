"""Models on many ranks: `fit`, `evaluate`, `predict`, `load_model` and BatchNormalization."""
