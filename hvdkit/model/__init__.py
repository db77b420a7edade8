"""What `fit`, `evaluate`, `predict`, `load_model` and BatchNormalization mean on many ranks."""
