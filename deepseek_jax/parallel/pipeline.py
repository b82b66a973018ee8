"""Pipelines over the stage axis: one forward, one backward (1F1B), as a per-device function.

Layers are dealt to virtual stages, each device holding `chunks` of them (1: one run of layers a
device; more: interleaved stages, Megatron-LM, arXiv 2104.04473). At every tick a device does one
chunk forward and one backward; its neighbor takes the result over at the next. Gradients are made
inside, by `jax.vjp` of one chunk and one microbatch at a time from the input that was kept of it,
so that what is held grows with the stages, not with the microbatches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.core import tree

AXIS = "stage"


class Pipeline(NamedTuple):
    """How a step's microbatches go through the stages."""

    stages: int
    chunks: int
    microbatches: int

    @classmethod
    def on(cls, mesh: Any, chunks: int, microbatches: int) -> "Pipeline":
        """That of a mesh, whose one stage holds all layers in one run whatever `chunks` says."""
        stages = mesh.shape[AXIS]
        return cls(stages, chunks if stages > 1 else 1, microbatches)

    @property
    def turns(self) -> int:
        """Forward passes of a chunk that a device does in a step."""
        return self.chunks * self.microbatches

    @property
    def bubble(self) -> float:
        """The part of a step that a device waits: (S - 1) / (chunks * M + S - 1), as in theory.

        It runs passes of nothing meanwhile, S - 1 forward and as many backward, and all ticks cost
        all devices the same; benchmarks/pipeline.py counts them. Layers that the virtual stages
        cannot share evenly come on top.
        """
        return (self.stages - 1) / (self.turns + self.stages - 1)

    def empty(self, num_layers: int) -> float:
        """The part of all slots for layers that holds none, as devices get unequal numbers."""
        length = max(map(len, deal(num_layers, self.stages, self.chunks)))
        return 1 - num_layers / (length * self.stages * self.chunks)

    def describe(self) -> str:
        """What its devices do and how long they wait, in a line."""
        runs = f" of {self.chunks} runs of layers each" if self.chunks > 1 else ""
        return (
            f"pipeline: {self.stages} stages{runs}, {self.microbatches} microbatches; a device "
            f"waits {self.bubble:.1%} of a step (more accumulation_steps or stage_chunks: less)"
        )

    def place(self, turn: Any) -> tuple[Any, Any]:
        """A device's chunk and microbatch at its n-th turn forward; backward chunks count down."""
        group, within = turn // (self.stages * self.chunks), turn % (self.stages * self.chunks)
        return within // self.stages, group * self.stages + within % self.stages

    def turn(self, chunk: Any, microbatch: Any) -> Any:
        """The turn at which a device does this chunk of this microbatch forward."""
        group, within = microbatch // self.stages, microbatch % self.stages
        return (group * self.chunks + chunk) * self.stages + within

    @property
    def delay(self) -> int:
        """Ticks before the first backward pass, on the last device."""
        return self.stages * self.chunks - 1


class Parts(NamedTuple):
    """A model in parts; every part runs on all devices at once, each with its own parameters."""

    first: Callable[..., Any]
    """(params, batch) -> x: all stages together."""
    layers: Callable[..., Any]
    """(params of a chunk, number of the virtual stage, x, batch) -> (x, loss, report)."""
    last: Callable[..., Any]
    """(params, x, batch) -> (loss, report): all stages together, which all get the same loss."""


def deal(num_layers: int, stages: int, chunks: int) -> list[range]:
    """The layers of each virtual stage, as evenly as can be; the first ones get one more."""
    each, more = divmod(num_layers, stages * chunks)
    ends = [(i + 1) * each + min(i + 1, more) for i in range(stages * chunks)]
    return [range(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def _at(values: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), values)


def _chosen(condition: Any, values: Any) -> Any:
    return jax.tree.map(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), values)


def _added(total: Any, part: Any) -> Any:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, part)


def _added_at(total: Any, index: Any, part: Any) -> Any:
    return jax.tree.map(lambda a, b: a.at[index].add(b.astype(a.dtype)), total, part)


def _zeros(values: Any, dtype: Any = None) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype or x.dtype), values)


def one_forward_one_backward(
    pipeline: Pipeline, parts: Parts, first: Any, chunks: Any, last: Any, batches: Any, scale: Any
) -> tuple[tuple[Any, Any, Any], Any, Any]:
    """Gradients of scale * loss, float32, and what the parts report, summed over microbatches.

    Within a per-device function. `chunks` have the device's chunks in front, `batches` the
    microbatches, the layers' report comes back by chunk. Gradients are this device's share: they
    are yet to be added up over whatever axes the parameters are the same on.
    """
    stages, total, me = pipeline.stages, pipeline.turns, jax.lax.axis_index(AXIS)
    rooms = 2 * stages * pipeline.chunks
    one = _at(batches, 0)
    x = jax.eval_shape(parts.first, first, one)
    run = jax.eval_shape(parts.layers, _at(chunks, 0), me, x, one)
    after = jax.eval_shape(parts.last, last, x, one)
    carry = {
        "x": _zeros(x),  # what the stage before handed on
        "slope": _zeros(x),  # what the stage after did
        "kept": jnp.zeros((rooms, *x.shape), x.dtype),
        "first": _zeros(first, jnp.float32),
        "chunks": _zeros(chunks, jnp.float32),
        "last": _zeros(last, jnp.float32),
        "layers": jax.tree.map(lambda r: jnp.zeros((pipeline.chunks, *r.shape), r.dtype), run[2]),
        "report": _zeros(after[1]),
    }

    def neighbor(x, step):
        return jax.lax.ppermute(x, AXIS, [(i, (i + step) % stages) for i in range(stages)])

    def forward(t, c):
        turn = t - me
        real = (turn >= 0) & (turn < total)
        chunk, number = pipeline.place(jnp.clip(turn, 0, total - 1))
        entering, new = pipeline.place(jnp.clip(t, 0, total - 1))  # at the first device
        x = jax.lax.cond(
            entering == 0, lambda: parts.first(first, _at(batches, new)), lambda: _zeros(c["x"])
        )
        x = jnp.where((me == 0) & (chunk == 0), x, c["x"])
        own = _at(chunks, chunk), chunk * stages + me, x, _at(batches, number)
        y, _, report = parts.layers(*own)
        room = turn % rooms
        kept = c["kept"].at[room].set(jnp.where(real, x, c["kept"][room]))
        layers = _added_at(c["layers"], chunk, _chosen(real, report))
        return y, c | {"kept": kept, "layers": layers}

    def finish(t, y, c):
        """The loss of what the last device has just made, by all of them; its slope."""
        chunk, number = pipeline.place(t - (stages - 1))

        def loss(hidden):
            batch = _at(batches, number)
            given = lambda params, hidden: parts.last(params, hidden, batch)  # noqa: E731
            _, pull, report = jax.vjp(given, last, hidden, has_aux=True)
            slopes, slope = pull(scale / stages)  # each one's share of the same loss
            return slopes, jax.lax.psum(slope, AXIS), report

        def nothing(hidden):
            return _zeros(last), _zeros(hidden), _zeros(after[1])

        hidden = jax.lax.psum(_chosen(me == stages - 1, y), AXIS)
        slopes, slope, report = jax.lax.cond(chunk == pipeline.chunks - 1, loss, nothing, hidden)
        c = c | {"last": _added(c["last"], slopes), "report": _added(c["report"], report)}
        return slope, c

    def backward(t, slope, c):
        turn = t - pipeline.delay - (stages - 1 - me)
        real = (turn >= 0) & (turn < total)
        chunk, number = pipeline.place(jnp.clip(turn, 0, total - 1))
        chunk = pipeline.chunks - 1 - chunk
        x = c["kept"][pipeline.turn(chunk, number) % rooms]
        ends = (me == stages - 1) & (chunk == pipeline.chunks - 1)
        slope = _chosen(real, jnp.where(ends, slope, c["slope"]))
        virtual, batch = chunk * stages + me, _at(batches, number)
        _, pull = jax.vjp(
            lambda p, x: parts.layers(p, virtual, x, batch)[:2], _at(chunks, chunk), x
        )
        slopes, slope = pull((slope, _chosen(real, scale)))
        # The embeddings' slope, by all stages, of what has come back to the first device.
        turn = t - pipeline.delay - (stages - 1)
        chunk_there, number = pipeline.place(jnp.clip(turn, 0, total - 1))
        arrived = (turn >= 0) & (turn < total) & (chunk_there == pipeline.chunks - 1)

        def embed(slope):
            batch = _at(batches, number)
            return jax.vjp(lambda params: parts.first(params, batch), first)[1](slope)[0]

        given = _chosen(me == 0, slope)
        first_slopes = jax.lax.cond(arrived, embed, lambda _: _zeros(first), given)
        c = c | {
            "chunks": _added_at(c["chunks"], chunk, slopes),
            "first": _added(c["first"], first_slopes),
        }
        return slope, c

    def warm_up(t, c):
        y, c = forward(t, c)
        return c | {"x": neighbor(y, 1)}

    def steady(t, c):
        y, c = forward(t, c)
        slope, c = finish(t, y, c)
        slope, c = backward(t, slope, c)
        return c | {"x": neighbor(y, 1), "slope": neighbor(slope, -1)}

    def cool_down(t, c):
        slope, c = backward(t, _zeros(c["slope"]), c)
        return c | {"slope": neighbor(slope, -1)}

    delay, ahead = pipeline.delay, total + stages - 1
    carry = jax.lax.fori_loop(0, delay, warm_up, carry)
    carry = jax.lax.fori_loop(delay, ahead, steady, carry)
    carry = jax.lax.fori_loop(ahead, ahead + delay, cool_down, carry)
    return (carry["first"], carry["chunks"], carry["last"]), carry["layers"], carry["report"]


def one_after_another(
    pipeline: Pipeline, parts: Parts, first: Any, chunks: Any, last: Any, batches: Any, scale: Any
) -> tuple[tuple[Any, Any, Any], Any, Any]:
    """The same of one stage: nothing waits, and no forward pass is made again."""

    def loss(given, batch):
        first, chunks, last = given
        x = parts.first(first, batch)
        x, loss, layers = parts.layers(_at(chunks, 0), jax.lax.axis_index(AXIS), x, batch)
        more, report = parts.last(last, x, batch)
        layers = jax.tree.map(lambda r: r[None], layers)
        return scale * (loss + more), (layers, report)

    def of_part(batch):
        grads, reports = jax.grad(loss, has_aux=True)((first, chunks, last), batch)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), reports

    grads, (layers, report) = tree.added_up(of_part, batches)
    return grads, layers, report
