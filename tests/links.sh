#!/usr/bin/env bash
# The README's tables of slow links: every way to exchange, predicted and tried on 2, 3 and 4 test hosts at three speeds.
#
#   tests/links.sh FOLDER          leaves FOLDER/MODEL-RATE-HOSTS.json (root; about 40 minutes on two cores)
#
# Links are measured between all hosts that train, and models in as many processes, which share the machine.
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
modes_of() {  # MODEL RATE HOSTS: the whole list where a link is slow, and the rest of the cells for the score
  case $* in
    *" 1gbit 2") echo "data parallel,fp16,powersgd,DiLoCo" ;;
    *" 2") echo "data parallel,fp16,int8,onebit,topk,powersgd,local SGD,DiLoCo" ;;
    *) echo "data parallel,powersgd,DiLoCo" ;;
  esac
}
on_first() { launch/testhosts.sh run h1 .venv/bin/python -m "$@" 2>&1 | grep -v '^[IWE]0000\|^WARNING: All log'; }

for rate in ${HVDKIT_LINKS:-100mbit 10mbit 1gbit}; do
  launch/testhosts.sh up 4 --rate "$rate"
  for model in large_mlp cifar_cnn; do
    read -ra own <<<"${flags[$model]}"
    for hosts in 2 3 4; do
      modes=$(modes_of "$model" "$rate" "$hosts")
      echo "== $model, $hosts hosts, $rate"
      list=h1:1,h2:1,h3:1,h4:1
      list=${list:0:5 * hosts - 1}
      known="$folder/$model-$hosts.json" links="$folder/large_mlp-$rate-$hosts.json"
      common=(--shared-machine --threads 1)
      [[ -f $known ]] || on_first hvdkit.plan --ranks "$hosts" "${common[@]}" --json "$known" -- "${own[@]}" >/dev/null
      [[ $model == large_mlp ]] || common+=(--links "$links")
      on_first hvdkit.plan measure -H "$list" "${common[@]}" --model-from "$known" --modes "$modes" \
        --json "$folder/$model-$rate-$hosts.json" -- "${own[@]}" || failed=1
    done
  done
done
.venv/bin/python -m hvdkit.plan score "$folder"/*-*bit-?.json
exit "$failed"
