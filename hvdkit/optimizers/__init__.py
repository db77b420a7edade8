"""Optimizers: everything between the gradients and the weight update.

`exchanging` is the proxy around a Keras optimizer, and `distributed` the proxy that averages gradients over ranks.
`gradients` contains the allreduce itself, and `state` lists the variables of a training run.
"""
