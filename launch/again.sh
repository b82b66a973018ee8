#!/usr/bin/env bash
# Run a training command until it is complete (exit code 0), refuses its input (2) or was asked to
# stop (130, 143); anything else is a fault, after which it is run again, RESTARTS times at most:
#   launch/again.sh python -m deepseek_jax.train --config ...
set -uo pipefail
trap 'kill -TERM "$child" 2>/dev/null' TERM INT
for ((left = ${RESTARTS:-50}; ; left--)); do
  "$@" &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the child
    wait "$child"
    code=$?
  done
  case $code in 0 | 2 | 130 | 143) exit "$code" ;; esac
  ((left > 0)) || exit "$code"
  echo "again.sh: exit code $code; starting again" >&2
  sleep "${PAUSE:-5}"
done
