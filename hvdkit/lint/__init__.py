"""Reading a training script for what makes it wrong on many ranks: `python -m hvdkit.lint script.py`.

The script is parsed, never imported, and neither is TensorFlow: a check takes a fraction of a second and needs no GPU.

    script.py      what one file says: imports and their aliases, names and what they may hold, calls, blocks
    ranks.py       which code runs on some ranks only
    training.py    where the script compiles and fits Keras models, and with which callbacks
    finding.py     what a rule is, and what it reports
    rules/         the rules, one file a subject
"""
