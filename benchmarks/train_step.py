"""One training step, ours against HF transformers' DeepseekV3 (torch), and the machine's own limit.

    python benchmarks/train_step.py [--config tiny|wide] [--rounds 5] [--no-peer]

All train the same model on the same tokens with AdamW: V3-shaped, hidden 256, 4 layers of which 1
dense, 16 experts top-4 and 2 shared of width 128, MLA, vocabulary 8192, batch 8 x 256. `wide` is
hidden 1024. Each runs in a process of its own, with and without huge pages (core/memory.py; `train`
uses them, transformers' users would have to ask); steps take turns and medians are printed, since
the machine's speed drifts. Torch runs in its fastest dtype and experts backend, tried first. The
limit is the best matmul at 2048^3, in turns too: bf16 -> bf16, bf16 -> f32, f32, and torch's.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

try:
    import torch
    import transformers
except ImportError:
    torch = None

from deepseek_jax.core.memory import TUNABLES
from deepseek_jax.core.precision import Precision, compute_dtype
from deepseek_jax.layers.mla import MLA
from deepseek_jax.layers.moe import MoE
from deepseek_jax.layers.router import Sigmoid
from deepseek_jax.models import counts
from deepseek_jax.models.build import build
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.training.language import Language, make_language
from deepseek_jax.training.optimizer import AdamW, make_optimizer
from deepseek_jax.training.state import initial_state
from deepseek_jax.training.step import make_gradients, make_train_step

BATCH, LENGTH = 8, 256
SETTLE = {"ours": 3.0, "transformers": 3.0, "limits": 0.1}  # seconds of a turn before it counts


def decoder(width: str) -> Decoder:
    """The measured model."""
    wide = width == "wide"
    return Decoder(
        vocab_size=8192,
        embed_dim=1024 if wide else 256,
        num_layers=4,
        num_dense_layers=1,
        mlp_dim=4096 if wide else 1024,
        init_scale=0.02,
        unroll=4,
        attention=MLA(
            num_heads=16 if wide else 4,
            kv_rank=512 if wide else 128,
            nope_dim=32,
            rope_dim=16,
            value_dim=32,
        ),
        moe=MoE(
            num_experts=16,
            expert_dim=512 if wide else 128,
            num_shared_experts=2,
            router=Sigmoid(num_active_experts=4, scale=2.5),
        ),
    )


def batch(tokens: np.ndarray) -> dict[str, np.ndarray]:
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:, None],
        "weights": np.ones((rows, length, 1), np.float32),
        "segments": np.ones((rows, length), np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy(),
    }


def ours(config: Decoder, tokens: np.ndarray, precision: Precision) -> tuple[Callable, float]:
    """A function that takes one step, and the seconds its compilation took."""
    model = build(config, precision)
    objective = make_language(Language(), model)
    optimizer = make_optimizer(AdamW(), model.specs)
    step = make_train_step(
        make_gradients(objective), objective, optimizer, lambda s: jnp.float32(1e-3), clip_norm=1.0
    )
    start = jax.jit(lambda: initial_state(model.init(jax.random.key(0)), optimizer, 1.0))
    state = start()
    data = jax.device_put(batch(tokens))
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, data, jax.random.key(1)).compile()
    seconds = time.perf_counter() - start
    holder = [state]

    def take() -> None:
        holder[0], metrics = compiled(holder[0], data, jax.random.key(1))
        assert np.isfinite(float(metrics["loss"]))

    return take, seconds


def theirs(config: Decoder, tokens: np.ndarray, dtype: str, backend: str) -> Callable:
    """A function that takes one step of transformers' DeepseekV3 with torch's fused AdamW."""
    a, moe = config.attention, config.moe
    torch.manual_seed(0)
    peer = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.embed_dim,
            intermediate_size=config.mlp_dim,
            moe_intermediate_size=moe.expert_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=a.num_heads,
            num_key_value_heads=a.num_heads,
            n_shared_experts=moe.num_shared_experts,
            n_routed_experts=moe.num_experts,
            num_experts_per_tok=moe.router.num_active_experts,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=config.num_dense_layers,
            q_lora_rank=None,
            kv_lora_rank=a.kv_rank,
            qk_nope_head_dim=a.nope_dim,
            qk_rope_head_dim=a.rope_dim,
            v_head_dim=a.value_dim,
            use_cache=False,
        )
    ).to(getattr(torch, dtype))
    peer.set_experts_implementation(backend)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3, fused=True)
    inputs = torch.from_numpy(tokens[:, :-1]).long()
    labels = torch.from_numpy(tokens[:, 1:]).long()

    def take() -> None:
        logits = peer(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        assert np.isfinite(loss.item())

    return take


def seconds(action: Callable) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def matmuls(size: int = 2048) -> dict[str, tuple[Callable, int]]:
    """The machine's limit: {name: (action, FLOPs)}, forward, dX and dW apart in each dtype."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size)).astype(np.float32) for _ in range(2))
    flops, actions = 2 * size**3, {}
    letters = {"forward": "mk,kn->mn", "dX": "mn,kn->mk", "dW": "mk,mn->kn"}
    for name, (source, target) in {
        "bf16->bf16": (jnp.bfloat16, jnp.bfloat16),
        "bf16->f32": (jnp.bfloat16, jnp.float32),
        "f32->f32": (jnp.float32, jnp.float32),
    }.items():
        x, y = jnp.asarray(a, source), jnp.asarray(b, source)
        for part, equation in letters.items():
            f = jax.jit(
                lambda x, y, e=equation, t=target: jnp.einsum(e, x, y, preferred_element_type=t)
            )
            actions[f"jax {name} {part}"] = (
                lambda f=f, x=x, y=y: f(x, y).block_until_ready(),
                flops,
            )
    if torch is not None:
        for dtype in (torch.bfloat16, torch.float32):
            x, y = torch.from_numpy(a).to(dtype), torch.from_numpy(b).to(dtype)
            name = f"torch {str(dtype).removeprefix('torch.')}"
            actions[name] = (lambda x=x, y=y: x @ y, flops)
    return actions


def serve(pipe, kind: str, width: str, options: tuple) -> None:
    """One process: prepares its actions, says what they are, then times one whenever asked."""
    config, told = decoder(width), {}
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, LENGTH + 1))
    tokens = tokens.astype(np.int32)
    if kind == "limits":
        found = matmuls()
        actions = {name: action for name, (action, _) in found.items()}
        told = {name: flops for name, (_, flops) in found.items()}
    elif kind == "ours":
        action, told["compiled"] = ours(config, tokens, Precision(compute=options[0]))
        actions = {kind: action}
    else:
        actions = {kind: theirs(config, tokens, *options)}
    for action in actions.values():
        action()
    pipe.send(told)
    while (name := pipe.recv()) is not None:
        # The first seconds do not count: while a process waits for its turn, a virtual machine may
        # take its free memory back, and the steps of a run, one after another, never wait for that.
        settled = time.perf_counter() + SETTLE[kind]
        while time.perf_counter() < settled:
            actions[name]()
        pipe.send(statistics.mean(seconds(actions[name]) for _ in range(3)))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


class Contender:
    """A process that `serve`s; `seconds(name)` is how long one of its actions takes now."""

    def __init__(self, kind: str, width: str, *options: str, huge_pages: bool = True):
        os.environ["GLIBC_TUNABLES"] = TUNABLES if huge_pages else ""
        self._pipe, theirs = multiprocessing.Pipe()
        arguments = (theirs, kind, width, options)
        self._process = multiprocessing.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.told = self._pipe.recv()

    def seconds(self, name: str) -> float:
        self._pipe.send(name)
        return self._pipe.recv()

    def end(self) -> float:
        """The most memory that it held, in GB."""
        self._pipe.send(None)
        peak = self._pipe.recv()
        self._process.join()
        return peak


def fastest_peer(width: str) -> tuple[str, str]:
    """The dtype and experts backend in which transformers is fastest here."""
    tried = {}
    for dtype in ("float32", "bfloat16"):
        for backend in ("grouped_mm", "eager"):
            peer = Contender("transformers", width, dtype, backend)
            tried[dtype, backend] = peer.seconds("transformers")
            peer.end()
            print(f"transformers {dtype} {backend}: {tried[dtype, backend]:.3f} s", flush=True)
    return min(tried, key=tried.get)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=("tiny", "wide"), default="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--no-peer", action="store_true")
    arguments = parser.parse_args()
    width = arguments.config
    multiprocessing.set_start_method("spawn")
    rows = {
        "ours": Contender("ours", width, arguments.precision),
        "ours, small pages": Contender("ours", width, arguments.precision, huge_pages=False),
    }
    if not arguments.no_peer:
        best = fastest_peer(width)
        name = f"transformers {' '.join(best)}"
        rows[name] = Contender("transformers", width, *best, huge_pages=False)
        rows[f"{name}, huge pages"] = Contender("transformers", width, *best)
    limits = Contender("limits", width)
    times: dict[str, list[float]] = {name: [] for name in [*rows, *limits.told]}
    for _ in range(arguments.rounds):
        for name, row in rows.items():
            times[name].append(row.seconds(name.partition(",")[0].partition(" ")[0]))
        for name in limits.told:
            times[name].append(limits.seconds(name))
    medians = {name: statistics.median(t) for name, t in times.items()}
    rates = {name: limits.told[name] / medians[name] for name in limits.told}
    # The limit that a step is held to is a forward product; dX and dW are printed for reading.
    forward = {n: r for n, r in rates.items() if not n.endswith(("dX", "dW"))}
    limit = max(forward, key=forward.get)
    precision = Precision(compute=arguments.precision)
    model = build(decoder(width), precision)
    flops = counts.train_flops_per_token(model, LENGTH) * BATCH * LENGTH
    total, active = counts.num_params(model)
    print(
        f"\n{width}: {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active, "
        f"{flops / 1e9:.0f} GFLOP a step of {BATCH * LENGTH} tokens; "
        f"compute {compute_dtype(precision)[0]}; compiled in {rows['ours'].told['compiled']:.1f} s"
    )
    for name, rate in rates.items():
        print(f"  {name:24s} {rate / 1e9:8.0f} GFLOP/s")
    print(f"  limit: {limit}")
    print(f"{'':42s} {'tokens/s':>9s} {'ms/step':>8s} {'of limit':>8s} {'ours/it':>8s} {'GB':>5s}")
    for name, row in rows.items():
        print(
            f"{name:42s} {BATCH * LENGTH / medians[name]:9.0f} {1e3 * medians[name]:8.0f} "
            f"{flops / medians[name] / rates[limit]:8.1%} "
            f"{medians[name] / medians['ours']:8.2f} {row.end():5.2f}"
        )
    limits.end()


if __name__ == "__main__":
    main()
