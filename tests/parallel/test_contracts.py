"""Contract at scale: what 512 TPU chips would run of every published model, its depth cut.

The real compiler partitions it (in processes of its own, machine code left out). The program has
the collectives that its parallelism explains and no others, and the partitioner nowhere gave up
("Involuntary full rematerialization", read from file descriptor 2). A sharding that is wrong on
purpose turns both red.
"""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOPOLOGY = "v5p:8x8x8"

# What each axis explains. A part of a mesh that several axes span needs what all of them allow.
SUMS = {"all-reduce", "reduce-scatter"}
WEIGHTS = SUMS | {"all-gather", "all-to-all", "collective-permute"}
ALLOWED = {
    "data": SUMS,  # gradients and counts add up; nothing is gathered
    "slice": SUMS,
    "fsdp": WEIGHTS,  # weights come together, slopes fall apart; look-ups turn rows to columns
    "expert": WEIGHTS | {"ragged-all-to-all"},  # experts too, or their tokens
    "tensor": SUMS | {"all-gather", "collective-permute", "all-to-all"},  # heads and widths
    "context": WEIGHTS,  # keys and values of a row's other parts
}
CUT = ["--model.num-layers=2", "--sequence-length=2048", "--model.remat=full"]
MOE = [*CUT, "--model.num-dense-layers=1"]
CASES = {  # config, flags; the first ones are quick
    "v3": ("deepseek_v3", [*MOE, "--mesh.fsdp=32", "--mesh.expert=16", "--batch-size=512"]),
    "v2 lite": (
        "deepseek_v2_lite", [*MOE, "--mesh.data=4", "--mesh.fsdp=128", "--batch-size=512"]
    ),
}  # fmt: skip
SLOW = {
    "v3 data": (
        "deepseek_v3",
        [*MOE, "--mesh.data=2", "--mesh.fsdp=16", "--mesh.expert=16", "--batch-size=512"],
    ),
    "v32": ("deepseek_v32", [*MOE, "--mesh.fsdp=64", "--mesh.expert=8", "--batch-size=512"]),
    "v2": ("deepseek_v2", [*MOE, "--mesh.fsdp=32", "--mesh.expert=16", "--batch-size=512"]),
    "v2 lite offload": (
        "deepseek_v2_lite",
        [*MOE, "--mesh.fsdp=64", "--mesh.expert=8", "--batch-size=512", "--model.remat=offload"],
    ),
    "moe 16b": ("deepseek_moe_16b", [*MOE, "--mesh.fsdp=128", "--mesh.data=4"]),
}
DENSE = ("qwen_1_5b", "qwen_7b", "qwen_14b", "qwen_32b", "llama_8b", "llama_70b")
SLOW |= {
    name: (f"deepseek_r1_distill_{name}", [*CUT, "--mesh.data=4", "--mesh.fsdp=128"])
    for name in DENSE
}
SLOW["qwen3_8b"] = ("deepseek_r1_0528_qwen3_8b", [*CUT, "--mesh.data=4", "--mesh.fsdp=128"])
SLOW = {name: (config, [*flags, "--batch-size=512"]) for name, (config, flags) in SLOW.items()}


def compiled(config, flags, code=""):
    """The plan of a config on 512 chips; `code` runs before."""
    command = ["--config", f"configs/{config}.py", "--topology", TOPOLOGY, "--quick", "--json"]
    program = f"{code}\nimport sys\nfrom deepseek_jax.plan import main\nmain(sys.argv[1:])"
    # tyro takes the last of two flags
    mesh = [] if any(flag.startswith("--mesh.data") for flag in flags) else ["--mesh.data=1"]
    done = subprocess.run(
        [sys.executable, "-c", program, *command, *mesh, *flags],
        capture_output=True, text=True, timeout=900, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def complaints(found):
    """What a plan's program has that its mesh does not explain."""
    rows = [
        f"{row['kind']} over {row['axes']}"
        for row in found["collectives"]
        if row["bytes"] and not all(row["kind"] in ALLOWED.get(axis, ()) for axis in row["axes"])
    ]
    return rows + found["remarks"]


def check(name, cases):
    config, flags = cases[name]
    found = compiled(config, flags)
    assert found["devices"] == 512
    assert not complaints(found)
    seen = {axis for row in found["collectives"] for axis in row["axes"]}
    assert seen == set(found["mesh"]), "every axis in use is seen, or the others hide nothing"


@pytest.mark.parametrize("name", CASES)
def test_collectives_are_explained(name):
    check(name, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_collectives_of_every_published_model_are_explained(name):
    check(name, SLOW)


def test_every_published_model_is_here():
    published = {path.stem for path in (ROOT / "configs").glob("deepseek_*.py")}
    assert published == {config for config, _ in [*CASES.values(), *SLOW.values()]}


def test_a_bad_sharding_is_found():
    """Widths over the axis that only carries batch: what nothing should gather is gathered."""
    bad = "from deepseek_jax.parallel import sharding\nsharding.WEIGHTS['embed'] = 'data'"
    config, flags = CASES["v2 lite"]
    found = complaints(compiled(config, flags, bad))
    assert "all-gather over ['data']" in found


def test_what_the_partitioner_says_counts():
    rows = [{"kind": "all-reduce", "axes": ["data"], "bytes": 1.0}]
    assert not complaints({"collectives": rows, "remarks": []})
    said = "Involuntary full rematerialization"
    assert complaints({"collectives": rows, "remarks": [said]}) == [said]
    rows[0]["axes"] = ["data", "?"]
    assert complaints({"collectives": rows, "remarks": []}) == ["all-reduce over ['data', '?']"]
