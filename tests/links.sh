#!/usr/bin/env bash
# The README's tables of slow links: every way to exchange, predicted and tried on 2, 3 and 4 test hosts at three speeds.
#
#   tests/links.sh FOLDER          leaves FOLDER/MODEL-RATE-HOSTS.json (root; about 40 minutes on two cores)
#
# The links are measured between two hosts and the model in one process; what is predicted for three and four follows.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HVDKIT_TESTHOSTS=links TF_CPP_MIN_LOG_LEVEL=2
folder=$(realpath -m "${1:?a folder for what is measured}")
mkdir -p "$folder"
trap 'launch/testhosts.sh down' EXIT
failed=0

declare -A flags=(
  [large_mlp]="--model=hvdkit/bench/large_mlp.py:build --dataset=synthetic:28x28x1:10:76800 --optimizer=adam"
  [cifar_cnn]="--model=cifar_cnn --dataset=synthetic:32x32x3:10:76800 --optimizer=adam"
)
dense="data parallel"
declare -A modes=(
  [2]="$dense,fp16,int8,onebit,topk,powersgd,local SGD,DiLoCo" [3]="$dense,powersgd,DiLoCo" [4]="$dense,int8,onebit,powersgd,DiLoCo"
)
declare -A sizes=(
  [1gbit]="1024,65536,1048576,16777216" [100mbit]="1024,65536,1048576,4194304" [10mbit]="1024,65536,1048576"
)

on_first() { launch/testhosts.sh run h1 .venv/bin/python -m "$@" 2>&1 | grep -v '^[IWE]0000\|^WARNING: All log'; }

for rate in ${HVDKIT_LINKS:-1gbit 100mbit 10mbit}; do
  launch/testhosts.sh up 4 --rate "$rate"
  on_first hvdkit.bench collectives --seconds 2 --case '-H h1:1,h2:1 -np 2' --sizes "${sizes[$rate]}" \
    --json "$folder/links-$rate.json"
  for model in "${!flags[@]}"; do
    known="$folder/$model.json"
    read -ra own <<<"${flags[$model]}"
    [[ -f $known ]] || on_first hvdkit.plan --ranks 2 --threads 1 --shared-machine --json "$known" -- "${own[@]}"
    for hosts in 2 3 4; do
      list=h1:1,h2:1,h3:1,h4:1
      echo "== $model, $hosts hosts, $rate"
      on_first hvdkit.plan measure -H "${list:0:5 * hosts - 1}" --shared-machine --threads 1 --links "$folder/links-$rate.json" \
        --model-from "$known" --modes "${modes[$hosts]}" --json "$folder/$model-$rate-$hosts.json" -- "${own[@]}" || failed=1
    done
  done
done
.venv/bin/python -m hvdkit.plan score "$folder"/*-*bit-?.json
exit "$failed"
