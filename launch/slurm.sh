#!/usr/bin/env bash
#SBATCH --job-name=hvdkit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#
# Trains on the nodes of a Slurm job, with one rank per task. srun starts the ranks, so no node needs an ssh key. Submit
# from the checkout, which all nodes must see at the same path:
#
#   sbatch launch/slurm.sh --model=resnet --dataset=cifar10 --data-dir=DIR --workdir=DIR
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --time=4:00:00 launch/slurm.sh ...
#
# Two minutes before the time limit, or when preempted, the run saves, is queued again, and resumes from where it was.
# Without --workdir it writes to runs/slurm-JOBID. All flags are those of launch/local.sh.
set -euo pipefail

die() { printf 'slurm.sh: %s\n' "$*" >&2; exit 2; }

[[ ${SLURM_JOB_ID:-} ]] || die "this script runs inside a Slurm job; submit it with: sbatch launch/slurm.sh"
root=${HVDKIT_HOME:-$SLURM_SUBMIT_DIR}  # Slurm runs a copy of this file in another folder
[[ -x $root/launch/local.sh ]] || die "$root has no launch/local.sh; submit from the checkout, or set HVDKIT_HOME to it"
[[ " $*" == *' --workdir'* ]] || set -- "$@" "--workdir=$root/runs/slurm-$SLURM_JOB_ID"

cd "$root"
launch/local.sh --hosts-from slurm "$@" &
launcher=$!
told=''
trap 'told=yes; kill -USR1 "$launcher" || :' USR1  # it may just have ended
trap 'told=yes; kill -TERM "$launcher" || :' TERM
while :; do  # a signal interrupts `wait`
  told='' code=0
  wait "$launcher" || code=$?
  [[ $told ]] || break
done
trap '' USR1 TERM  # scontrol requeue also ends this script

# 85: saved. 128 + 10 (USR1): the signal came before there was anything to save.
if ((code == 85 || code == 138)); then
  echo "slurm.sh: stop requested; the run is queued again and resumes from its last checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
