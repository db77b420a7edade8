#!/usr/bin/env bash
# Trains elastically: hosts may be added and removed, and a lost rank or host costs only the steps since the last
# checkpoint.
#
#   launch/elastic.sh -H host1:4,host2:4 --workdir=DIR --checkpoint-every=500 ...
#   launch/elastic.sh --hostfile FILE --min-np 4 --workdir=DIR ...       you may edit FILE during the run
#   launch/elastic.sh --host-discovery-script PATH --max-np 16 --workdir=DIR ...
#
# DIR must be on a disk that all hosts share. All other flags are those of launch/local.sh.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/local.sh" --elastic "$@"
