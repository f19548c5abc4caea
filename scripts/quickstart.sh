#!/usr/bin/env bash
# Trains a small network on digits with K-FAC on two ranks, setting up first where needed.
#
#   scripts/quickstart.sh [dotted.key=value ...]      such as train.epochs=3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

ranks=2
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"
scripts/mpirun.sh -n "$ranks" .venv/bin/python train.py configs/quickstart.yaml "$@"

cat <<'NEXT'

What to try next:
  scripts/quickstart.sh train.epochs=3 optimizer.learning_rate=0.01
      any key of configs/quickstart.yaml can be changed
  scripts/mpirun.sh -n 4 .venv/bin/python train.py configs/quickstart.yaml batch.per_rank=32
      four ranks
  .venv/bin/python train.py configs/quickstart.yaml --explain
      layers, owners and schedules, without training
  .venv/bin/tensorboard --logdir runs
      the curves of all runs
  configs/cifar10/kfac_resnet20.yaml
      the next larger recipe
NEXT
