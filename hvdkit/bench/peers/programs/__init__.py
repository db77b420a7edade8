"""The programs that peers run as ranks. They do not import hvdkit, because they run in the peers' environments.

models.py     the workloads for any Keras
setting.py    what the bench has told a program: workloads, threads, cores, addresses
timing.py     samples per second and step times, printed as one line of JSON
bound.py      runs a command on the cores of its rank
The others each train with one tool.
"""
