"""Predict how training scales: `python -m hvdkit.plan` measures a model and uses a measured or given link.

- `cost`: the cost model, each formula with its source.
- `facts` and `links`: the measurements of the model and of the network.
- `modes`: the training modes that are compared; `compressing` times their compressors.
- `report` and `advice`: the table, and the recommendation below it.
- `measure`: training runs in each mode, beside the predictions.
- `score`: the error of predictions against later measurements.
- `published`: published scaling results to compare predictions with.
"""
