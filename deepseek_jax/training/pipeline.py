"""The language objective through a pipeline: its gradients from one per-device function.

Between steps every stage holds a part of every leaf's width, as fsdp does (parallel/sharding), so
nothing of a checkpoint knows of stages. A step first trades widths for layers, all of them with an
all-to-all, and trades their gradients back at its end. Stages with fewer layers, or with dense ones
among mixtures of experts, skip by a switch. Embeddings stay split by width, the head by vocabulary,
and all stages compute both together; an MTP layer is computed by every stage.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import PartitionSpec

from deepseek_jax.core import tree
from deepseek_jax.core.axes import BATCH_AXES
from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.block import POLICIES, Block
from deepseek_jax.layers.linear import RMSNorm
from deepseek_jax.layers.moe import experts_home
from deepseek_jax.models.build import Model
from deepseek_jax.models.decoder import PredictionLayer, own_rows, place_of, sees_all
from deepseek_jax.ops.ring import zigzag, zigzag_order
from deepseek_jax.parallel.manual import gathered, manual_axes, per_device, traded
from deepseek_jax.parallel.pipeline import (
    AXIS,
    Parts,
    Pipeline,
    deal,
    one_after_another,
    one_forward_one_backward,
)
from deepseek_jax.parallel.sharding import names_of, weight_spec, without
from deepseek_jax.training.language import Language, block_terms, of_tokens
from deepseek_jax.training.slices import share_of_slice, shares
from deepseek_jax.training.step import (
    Gradients,
    Objective,
    make_gradients,
    microbatches,
    total_weights,
)

SKIPPED = -1


class Layout(NamedTuple):
    """Which layer stands where: `kinds[virtual stage][slot]` is its segment's number, or SKIPPED.

    `rows[segment][virtual stage]` lists the segment's own layers at the slots that ever hold one of
    it, `slots[segment]`; SKIPPED where this stage has none.
    """

    kinds: list[list[int]]
    slots: list[list[int]]
    rows: list[list[list[int]]]


def layout(repeats: list[int], pipeline: Pipeline) -> Layout:
    """The layout of segments of so many layers each, one after another."""
    owner = [(kind, row) for kind, count in enumerate(repeats) for row in range(count)]
    dealt = [[owner[i] for i in own] for own in deal(len(owner), pipeline.stages, pipeline.chunks)]
    length = max(map(len, dealt))
    full = [own + [(SKIPPED, SKIPPED)] * (length - len(own)) for own in dealt]
    kinds = [[kind for kind, _ in own] for own in full]
    slots, rows = [], []
    for kind in range(len(repeats)):
        slots.append([i for i in range(length) if any(own[i] == kind for own in kinds)])
        rows.append(
            [[own[i][1] if own[i][0] == kind else SKIPPED for i in slots[-1]] for own in full]
        )
    return Layout(kinds, slots, rows)


def check_pipeline(model: Model, config: Language, pipeline: Pipeline) -> None:
    """InputError unless this model can go through this pipeline on the current mesh."""
    c, sizes = model.config, jax.sharding.get_abstract_mesh().shape
    if not c.scan:
        raise InputError(
            "mesh.stage is above 1, or mesh.slice_gradients int4: set model.scan, which keeps like "
            "layers together"
        )
    if c.num_layers < pipeline.stages * pipeline.chunks:
        raise InputError(
            f"mesh.stage x stage_chunks is {pipeline.stages * pipeline.chunks}, and the model "
            f"has {c.num_layers} layers: fewer stages, please"
        )
    if pipeline.chunks > 1 and pipeline.microbatches % pipeline.stages:
        raise InputError(
            f"with mesh.stage_chunks above 1, accumulation_steps ({pipeline.microbatches}) must "
            f"be a multiple of mesh.stage ({pipeline.stages})"
        )
    if c.vocab_size % pipeline.stages:
        raise InputError(
            f"model.vocab_size ({c.vocab_size}) must be a multiple of mesh.stage "
            f"({pipeline.stages}), whose devices share the head's columns"
        )
    if sizes["context"] > 1 and not sees_all(c.attention):
        raise InputError(
            "a sparse attention can have a context axis neither beside stages nor with "
            "mesh.slice_gradients int4"
        )


def make_mesh_gradients(
    config: Language,
    model: Model,
    objective: Objective,
    steps: int,
    chunks: int = 1,
    by_slice: bool = False,
) -> Gradients:
    """The gradient function of whatever mesh it is called on: a pipeline if that has stages.

    A pipeline's microbatches are the accumulation steps. With `by_slice` gradients are left as
    training/slices.add_slices takes them. Raises InputError, when it is called, if the model cannot
    be dealt to the stages.
    """
    plain = make_gradients(objective, steps)

    def gradients(params, batch, key, scale):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or (mesh.shape[AXIS] == 1 and not (by_slice and mesh.shape["slice"] > 1)):
            return plain(params, batch, key, scale)
        pipeline = Pipeline.on(mesh, chunks, steps)
        check_pipeline(model, config, pipeline)
        shown = model.dense() if config.indexer_warmup else model
        automatic = ("tensor",) if mesh.shape["tensor"] > 1 else ()
        shapes = tree.flatten(model.shapes)
        lies = {
            path: weight_spec(spec.axes, shapes[path].shape)
            for path, spec in tree.flatten(model.specs).items()
        }
        given = {path: without(spec, automatic) for path, spec in lies.items()}
        across = shares(mesh, model.specs, model.shapes) if by_slice else dict.fromkeys(lies)
        out = {p: without(s.spec, automatic) if s else given[p] for p, s in across.items()}
        parts = microbatches(batch, steps)
        weights = total_weights(objective, parts)
        run = functools.partial(_of_this_device, config, shown, objective, pipeline, lies, across)
        time = "context" if mesh.shape["context"] > 1 else None
        rows, whole = PartitionSpec(None, BATCH_AXES, time), PartitionSpec()
        apply = per_device(run, (given, rows, whole, whole), (out, whole, whole), automatic)
        grads, sums, routing = apply(tree.flatten(params), parts, weights, scale)
        means = {term: sums[term] / weight for term, weight in weights.items()}
        grads = {path: g if objective.trains(path) else None for path, g in grads.items()}
        return unflatten_dict(grads, sep="/"), means, routing

    return gradients


def _of_this_device(
    config, model, objective, pipeline, lies, across, params, batches, weights, scale
):
    """Gradients as the parameters lie, terms and routing of the whole batch."""
    c, order = model.config, None
    shards = jax.sharding.get_abstract_mesh().shape["tensor"]  # automatic: XLA splits along it
    if manual_axes("context"):
        batches = {name: zigzag(x, "context", 2) for name, x in batches.items()}
        order = zigzag_order(batches["tokens"].shape[2], "context")
    plan = layout([repeats for _, repeats in c.segments], pipeline)
    kinds: list[dict[str, str]] = [{} for _ in c.segments]  # of each segment: name -> path
    for path in params:
        segment, _, name = path.partition("/block/")
        if segment.startswith("segment_"):
            kinds[int(segment.removeprefix("segment_"))][name] = path
    home = experts_home(c.moe) if c.moe else ()
    factors = {t: f / weights[t] for t, f in objective.coefficients.items()}

    def place(batch):
        return place_of(c, batch["positions"], batch["segments"], order)

    def weighed(terms):
        return sum((factors[t] * x for t, x in terms.items() if t in factors), jnp.float32(0))

    # Each stage has a part of every tensor shard's range of the vocabulary, if it can.
    ranges = 1 if c.vocab_size % (shards * pipeline.stages) else shards

    def column(tokens):
        """Where tokens stand once the vocabulary goes by stages, then by tensor shards."""
        size = c.vocab_size // pipeline.stages // ranges
        part, place = tokens // size, tokens % size
        stage, shard = part % pipeline.stages, part // pipeline.stages
        return (stage * ranges + shard) * size + place

    def whole_layer(leaves, names):
        """One layer's leaves whole, but for experts that tokens travel to."""
        keep = (home, *home, "tensor")
        return {
            name: gathered(x, without(PartitionSpec(*lies[names[name]][1:]), (AXIS,)), keep)
            for name, x in leaves.items()
        }

    def table(params, tokens):
        spec = without(lies["embedding/weight"], ("tensor",))
        return own_rows(spec, model.dtypes.compute, tokens, params["embedding/weight"])

    def first(params, batch):
        return table(params, batch["tokens"])

    block = functools.partial(Block, c.attention)
    run_kind = [
        block(feed_forward, c.embed_dim, c.norm_eps, model.dtypes) for feed_forward, _ in c.segments
    ]

    def of_kind(kind, leaves, x, where):
        given = unflatten_dict(whole_layer(leaves, kinds[kind]), sep="/")
        x, (_, routing, selection) = run_kind[kind].apply({"params": given}, x, None, where)
        terms = block_terms(*([r] if r is not None else [] for r in (routing, selection)))
        routing = routing and routing._replace(chosen=None)
        return x, weighed(terms), (routing, selection)

    forms = [jax.jit(functools.partial(of_kind, kind)) for kind in range(len(kinds))]

    def layers(chunk, number, x, batch):
        where = place(batch)
        at = jnp.array(plan.kinds)[number]
        loss, found = jnp.float32(0), [[] for _ in kinds]
        for slots, mixed in _runs(plan):

            def slot(x, given, mixed=mixed):
                kind, leaves = given
                nothing = {
                    g: _zeros(jax.eval_shape(forms[g], leaves[g], x, where)[2])
                    for g in mixed
                    if g != SKIPPED
                }

                def branch(g):
                    def run(x):
                        if g == SKIPPED:
                            return x, jnp.float32(0), nothing
                        x, loss, report = forms[g](leaves[g], x, where)
                        return x, loss, nothing | {g: report}

                    return run

                branches = [branch(g) for g in mixed]
                if len(branches) == 1:
                    x, loss, report = branches[0](x)
                else:
                    index = sum(jnp.where(kind == g, i, 0) for i, g in enumerate(mixed))
                    x, loss, report = jax.lax.switch(index, branches, x)
                return x, (loss, report)

            if c.remat != "none":
                slot = jax.checkpoint(slot, policy=POLICIES[c.remat], prevent_cse=False)
            rows = {g: _between(plan.slots[g], slots) for g in mixed if g != SKIPPED}
            leaves = {g: {n: x[own] for n, x in chunk[g].items()} for g, own in rows.items()}
            x, (losses, reports) = jax.lax.scan(slot, x, (at[slots.start : slots.stop], leaves))
            loss += losses.sum()
            for g, report in reports.items():
                found[g].append(report)
        return x, loss, [jax.tree.map(lambda *x: jnp.concatenate(x), *parts) for parts in found]

    def last(params, x, batch):
        where, valid = place(batch), batch["weights"]
        norm = {"scale": gathered(params["final_norm/scale"], lies["final_norm/scale"])}
        hidden = RMSNorm(model.dtypes, eps=c.norm_eps).apply({"params": norm}, x)

        def entropy(hidden, depth, z_weight=0.0):
            targets = column(batch["targets"][..., depth])
            given = hidden, params["head"], targets, valid[..., depth]
            return of_tokens(*given, z_weight=z_weight, chunk=config.chunk, axis=AXIS)

        total, nll, z = entropy(hidden, 0, config.z_weight)
        sums, routing, blocks = {"loss": nll, "cross_entropy": total, "z_loss": z}, {}, []
        for depth in range(c.num_mtp_layers if config.mtp_weight else 0):
            name = f"mtp_{depth}/"
            own = {p.removeprefix(name): gathered(x, lies[p], (home, *home, "tensor"))
                   for p, x in params.items() if p.startswith(name)}  # fmt: skip
            layer = PredictionLayer(c, model.dtypes)
            embedded = table(params, batch["targets"][..., depth])
            given = unflatten_dict(own, sep="/")
            hidden, found = layer.apply({"params": given}, hidden, embedded, where)
            sums["mtp_loss" if depth == 0 else f"mtp_loss_{depth + 1}"] = entropy(
                hidden, depth + 1
            )[0]
            blocks.append(found)
            if found[0] is not None:
                routing[f"{name}block"] = found[0]._replace(chosen=None)
        sums |= block_terms(*([f[i] for f in blocks if f[i] is not None] for i in (0, 1)))
        return weighed(sums), (sums, routing)

    # What lies by width comes as layers, and the head by vocabulary; these functions are linear.
    dealt = [jnp.array(rows).reshape(pipeline.chunks, pipeline.stages, -1) for rows in plan.rows]

    def as_layers(x, spec, rows):
        rows = rows.swapaxes(0, 1)  # [stages, chunks, slots]
        dimension = _stage_dimension(spec)
        if dimension is None:
            rows = rows[jax.lax.axis_index(AXIS)]
            return x.at[_positive(rows, x)].get(mode="fill", fill_value=0)
        x = x.at[_positive(rows, x)].get(mode="fill", fill_value=0)
        return traded(x, PartitionSpec(None, None, None, *spec[1:]), AXIS, 0, dimension + 2)[0]

    def as_vocabulary(x, spec):
        """The head's columns of this stage: of each tensor shard's range the stage's part."""
        if c.tie_embeddings:
            x, spec = x.T, PartitionSpec(*(*spec, None, None)[1::-1])
        x = x.reshape(len(x), ranges, pipeline.stages, -1)
        split = PartitionSpec((*without(spec, (AXIS,)), None)[0], "tensor" if ranges > 1 else None)
        if _stage_dimension(spec) is None:
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS), 1, 2)
        else:
            x = traded(x, split, AXIS, 2, 0)
        x = gathered(x[:, :, 0], split, ("tensor",))
        return x.reshape(len(x), -1)

    def prepared(params):
        own = [
            {n: as_layers(params[p], lies[p], rows) for n, p in names.items()}
            for names, rows in zip(kinds, dealt, strict=True)
        ]
        table = "embedding/weight" if c.tie_embeddings else "head/weight"
        ends = {
            p: x for p, x in params.items() if not p.startswith("segment_") and p != "head/weight"
        }
        return (
            {p: ends[p] for p in ends if p == "embedding/weight"},
            own,
            ends | {"head": as_vocabulary(params[table], lies[table])},
        )

    given = prepared(params)
    parts = Parts(*map(jax.jit, (first, layers, last)))  # each is traced once, however often used
    run = one_forward_one_backward if pipeline.stages > 1 else one_after_another
    found, reports, (sums, routing) = run(pipeline, parts, *given, batches, scale)
    wide = {p: jax.ShapeDtypeStruct(x.shape, jnp.float32) for p, x in params.items()}
    (grads,) = jax.linear_transpose(prepared, wide)(found)
    everywhere = (*manual_axes(*BATCH_AXES, "context"), AXIS)
    grads = {p: share_of_slice(g, across[p], lies[p], everywhere) for p, g in grads.items()}
    sums, routing = jax.lax.psum((sums, routing), (*BATCH_AXES, "context"))
    for g, report in enumerate(reports):
        rows = dealt[g][:, jax.lax.axis_index(AXIS)].reshape(-1)
        found = jax.tree.map(functools.partial(_in_order, c.segments[g][1], rows), report)
        found, selection = jax.lax.psum(found, (*BATCH_AXES, "context", AXIS))
        for term, value in block_terms(
            *([x] if x is not None else [] for x in (found, selection))
        ).items():
            sums[term] = sums.get(term, 0) + value
        if found is not None:
            routing[f"segment_{g}/block"] = found
    return grads, sums, routing


def _in_order(count: int, rows: jax.Array, report: jax.Array) -> jax.Array:
    """[chunks, slots, ...] of this stage as [layers, ...], zeros for other stages' layers."""
    flat = report.reshape(-1, *report.shape[2:])
    total = jnp.zeros((count, *flat.shape[1:]), flat.dtype)
    return total.at[jnp.where(rows < 0, count, rows)].add(flat, mode="drop")


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _positive(rows: jax.Array, x: jax.Array) -> jax.Array:
    """Row numbers, those that are SKIPPED past the end."""
    return jnp.where(rows < 0, x.shape[0], rows)


def _between(slots: list[int], run: range) -> slice:
    """Which of a segment's slots lie in a run: they follow each other."""
    own = [i for i, slot in enumerate(slots) if slot in run]
    return slice(own[0], own[-1] + 1)


def _runs(plan: Layout) -> list[tuple[range, tuple[int, ...]]]:
    """Slots that follow each other and may hold the same kinds of layers."""
    columns = [tuple(sorted({own[i] for own in plan.kinds})) for i in range(len(plan.kinds[0]))]
    found, start = [], 0
    for kinds, group in itertools.groupby(columns):
        length = len([*group])
        found.append((range(start, start + length), kinds))
        start += length
    return found


def _stage_dimension(spec: PartitionSpec) -> int | None:
    """Which dimension of a leaf the stages split."""
    for dimension, entry in enumerate(spec):
        if AXIS in names_of(entry):
            return dimension
    return None
