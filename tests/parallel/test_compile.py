"""Contract: what is read from compiled programs; the texts are XLA's own ways of writing them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.core.errors import InputError
from deepseek_jax.parallel.chips import chip
from deepseek_jax.parallel.compile import (
    Collective,
    collectives,
    compile_program,
    memory_of,
    needed_bytes,
)
from deepseek_jax.parallel.manual import gathered, per_device
from deepseek_jax.parallel.mesh import MeshShape, make_mesh
from deepseek_jax.training.planning import network_seconds

GROUPS = {
    "listed": ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("expert",)),
    "strided": ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("fsdp",)),
    "all": ("replica_groups={}", ("fsdp", "expert")),
    "iota": ("replica_groups=[2,4]<=[8]", ("expert",)),
    "turned": ("replica_groups=[4,2]<=[2,4]T(1,0)", ("fsdp",)),
    "named": ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ("expert",)),
    "parts": ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("expert",)),
    "none": ("replica_groups={{0,5},{1,4},{2,7},{3,6}}", ("?",)),
}
PROGRAM = """HloModule step
%loop_body (p: f32[4]) -> f32[4] {{
  %g = {line}
}}
%loop_condition (p: f32[4]) -> pred[] {{
  %n = s32[]{{:T(128)}} constant(26)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}}
ENTRY %main (x: f32[4]) -> f32[4] {{
  %w = f32[4] while(%x), condition=%loop_condition, body=%loop_body
  %dead = f32[8]{{0}} all-gather-done(%y)
}}
"""


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshShape(data=1, fsdp=2, expert=4))


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_are_named_by_their_axes_and_loops_count(groups, mesh):
    text, axes = GROUPS[groups]
    line = f"bf16[1000]{{0:T(8,128)(2,1)}} all-to-all(%x), {text}, dimensions={{0}}"
    (found,) = collectives(PROGRAM.format(line=line), mesh)
    size = {("expert",): 4, ("fsdp",): 2, ("?",): 2}.get(axes, 8)
    size = 2 if groups == "parts" else size
    assert found == Collective("all-to-all", axes, 26, pytest.approx(26 * 2000 * (1 - 1 / size)))


def test_groups_of_a_turned_grid_are_in_its_order():
    cube = make_mesh(MeshShape(data=2, fsdp=2, expert=2))
    line = "f32[8] all-reduce(%x), replica_groups=[2,4]<=[2,2,2]T(2,0,1)"
    (found,) = collectives(PROGRAM.format(line=line), cube)
    assert found.axes == ("data", "fsdp")


def test_loops_whose_end_is_no_constant_count_nothing(mesh):
    text = PROGRAM.format(line="f32[8] all-reduce(%x), replica_groups={}")
    assert collectives(text, mesh)
    assert not collectives(text.replace("constant(26)", "parameter(0)"), mesh)


def test_a_partitioner_that_gives_up_is_heard():
    cube = make_mesh(MeshShape(data=2, fsdp=2, expert=2))
    rows = NamedSharding(cube, PartitionSpec(("data", "fsdp", "expert")))

    def bent(x):
        x = jnp.roll(x, 1, 0).reshape(6, 4)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, ("data", "fsdp")))

    with jax.set_mesh(cube):
        lowered = jax.jit(bent).lower(jax.ShapeDtypeStruct((24,), np.float32, sharding=rows))
        (remark,) = compile_program(lowered, cube).remarks
    assert "Involuntary full rematerialization" in remark


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        ("f32[100]{0} all-reduce(%x), replica_groups=[2,4]<=[8]", "all-reduce", 600),
        ("(f32[100]{0}, f32[60]) all-reduce(%x, %y), replica_groups=[2,4]<=[8]", "all-reduce", 960),
        ("f32[25]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8]", "reduce-scatter", 300),
        ("(f32[25], f32[100]) all-gather-start(%x), replica_groups=[2,4]<=[8]", "all-gather", 300),
        (
            "(u8[50], u8[50], u32[], u32[]) collective-permute-start(%x), "
            "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
            "collective-permute",
            50,
        ),
    ],
)
def test_bytes_are_what_a_ring_sends(line, kind, sent, mesh):
    (found,) = collectives(PROGRAM.format(line=line), mesh)
    assert found == Collective(kind, ("expert",), 26, pytest.approx(26 * sent))


def test_what_sparse_cores_do_beside_counts(mesh):
    """There a collective's computation is called by a custom call's name for it."""
    line = "f32[100] custom-call(%x), called_computations={{%far.1}}, frontend_attributes={{a=1}}"
    head, rest = PROGRAM.format(line=line.format()).split("\n", 1)
    body = "%far.1 (i: f32[25]) -> f32[100] {\n  ROOT %r = f32[100]{0} all-gather(%i), "
    body += 'replica_groups=[2,4]<=[8], dimensions={0}\n}, execution_thread="sparsecore"'
    (found,) = collectives(f"{head}\n{body}\n{rest}", mesh)
    assert found == Collective("all-gather", ("expert",), 26, pytest.approx(26 * 300))


def test_what_a_tpu_scatters_is_half_of_a_sum(mesh):
    """Its program says so by a name around an all-reduce of the whole."""
    line = "f32[25]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.7"
    head, rest = PROGRAM.format(line=line).split("\n", 1)
    body = "%all-reduce-scatter.7 (i: f32[100]) -> f32[25] {{\n  {}\n}}".format(
        "%r = f32[100]{0} all-reduce(%i), replica_groups=[2,4]<=[8], to_apply=%add"
    )
    (found,) = collectives(f"{head}\n{body}\n{rest}", mesh)
    assert found == Collective("reduce-scatter", ("expert",), 26, pytest.approx(26 * 300))


SENT = (
    "  %s = (f32[10,10]{{1,0:T(8,128)}}, u32[]{{:S(2)}}, token[]) {op}(%x, %y), channel_id=7, "
    'is_host_transfer=true, frontend_attributes={{_xla_megascale_target="{{1,2}}x{{0:1}}",'
    '_xla_megascale_transfer_type="{kind}"}}'
)


@pytest.mark.parametrize(
    ("said", "kind", "bytes"),
    [
        ("ALL_REDUCE", "all-reduce", 600),  # of 400 bytes, by a ring of 4
        ("ALL_GATHER", "all-gather", 1200),  # to each of 3
        ("ALL_TO_ALL", "all-to-all", 300),
        ("REDUCE_SCATTER", "reduce-scatter", 300),
        ("ONE_TO_ONE", "collective-permute", 400),
    ],
)
def test_a_program_of_several_slices_is_one_slices(said, kind, bytes):
    """Its groups join devices of a slice; what goes to others is handed to the host."""
    mesh = SimpleNamespace(shape={"slice": 4, "fsdp": 2}, size=8)
    groups = "f32[50]{0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}"
    head, rest = PROGRAM.format(line=groups).split("\n", 1)
    lines = [SENT.format(op=op, kind=said) for op in ("send", "recv")]
    rest = rest.replace("  %g =", "\n".join([*lines, "  %g ="]))
    found = collectives(f"{head}, num_partitions=2\n{rest}", mesh)
    near = Collective("all-gather", ("fsdp",), 26, 26 * 100.0)
    assert {*found} == {near, Collective(kind, ("slice",), 26, 26.0 * bytes)}


def test_a_real_programs_collectives_and_memory(mesh):
    """Three layers in a loop: each gathers its weight forward and reduces its slope backward."""
    spec = PartitionSpec("expert")

    def loss(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ gathered(w, spec)), None

        return jax.lax.scan(layer, x, weights)[0].sum()[None]

    rows = PartitionSpec(("fsdp", "expert"))
    whole = per_device(loss, (PartitionSpec(None, "expert"), rows), rows)
    weights = jax.ShapeDtypeStruct(
        (3, 64, 64), np.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "expert"))
    )
    x = jax.ShapeDtypeStruct((16, 64), np.float32, sharding=NamedSharding(mesh, rows))
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(lambda w, x: whole(w, x).sum())).lower(weights, x)
        program = compile_program(lowered, mesh)
    by_kind = {(row.kind, row.axes): row for row in program.collectives}
    gather = by_kind["all-gather", ("expert",)]
    assert gather.count in (3, 6)  # kept for the backward pass, or made again
    assert gather.bytes == gather.count * 64 * 64 * 4 * 3 / 4
    scattered = [row for key, row in by_kind.items() if key[0] != "all-gather"]
    assert {row.axes for row in scattered} >= {("fsdp",), ("expert",)}
    assert program.memory["arguments"] == 3 * 64 * 64 * 4 // 4 + 2 * 64 * 4
    assert not program.refusal


def test_chips_without_figures_are_refused():
    with pytest.raises(InputError, match="no figures"):
        chip("Abacus")


@pytest.mark.parametrize(
    ("said", "bytes"),
    [
        ("the total memory required for HLO temporaries (1.5G) exceeds available HBM (1G).", 1.5),
        ("Ran out of memory in memory space hbm. Used 117.94G of 95.74G hbm.", 117.94),
        ("Used 512M of 256M hbm", 0.5),
        ("something else entirely", 0),
    ],
)
def test_what_a_refusal_needs_is_in_its_words(said, bytes):
    assert needed_bytes(said) == int(bytes * 2**30)


def test_bytes_of_a_buffer_assignment():
    """Arguments that results replace count once; vector memory, constants and registers do not."""
    text = """BufferAssignment:
allocation 0: size 1000, page 0, parameter 0, shape |f32[250]| at ShapeIndex {}, maybe-live-out:
 value: <0 x> (size=1000,offset=0): f32[250]
allocation 1: size 300, page 0, parameter 1, shape |f32[75]| at ShapeIndex {}:
allocation 2: size 50, page 0, maybe-live-out:
allocation 3: size 7000, page 0, preallocated-temp:
allocation 4: size 9, page 0, thread-local:
allocation 5: size 8, page 0, constant:
allocation 6: size 600, page 0, color 5, preallocated-temp:
allocation 7: size 6, page 0, color 1, preallocated-temp:
"""
    assert memory_of(text) == {
        "arguments": 1300, "outputs": 1050, "aliased": 1000, "temporaries": 7000, "code": 0,
        "total": 8350, "host": 600,
    }  # fmt: skip
    assert memory_of("") == {}


def test_a_quick_program_is_the_same_but_for_machine_code(mesh):
    """In a thread that goes on: a plain program is soon done."""
    x = jax.ShapeDtypeStruct(
        (16, 64), np.float32, sharding=NamedSharding(mesh, PartitionSpec(("fsdp", "expert")))
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda x: jnp.tanh(x @ x.T).sum()).lower(x)
        whole, quick = (compile_program(lowered, mesh, quick=quick) for quick in (False, True))
    assert quick.collectives == whole.collectives
    assert quick.memory["arguments"] == whole.memory["arguments"] == 2 * 64 * 4


SIZES = {"slice": 2, "stage": 1, "data": 1, "fsdp": 4, "context": 1, "expert": 2, "tensor": 1}


@pytest.mark.parametrize(
    ("kind", "axes", "domain", "fast", "slow"),
    [
        ("all-reduce", ("fsdp",), 0, 700.0, 0.0),
        ("all-reduce", ("slice",), 0, 0.0, 700.0),  # all that a device sends
        ("all-reduce", ("slice", "fsdp"), 0, 600.0, 100.0),  # first among 4 neighbors
        ("all-to-all", ("slice", "fsdp"), 0, 300.0, 400.0),  # 4 of 7 partners are far
        ("all-reduce", ("fsdp",), 4, 700 * 2 / 3, 700 / 3),  # 2 x 2 a domain: fsdp spans 2 of them
        ("all-reduce", ("expert",), 4, 700.0, 0.0),
    ],
)
def test_what_goes_over_the_slow_network(kind, axes, domain, fast, slow):
    mesh = SimpleNamespace(shape=SIZES)
    figures = chip("TPU v5 lite")._replace(links=1.0, network=1.0, domain=domain)
    found = network_seconds((Collective(kind, axes, 1, 700.0),), mesh, figures)
    assert found == pytest.approx({"network": fast, "slow_network": slow})
