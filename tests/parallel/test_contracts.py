"""Contract at scale: what 512 TPU chips would run of every published model, its depth cut.

The real compiler partitions it (in a process of its own, machine code left out). The program has
the collectives that its parallelism explains and no others, and the partitioner nowhere gave up
("Involuntary full rematerialization", read from file descriptor 2). A sharding that is wrong on
purpose turns both red. A mesh with slices is 2 of 256 chips.
"""

import functools
import json
import pathlib
import subprocess
import sys

import pytest

from deepseek_jax.parallel.pipeline import Pipeline

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOPOLOGY, SLICES = "v5p:8x8x8", "v5p:4x8x8@2"

# What each axis explains, and why. A part of a mesh that several axes span needs what all allow.
SUMS = {
    "all-reduce": "slopes, counts and losses add up",
    "reduce-scatter": "and each device keeps its own part of a weight's slope",
}
MOVES = {"collective-permute": "parts change hands where the layouts of two operations meet"}
ALLOWED = {
    "data": SUMS,  # nothing is gathered
    "slice": {"all-reduce": SUMS["all-reduce"]},  # the slow network has nothing else to do
    "fsdp": SUMS | MOVES | {
        "all-gather": "weights come together; tokens, for their group to look up",
        "all-to-all": "looked-up rows turn from some columns of all tokens to all of some",
    },
    "expert": SUMS | MOVES,  # and what the exchange explains
    "tensor": {"all-reduce": "parts of products over split heads, widths and vocabulary add up"},
    "context": {
        "all-reduce": SUMS["all-reduce"],
        "collective-permute": "keys and values go around the ring; rows turn zigzag and back",
    },
    "stage": SUMS | {
        "collective-permute": "a microbatch goes on to the next stage, its slope to the one before",
        "all-to-all": "once a step weights turn from widths to whole layers, and slopes back",
        "all-gather": "columns of embedded tokens, of which every stage looks up its own; an MTP "
        "layer, which every stage computes",
    },
}  # fmt: skip
EXCHANGES = {  # what they add to the axes over which experts lie
    "none": {"all-gather": "experts come to the tokens"},
    "ring": {"all-gather": "all tokens of the axis come to every expert"},
    "padded": {"all-to-all": "tokens go to the devices of their experts, and back"},
    "ragged": {
        "ragged-all-to-all": "the same without padding",
        "all-to-all": "and where their slopes go: numbers",
    },
    "two_hop": {"all-to-all": "tokens go to the slices of their experts, then to the devices"},
}
BY_SLICE = {"all-gather": "what slices have added up, each device a part, is whole again"}
PAIRS = {  # what a contrastive loss adds
    "data": {"collective-permute": "captions' vectors go around the ring of all batch shards"},
    "tensor": {"all-gather": "the few columns of a pair's vectors come together to be compared"}
    | SUMS,
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
STAGES = [*CUT[1:], "--model.num-dense-layers=1", "--model.num-layers=4"]
LITE, PARTS = "deepseek_v2_lite", "--accumulation-steps=4"
KIND = "--model.moe.exchange.kind="
SLOW |= {
    "stages fsdp": (LITE, [*STAGES, "--mesh.stage=4", "--mesh.fsdp=128", PARTS]),
    "stages data expert": (LITE, [
        *STAGES, "--mesh.stage=4", "--mesh.data=8", "--mesh.fsdp=1", "--mesh.expert=16", PARTS,
        KIND + "padded",
    ]),
    "stages interleaved": (LITE, [
        *STAGES, "--mesh.stage=2", "--mesh.stage-chunks=2", "--mesh.fsdp=256",
        "--accumulation-steps=2",
    ]),
    "stages context": (LITE, [
        *MOE, "--mesh.stage=2", "--mesh.context=4", "--mesh.fsdp=64", PARTS
    ]),
    "stages tensor": ("deepseek_r1_distill_llama_8b", [
        *CUT, "--mesh.stage=2", "--mesh.tensor=4", "--mesh.fsdp=64", PARTS
    ]),
    "slices": (LITE, [*MOE, "--mesh.slice=2", "--mesh.fsdp=32", "--mesh.expert=8"]),
    "slices two_hop": (LITE, [
        *MOE, "--mesh.slice=2", "--mesh.fsdp=32", "--mesh.expert=8", KIND + "two_hop"
    ]),
    "context dense": ("deepseek_r1_0528_qwen3_8b", [*CUT, "--mesh.context=8", "--mesh.fsdp=64"]),
    "context moe": (LITE, [*MOE, "--mesh.context=8", "--mesh.fsdp=8", "--mesh.expert=8"]),
    "tensor dense": ("deepseek_r1_distill_llama_70b", [*CUT, "--mesh.tensor=8", "--mesh.fsdp=64"]),
    "tensor moe": (LITE, [*MOE, "--mesh.tensor=4", "--mesh.fsdp=16", "--mesh.expert=8"]),
}  # fmt: skip
SLOW |= {
    kind: (LITE, [*MOE, "--mesh.fsdp=64", "--mesh.expert=8", KIND + kind])
    for kind in ("ring", "padded", "ragged")
}
DENSE = ("qwen_1_5b", "qwen_7b", "qwen_14b", "qwen_32b", "llama_8b", "llama_70b")
SLOW |= {
    name: (f"deepseek_r1_distill_{name}", [*CUT, "--mesh.data=4", "--mesh.fsdp=128"])
    for name in DENSE
}
SLOW["qwen3_8b"] = ("deepseek_r1_0528_qwen3_8b", [*CUT, "--mesh.data=4", "--mesh.fsdp=128"])
SEEING = [  # all parts learn
    "--stage=1", "--stages.1.batch-size=512", "--stages.1.accumulation-steps=1",
    "--sequence-length=2048", "--model.language.num-layers=2",
    "--model.language.num-dense-layers=1", "--model.vision.transformer.num-layers=2",
]  # fmt: skip
SLOW |= {
    "vl2 small": ("deepseek_vl2_small", [*SEEING, "--mesh.fsdp=64", "--mesh.expert=8"]),
    "vl2 tiny": ("deepseek_vl2_tiny", [*SEEING, "--mesh.data=4", "--mesh.fsdp=128"]),
    "vl2 base": ("deepseek_vl2_base", [*SEEING, "--mesh.fsdp=128", "--mesh.expert=4"]),
}
SLOW = {name: (config, [*flags, "--batch-size=512"]) for name, (config, flags) in SLOW.items()}


PLANNER = """
import json, os, signal, sys, traceback
from deepseek_jax.plan import main
for line in sys.stdin:
    if not (child := os.fork()):
        try:
            signal.alarm(900)
            main(json.loads(line))  # which ends the process
        finally:
            traceback.print_exc()
            os._exit(3)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def planner():
    """What plans, a command line each, in a child that has imported everything already."""
    return subprocess.Popen(
        [sys.executable, "-c", PLANNER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def stopped():
    yield
    if planner.cache_info().currsize:
        planner().kill()
        planner().communicate()


def compiled(config, flags, code="", topology=None):
    """The plan of a config on 512 chips; where `code` runs before, in a process of its own."""
    slices = any(flag.startswith("--mesh.slice") for flag in flags)
    topology = topology or (SLICES if slices else TOPOLOGY)
    command = ["--config", f"configs/{config}.py", "--topology", topology, "--quick", "--json"]
    # tyro takes the last of two flags
    mesh = [] if any(flag.startswith("--mesh.data") for flag in flags) else ["--mesh.data=1"]
    asked = json.dumps([*command, *mesh, *flags])
    if code:
        done = subprocess.run(
            [sys.executable, "-c", code + PLANNER],
            input=asked, capture_output=True, text=True, timeout=900, cwd=ROOT,
        )  # fmt: skip
        answers = done.stdout.splitlines()
    else:
        planner().stdin.write(asked + "\n")
        planner().stdin.flush()
        answers = [planner().stdout.readline()]
        answers += [planner().stdout.readline()] if answers[0].startswith("{") else []
    assert len(answers) == 2 and int(answers[1]) == 0, answers
    return json.loads(answers[0])


def complaints(found, exchange="none", more=None):
    """What a plan's program has that its mesh and its exchange do not explain."""

    def explained(kind, axis):
        kinds = {*ALLOWED.get(axis, ())}
        if axis == "expert" or (axis == "slice" and exchange == "two_hop"):
            kinds |= {*EXCHANGES[exchange]}
        kinds |= {*(more or {}).get(axis, ())}
        if "slice" in found["mesh"] and axis != "slice":
            kinds |= {*BY_SLICE}
        return kind in kinds

    rows = [
        f"{row['kind']} over {row['axes']}"
        for row in found["collectives"]
        if row["bytes"] and not all(explained(row["kind"], axis) for axis in row["axes"])
    ]
    return rows + found["remarks"]


def check(name, cases):
    config, flags = cases[name]
    found = compiled(config, flags)
    assert found["devices"] == 512
    kinds = [flag.removeprefix(KIND) for flag in flags if flag.startswith(KIND)]
    assert not complaints(found, *kinds)
    seen = {axis for row in found["collectives"] for axis in row["axes"]}
    assert seen == set(found["mesh"]), "every axis in use is seen, or the others hide nothing"
    if "stage" in seen:
        chunks = 2 if "--mesh.stage-chunks=2" in flags else 1
        pipeline = Pipeline(found["mesh"]["stage"], chunks, found["accumulation_steps"])
        (handed_on,) = (
            row["count"]
            for row in found["collectives"]
            if (row["kind"], row["axes"]) == ("collective-permute", ["stage"])
        )
        passes = 2 * pipeline.turns / (1 - pipeline.bubble)
        # Of a last loop of one round nobody reads what it hands on, and the compiler sees that.
        assert handed_on == pytest.approx(passes - (pipeline.delay == 1))


@pytest.mark.parametrize("name", CASES)
def test_collectives_are_explained(name):
    check(name, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_collectives_of_every_published_model_are_explained(name):
    check(name, SLOW)


@pytest.mark.slow
def test_sums_between_stages_are_not_split_by_width():
    """On this mesh XLA would split a block's sums along tensor, and gather them again."""
    flags = [
        "--model.num-layers=4", "--sequence-length=2048", "--batch-size=32",
        "--accumulation-steps=8", "--mesh.stage=2", "--mesh.fsdp=4", "--mesh.tensor=2",
    ]  # fmt: skip
    found = compiled("deepseek_r1_distill_llama_8b", flags, topology="v5p:2x2x4")
    moved = {r["kind"]: r["bytes"] for r in found["collectives"] if r["axes"] == ["tensor"]}
    assert moved.pop("all-gather", 0) < sum(moved.values()) / 8


@pytest.mark.slow
def test_collectives_of_pairs_are_explained():
    mesh = ["--mesh.data=4", "--mesh.fsdp=32", "--mesh.tensor=4", "--batch-size=8192"]
    found = compiled("multimodal_quickstart", mesh)
    assert found["devices"] == 512
    assert complaints(found), "the ring is there"
    assert not complaints(found, more=PAIRS)


MESH = ["--mesh.data=8", "--mesh.fsdp=64", "--batch-size=512"]
OTHERS = {
    "digits": ("audio_visual_digits", MESH),
    "speech": ("speech_quickstart", MESH),
    "three stages": ("vlm_three_stages", MESH),
    "all senses": ("omni_tiny", MESH),
    "questions": ("vqa_tiny", MESH),
    "janus": ("janus_pro_1b", [
        *MESH, "--stage=2", "--stages.2.batch-size=512", "--stages.2.accumulation-steps=1",
        "--sequence-length=2048", "--model.language.num-layers=2",
        "--model.vision.transformer.num-layers=2",
    ]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_collectives_of_what_sees_and_hears_are_explained(name):
    check(name, OTHERS)


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
    found = {"mesh": {"data": 2}, "collectives": rows, "remarks": []}
    assert not complaints(found)
    said = "Involuntary full rematerialization"
    assert complaints(found | {"remarks": [said]}) == [said]
    rows[0]["axes"] = ["data", "?"]
    assert complaints(found) == ["all-reduce over ['data', '?']"]


@pytest.mark.parametrize(
    ("kind", "axis", "exchange", "explained"),
    [
        ("all-to-all", "expert", "padded", True),
        ("all-to-all", "expert", "none", False),
        ("ragged-all-to-all", "expert", "padded", False),
        ("all-to-all", "slice", "two_hop", True),
        ("all-gather", "slice", "two_hop", False),
        ("all-gather", "tensor", "none", False),
    ],
)
def test_an_exchange_explains_its_own(kind, axis, exchange, explained):
    rows = [{"kind": kind, "axes": [axis], "bytes": 1.0}]
    found = {"mesh": {axis: 2}, "collectives": rows, "remarks": []}
    assert bool(complaints(found, exchange)) is not explained
