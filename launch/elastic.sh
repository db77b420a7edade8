#!/usr/bin/env bash
# Trains on ranks and hosts that come and go: a rank or host that is lost costs the steps since the last checkpoint.
#
#   launch/elastic.sh -H host1:4,host2:4 --workdir=DIR --checkpoint_every=500 ...
#   launch/elastic.sh --hostfile FILE --min-np 4 --workdir=DIR ...       the file may change meanwhile
#   launch/elastic.sh --host-discovery-script PATH --max-np 16 --workdir=DIR ...
#
# DIR is on a disk that all hosts share. All other flags are those of launch/local.sh.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/local.sh" --elastic "$@"
