#!/usr/bin/env bash
# Fill in gke_jobset.yaml from the environment and the arguments, and hand it to the cluster:
#   NAME=v2-lite IMAGE=... ACCELERATOR=tpu-v5p-slice TOPOLOGY=2x4x4 HOSTS=8 CHIPS=4 CLAIM=runs \
#     launch/gke.sh --config configs/deepseek_v2_lite.py --run-dir /runs/v2-lite
# HOSTS and CHIPS: hosts of a slice and chips of a host; SLICES (1) and RESTARTS (50) have defaults.
# DRY_RUN=1 prints the manifest instead; `| kubectl apply --dry-run=server -f -` then checks it.
set -euo pipefail
export SLICES=${SLICES:-1} RESTARTS=${RESTARTS:-50}
fill='
import json, os, re, string, sys
values = os.environ | {"ARGUMENTS": json.dumps(sys.argv[2:])}
text = open(sys.argv[1]).read()
missing = sorted({name for name in re.findall(r"\$\{(\w+)\}", text) if not values.get(name)})
if missing:
    sys.exit("error: set " + ", ".join(missing))
print(string.Template(text).substitute(values), end="")
'
manifest=$(python3 -c "$fill" "$(dirname "$0")/gke_jobset.yaml" "$@") || exit 2
if [[ -n ${DRY_RUN:-} ]]; then
  echo "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
