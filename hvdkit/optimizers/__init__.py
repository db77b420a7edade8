"""What stands between a gradient and a weight.

`exchanging` is the proxy around a Keras optimizer, `distributed` the one that averages gradients over ranks,
`gradients` the allreduce itself, `state` what a training's variables are.
"""
