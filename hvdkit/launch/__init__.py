"""The launcher: `python -m hvdkit.launch [-np N] [-H h1:2,h2:2] -- command` runs a command on many ranks and hosts.

options.py     the command line
hosts.py       the hosts, the number of ranks on each, and each rank's slot
job.py         one job from start to end; mpi.py does the same with mpirun
restarts.py    jobs that restart after failures or a change of hosts
link.py        the connection to a host; agent.py runs at its other end
shells.py      remote shells: ssh and srun
rendezvous.py  the server through which the ranks find each other
binding.py     the cores and GPU of each rank; environment.py has their variables
dry_run.py     what --dry-run prints
console.py     output and logs; failures.py finds the rank that failed first
"""
