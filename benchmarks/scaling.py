"""DeepSeek-V3 from 128 to 4,096 chips, planned: step, MFU and what is left of the efficiency.

    python benchmarks/scaling.py

The batch stays (4,096 rows of 4,096 tokens), so a chip's part shrinks as chips are added; where it
is too large it goes in several parts. Tokens go to the experts: weights that come to the tokens
would be most of what 1,024 chips and more send. Plans are kept in docs/scaling.json: delete a line
to compile it again. Draws docs/scaling.png.
"""

import json
import os
import pathlib
import subprocess
import sys

from deepseek_jax.monitoring.plans import draw_scaling, mesh_text

ROOT = pathlib.Path(__file__).resolve().parents[1]
KEPT, PICTURE = ROOT / "docs" / "scaling.json", ROOT / "docs" / "scaling.png"
HALF = ("--precision.params=bfloat16",)  # or they would not fit
SHAPES = {  # chips: topology, fsdp, expert, parts of a step's batch, more flags
    128: ("v5p:4x4x8", 8, 16, 16, HALF),
    256: ("v5p:4x8x8", 16, 16, 8, HALF),
    512: ("v5p:8x8x8", 32, 16, 2, ()),
    1024: ("v5p:8x8x16", 64, 16, 1, ()),
    2048: ("v5p:8x16x16", 64, 32, 1, ()),
    4096: ("v5p:16x16x16", 64, 64, 1, ()),
}
FLAGS = (
    "--quick --json --mesh.data=1 --batch-size=4096 --sequence-length=4096 --model.remat=offload "
    "--optimizer.momentum-dtype=bfloat16 --optimizer.variance-dtype=bfloat16 "
    "--optimizer.memory=pinned_host --model.moe.exchange.kind=padded"
)


def main():
    """Compile what is missing, print the table, draw the curve."""
    known = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for chips, (topology, fsdp, expert, parts, more) in SHAPES.items():
        if str(chips) in known:
            continue
        command = [sys.executable, "-m", "deepseek_jax.plan", "--config", "configs/deepseek_v3.py"]
        command += ["--topology", topology, *FLAGS.split(), *more, f"--mesh.fsdp={fsdp}"]
        command += [f"--mesh.expert={expert}", f"--accumulation-steps={parts}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        if done.returncode not in (0, 1):
            raise SystemExit(done.stderr)
        known[str(chips)] = json.loads(done.stdout)
        KEPT.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{chips} chips compiled in {known[str(chips)]['compile_seconds']:.0f} s", flush=True)
    plans = [known[str(chips)] for chips in SHAPES]
    rows = [
        "| chips | mesh | parts | GB a chip | bound | s a step | of network | MFU | tokens/s | "
        "efficiency |",
        "|---" * 10 + "|",
    ]
    for one, left in zip(plans, draw_scaling(plans, PICTURE), strict=True):
        mesh = mesh_text(one["mesh"])
        total = one["memory"]["total"] / 1e9
        if not one["fits"]:
            rows.append(f"| {one['devices']} | {mesh} | {one['accumulation_steps']} | "
                        f"{total:.1f}: does not fit | | | | | | |")  # fmt: skip
            continue
        rows.append(
            f"| {one['devices']:,} | {mesh} | {one['accumulation_steps']} | {total:.1f} | "
            f"{one['bound']} | {one['step_seconds']:.2f} | "
            f"{one['bound_seconds']['network']:.2f} | {one['mfu']:.1%} | "
            f"{one['tokens'] / one['step_seconds']:,.0f} | {left:.0%} |"
        )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
