#!/usr/bin/env bash
# Trains on this host: installs what is missing, checks the flags, and starts the ranks with hvdkit.launch.
#
#   launch/local.sh                                     two ranks, a small GPT on texts that come with Python
#   launch/local.sh -np 1                               the same on one rank, to compare
#   launch/local.sh -np 4 --model=cifar_cnn --dataset=cifar10 --data-dir=DIR
#   launch/local.sh -np 4 --bind cores --dry-run        options of the launcher (hvdkit launch --help)
#   launch/local.sh --help                              all flags of the training
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

"$root/launch/bootstrap.sh"
exec "$root/.venv/bin/python" -m hvdkit.train.local "$@"
