#!/usr/bin/env bash
# Trains on this host: sets up what is missing, checks the flags, and starts the ranks under horovodrun.
#
#   launch/local.sh                                     two ranks, mnist_mlp on the embedded digits
#   launch/local.sh -np 4 --model=cifar_cnn --dataset=cifar10 --data_dir=DIR
#   launch/local.sh --help                              all flags
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python

np='' flags=()
default=2
while (($#)); do
  case $1 in
    -np)        np=${2:?-np needs the number of ranks}; shift ;;
    --strategy) flags+=("--strategy=${2:?--strategy needs a name}"); shift ;;
    *)          flags+=("$1") ;;
  esac
  shift
done

case " ${flags[*]-} " in *' --strategy=single '*|*' --strategy=mirrored '*) default=1 ;; esac  # one process trains

"$root/launch/bootstrap.sh"
case " ${flags[*]-} " in *' --help '*|*' -h '*) exec "$python" -m hvdkit.train_flags --help ;; esac
# A wrong flag ends here, before any rank has started.
"$python" -m hvdkit.train_flags ${flags[@]+"${flags[@]}"}
exec "$python" -m hvdkit.launch -np "${np:-$default}" -- "$python" -m hvdkit.train ${flags[@]+"${flags[@]}"}
