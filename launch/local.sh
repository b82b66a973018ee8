#!/usr/bin/env bash
# Train with N processes on this machine, restarted when one dies or hangs:
#   launch/local.sh N --config configs/quickstart.py ...
# DRY_RUN=1 prints what each process would run. Exit codes: see supervise.py.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec python "$root/launch/supervise.py" "$@"
