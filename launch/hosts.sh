#!/usr/bin/env bash
# Trains on several hosts. All need this checkout with its .venv at the same path, and must accept your ssh key.
#
#   launch/hosts.sh -H host1:4,host2:4 --model=resnet --dataset=cifar10 --data-dir=DIR --workdir=DIR
#   launch/hosts.sh --hostfile FILE [-np N] ...         lines like: host1 slots=4
#   launch/hosts.sh --hosts-from slurm|kubernetes ...   inside a Slurm job, or in the launcher pod of an MPIJob
#
# All other flags are those of launch/local.sh.
set -euo pipefail

case " $* " in
  *' -H'[\ =]*|*' --hostfile'[\ =]*|*' --hosts'[-_]'from'[\ =]*|*' --help '*) ;;
  *) echo "hosts.sh: no hosts were given; name them as in: launch/hosts.sh -H host1:4,host2:4" >&2; exit 2 ;;
esac
exec "$(dirname "${BASH_SOURCE[0]}")/local.sh" "$@"
