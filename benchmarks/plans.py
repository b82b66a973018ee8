"""Plans of every published model, without the chips: writes docs/plans.md from compiled programs.

    python benchmarks/plans.py            # what docs/plans.json lacks is compiled; minutes
    python benchmarks/plans.py --only v3  # rows whose config has this in its name, anew
    python benchmarks/plans.py --write    # nothing is compiled

Programs are the TPU compiler's own; only machine code is left out (`plan --quick`).
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

from deepseek_jax.monitoring.plans import layout_text

ROOT = pathlib.Path(__file__).resolve().parents[1]
KEPT, TABLE = ROOT / "docs" / "plans.json", ROOT / "docs" / "plans.md"
NARROW = "--optimizer.momentum-dtype=bfloat16 --optimizer.variance-dtype=bfloat16"
FAR = "--optimizer.memory=pinned_host"
HALF = f"{NARROW} --precision.params=bfloat16"
LITE = "--mesh.fsdp=32 --batch-size=128 --sequence-length=4096 --model.remat"
V3 = "--mesh.fsdp=32 --mesh.expert=16 --sequence-length=8192"
PADDED = "--model.moe.exchange.kind=padded"  # tokens go to experts, not weights to tokens
FEW = "--stage=1 --mesh.fsdp=16 --stages.1.batch-size=16 --stages.1.accumulation-steps=1"
SEEING = (
    "--stage=1 --mesh.fsdp=8 --mesh.expert=8 --stages.1.batch-size=64 "
    "--stages.1.accumulation-steps=1 --model.language.moe.exchange.kind=padded"
)
VIT_L = (  # CLIP's, at 336 pixels, instead of SigLIP-SO400M
    "--model.vision.transformer.num-layers=24 --model.vision.transformer.embed-dim=1024 "
    "--model.vision.transformer.mlp-dim=4096 --model.vision.transformer.activation=quick_gelu "
    "--model.vision.image-size 336 336 --model.vision.class-token=True --model.vision.pre-norm=True"
)
ROWS = (  # config, topology, flags
    ("deepseek_r1_distill_qwen_1_5b", "v5e:4x4", "--mesh.fsdp=16 --batch-size=16"),
    ("deepseek_r1_distill_qwen_7b", "v6e:4x8", "--mesh.fsdp=32 --batch-size=32"),
    ("deepseek_r1_distill_llama_8b", "v6e:4x8", "--mesh.fsdp=32 --batch-size=32"),
    ("deepseek_r1_0528_qwen3_8b", "v6e:4x8", "--mesh.fsdp=32 --batch-size=32"),
    ("deepseek_r1_distill_qwen_14b", "v6e:8x8", "--mesh.fsdp=64 --batch-size=64"),
    ("deepseek_r1_distill_qwen_32b", "v5p:4x4x4", "--mesh.fsdp=64 --batch-size=128"),
    ("deepseek_r1_distill_llama_70b", "v5p:4x4x8",
     "--mesh.fsdp=128 --batch-size=256 --model.remat=full"),
    ("deepseek_moe_16b", "v5p:2x4x4", "--mesh.fsdp=32 --batch-size=128 --model.remat=full"),
    ("deepseek_v2_lite", "v5p:2x4x4", f"{LITE}=full"),
    ("deepseek_v2_lite", "v5p:2x4x4", f"{LITE}=offload"),
    ("deepseek_v2_lite", "v5p:2x4x4", f"{LITE}=offload {NARROW}"),
    ("deepseek_v2_lite", "v5p:2x4x4", f"{LITE}=offload {FAR}"),
    ("deepseek_v2_lite", "v5p:2x4x4",
     "--mesh.fsdp=4 --mesh.context=8 --batch-size=4 --sequence-length=131072 --model.remat=full"),
    ("deepseek_v2", "v5p:4x8x8",
     f"--mesh.fsdp=32 --mesh.expert=8 --batch-size=512 --model.remat=full {NARROW}"),
    ("deepseek_v3", "v5p:8x8x8", f"{V3} --batch-size=2048 --model.remat=full {NARROW}"),
    ("deepseek_v3", "v5p:8x8x8", f"{V3} --batch-size=2048 --model.remat=offload {NARROW}"),
    ("deepseek_v3", "v5p:8x8x8", f"{V3} --batch-size=4096 --model.remat=offload {NARROW}"),
    ("deepseek_v3", "v5p:8x8x8", f"{V3} --batch-size=4096 --model.remat=offload {HALF}"),
    ("deepseek_v3", "v5p:8x8x8", f"{V3} --batch-size=4096 --model.remat=offload {NARROW} {FAR}"),
    ("deepseek_v32", "v5p:8x8x8",
     "--stage=1 --mesh.fsdp=32 --mesh.expert=16 --sequence-length=4096 --batch-size=512 "
     f"--model.remat=offload {PADDED}"),
    ("deepseek_v3", "tpu7x:4x8x8",
     "--mesh.fsdp=32 --mesh.expert=16 --sequence-length=4096 --batch-size=512 "
     f"--model.remat=full {NARROW} {PADDED}"),
    ("janus_pro_1b", "v5e:4x4", FEW),
    ("deepseek_vl2_tiny", "v5e:4x4", FEW),
    ("deepseek_vl2_base", "v5p:4x4x4", SEEING),
    ("deepseek_vl2_small", "v5e:8x8", SEEING),
    ("deepseek_vl2_small", "v5e:8x8", f"{SEEING} {VIT_L}"),
)  # fmt: skip
HEAD = (
    "config", "topology", "devices", "mesh", "batch x tokens", "remat", "parameters", "moments",
    "arguments", "temporaries", "total", "of", "on the host", "bound", "s a step", "MFU",
    "compiled, s",
)  # fmt: skip


def main():
    """Compile what is missing, one program at a time; then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="compile these anew")
    parser.add_argument("--write", action="store_true", help="compile nothing")
    own = parser.parse_args()
    known = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for config, topology, flags in () if own.write else ROWS:
        key = f"{config} {topology} {flags}"
        if key in known and not (own.only and own.only in config):
            continue
        if own.only and own.only not in config:
            continue
        known[key] = planned(config, topology, flags)
        print(row(known[key]), flush=True)
        KEPT.write_text(json.dumps(known, indent=1) + "\n")
        write(known)
    write(known)


def planned(config, topology, flags):
    """The command's own answer."""
    command = [sys.executable, "-m", "deepseek_jax.plan", "--config", f"configs/{config}.py"]
    command += ["--topology", topology, "--quick", "--json", "--mesh.data=1", *flags.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def row(one):
    """A plan as a line of the table."""
    m = {name: f"{size / 1e9:.1f}" for name, size in one["memory"].items()}
    total = max(one["memory"]["total"], one["refused_bytes"]) / 1e9
    fits = one["fits"]
    rows = f"{one['batch_size']:,} x {one['sequence_length']:,}"
    cells = (
        one["config"], one["topology"], one["devices"],
        layout_text(one), rows, one["remat"],
        one["params_dtype"], ", ".join(dict.fromkeys(one["moments"])),
        m["arguments"], m["temporaries"], f"{total:.1f}" if fits else f"**{total:.1f}**",
        f"{one['memory_limit'] / 1e9:.1f}", m["host"], one.get("bound", "does not fit"),
        f"{one['step_seconds']:.2f}" if fits else "", f"{one['mfu']:.1%}" if fits else "",
        f"{one['compile_seconds']:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def write(known):
    """docs/plans.md, in the order of ROWS."""
    rows = [known[key] for key in (" ".join(one) for one in ROWS) if key in known]
    versions = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format=json"], capture_output=True, text=True
    )
    found = {p["name"]: p["version"] for p in json.loads(versions.stdout or "[]")}
    TABLE.write_text(
        "# Plans\n\n"
        "Written by `python benchmarks/plans.py`: training steps compiled by the TPU compiler of "
        f"libtpu {found.get('libtpu', '?')} with jax {found.get('jax', '?')}, without the chips. "
        "GB (10^9 bytes) a device; bold: it does not fit. Seconds and MFU are what a step cannot "
        "beat by published figures, no measurement. Router bias balancing, the sequence loss and, "
        "where the model has them, MTP layers are on. V3.2, VL2 and Janus-Pro are planned in their "
        "second stage, VL2-small twice: with its own encoder, and with CLIP's ViT-L/14 at 336 "
        "pixels. Where no exchange is named, experts' weights come to the tokens.\n\n"
        f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}\n" + "\n".join(map(row, rows)) + "\n"
    )


if __name__ == "__main__":
    main()
