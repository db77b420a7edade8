"""Makes a trained model smaller, and measures what that costs: `hvdkit compress`.

trained.py       the run, and its test split
variants.py      quantized and pruned models
gptq.py          4-bit weights by GPTQ, which needs data
exports.py       other formats than Keras'
"""

QUANTIZATIONS = ("int8", "int4", "float8", "gptq")
"""Modes of `keras.Model.quantize`."""

FORMATS = ("saved_model", "litert", "onnx")
"""Formats to export to."""
