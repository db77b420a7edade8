#!/usr/bin/env bash
# Sets up what is missing and runs all tests. Arguments go to pytest:
#
#   tests/run.sh                     everything
#   tests/run.sh tests/unit          one process, a minute
#   tests/run.sh -m 'not recipe'     without the trainings to a recipe's accuracy
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/bootstrap.sh"
cd "$root"
# Ranks wait for each other a good part of the time: one test more than cores at once, but not too many ranks.
cores=$(nproc)
exec .venv/bin/python -m pytest -n "$((cores < 4 ? cores + 1 : 4))" --dist worksteal "$@"
