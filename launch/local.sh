#!/usr/bin/env bash
# Trains on this host: installs what is missing, checks the flags, and starts the ranks with hvdkit.launch.
#
#   launch/local.sh                                     two ranks, mnist_mlp on the embedded digits
#   launch/local.sh -np 4 --model=cifar_cnn --dataset=cifar10 --data_dir=DIR
#   launch/local.sh -np 4 --bind cores --dry-run        options of the launcher (python -m hvdkit.launch --help)
#   launch/local.sh --help                              all flags of the training
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python

np='' hosts='' launcher=() flags=()
while (($#)); do
  case $1 in
    -np) np=${2:?-np needs the number of ranks}; shift ;;
    -H|--hostfile|--hosts-from|--host-discovery-script) hosts=given launcher+=("$1" "${2:?$1 needs hosts}"); shift ;;
    --bind|--cores|--gpus|--interface|--ssh-args|--start-timeout|--stall-timeout|--host-timeout|--output|--python|--directory|\
    --min-np|--max-np|--slots|--elastic-timeout|--restarts)
      launcher+=("$1" "${2:?$1 needs a value}"); shift ;;
    --gloo|--mpi|--elastic|--insecure-host-keys|--dry-run) launcher+=("$1") ;;
    --strategy|--workdir) flags+=("$1=${2:?$1 needs a value}"); shift ;;
    *) flags+=("$1") ;;
  esac
  shift
done
for flag in ${flags[@]+"${flags[@]}"}; do  # keep the ranks' logs in the run's workdir
  case $flag in --workdir=*) launcher+=(--workdir "${flag#*=}") ;; esac
done
if [[ $np ]]; then launcher+=(-np "$np"); fi
if [[ ! $np && ! $hosts ]]; then
  case " ${flags[*]-} " in
    *' --strategy=single '*|*' --strategy=mirrored '*) launcher+=(-np 1) ;;  # one process trains
    *) launcher+=(-np 2) ;;
  esac
fi

"$root/launch/bootstrap.sh"
case " ${flags[*]-} " in *' --help '*|*' -h '*) exec "$python" -m hvdkit.train.flags --help ;; esac
# Report wrong flags before any rank starts.
"$python" -m hvdkit.train.flags ${flags[@]+"${flags[@]}"}
exec "$python" -m hvdkit.launch "${launcher[@]}" -- "$python" -m hvdkit.train ${flags[@]+"${flags[@]}"}
