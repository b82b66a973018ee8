#!/usr/bin/env bash
# Train on every worker of a Cloud TPU VM slice over gcloud's ssh; JAX finds the coordinator itself:
#   TPU=my-slice ZONE=us-east5-a launch/tpu_vm.sh --config configs/deepseek_v2_lite.py ...
# REPO is this repository on the workers (default deepseek_jax), installed with the extra [tpu].
# The run lives on in tmux when ssh breaks; each worker starts again by itself after a fault.
# DRY_RUN=1 prints the command instead.
set -euo pipefail
: "${TPU:?the name of the TPU VM}" "${ZONE:?its zone}"
repo=${REPO:-deepseek_jax}
train=$(printf '%q ' env JAX_COORDINATOR_ADDRESS=auto HEARTBEAT_DIR=/tmp/heartbeats \
  launch/again.sh python3 -m deepseek_jax.train "$@")
remote="cd $(printf '%q' "$repo") && tmux new-session -d -s train $(printf '%q' "$train 2>&1 | tee -a train.log")"
start=(gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$remote")
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${start[@]}"
  echo
else
  exec "${start[@]}"
fi
