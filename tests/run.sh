#!/usr/bin/env bash
# Sets up what is missing and runs the tests. Arguments go to pytest:
#
#   tests/run.sh                     what covers every module (10 minutes on two cores)
#   tests/run.sh --all               also the long ones: recipes, images, Slurm, drills, other versions of Keras
#   tests/run.sh --all -m slow       the long ones alone
#   tests/run.sh tests/unit          those of one folder, file or (FILE::NAME) function
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
selected=(-m 'not slow')
case " $* " in *' --all '* | *::*) selected=() ;; esac  # a test that is named is wanted, however long it takes
if [[ ${1:-} == --all ]]; then shift; fi
"$root/launch/bootstrap.sh"
cd "$root"
# Ranks wait for each other a good part of the time: one test more than cores at once, but not too many ranks.
cores=$(nproc)
exec .venv/bin/python -m pytest -n "$((cores < 4 ? cores + 1 : 4))" --dist worksteal --durations 10 \
  "${selected[@]}" "$@"
