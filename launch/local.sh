#!/usr/bin/env bash
# Start N training processes on this machine, joined over localhost: launch/local.sh N --config ...
set -euo pipefail
count=${1:?how many processes}
shift
export JAX_COORDINATOR_ADDRESS=localhost:${PORT:-9876} JAX_NUM_PROCESSES=$count
for ((rank = 1; rank < count; rank++)); do
  JAX_PROCESS_ID=$rank python -m deepseek_jax.train "$@" &
done
JAX_PROCESS_ID=0 python -m deepseek_jax.train "$@"
wait
