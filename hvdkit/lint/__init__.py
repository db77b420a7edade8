"""Static analysis of distributed training scripts: `python -m hvdkit.lint script.py`.

The script is parsed and never imported, and TensorFlow is not loaded. A check takes a fraction of a second and needs no
GPU.

    script.py      imports and aliases, possible values of names, calls and blocks of one file
    ranks.py       which code runs on some ranks only
    training.py    where the script compiles and fits Keras models, and with which callbacks
    finding.py     rules and the findings that they report
    rules/         the rules, one file per subject
"""
