"""Starting jobs: `python -m hvdkit.launch [-np N] [-H h1:2,h2:2] -- command` runs a command on many ranks and hosts.

options.py     the command line
hosts.py       which hosts, how many ranks each, and each rank's place
job.py         one job from start to end; mpi.py the same where mpirun starts the ranks
link.py        the connection to a host; agent.py is what runs at its other end
rendezvous.py  where the ranks find each other, and nobody else gets in
plan.py        what each rank is given: environment, cores, GPU
console.py     what is shown and kept; failures.py who failed first
"""
