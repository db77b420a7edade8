"""How will a training scale, and should it: `python -m hvdkit.plan` measures a model and a link, and predicts.

`cost` holds the model on paper, each formula with its source; `facts` and `links` what is measured; `advice` the
sentence at the end; `score` holds predictions against what was measured later; `published` against what others have
published.
"""
