"""One training step, ours against HF transformers' DeepseekV3 (torch), and the machine's own limit.

    python benchmarks/train_step.py [--config tiny|wide] [--rounds 5] [--no-peer]

Both train the same model on the same tokens with AdamW: V3-shaped, hidden 256, 4 layers of which 1
dense, 16 experts top-4 and 2 shared of width 128, MLA, vocabulary 8192, batch 8 x 256. `wide` is
hidden 1024. Steps are interleaved (ours, theirs, ours, ...) and medians printed, since the
machine's speed drifts. The limit is the best matmul at 2048^3, interleaved too: bf16 -> bf16,
bf16 -> f32, f32, and torch's. Torch runs in its fastest dtype and experts backend, tried first.
"""

import argparse
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

    take.compiled = compiled
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=("tiny", "wide"), default="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--no-peer", action="store_true")
    arguments = parser.parse_args()
    config = decoder(arguments.config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, LENGTH + 1))
    tokens = tokens.astype(np.int32)
    precision = Precision(compute=arguments.precision)
    actions, compile_seconds = {}, 0.0
    actions["ours"], compile_seconds = ours(config, tokens, precision)
    if not arguments.no_peer:
        tried = {}
        for dtype in ("float32", "bfloat16"):
            for backend in ("grouped_mm", "eager"):
                step = theirs(config, tokens, dtype, backend)
                step()
                tried[dtype, backend] = (min(seconds(step) for _ in range(2)), step)
                print(
                    f"transformers {dtype} {backend}: {tried[dtype, backend][0]:.3f} s", flush=True
                )
        best = min(tried, key=lambda key: tried[key][0])
        actions[f"transformers {' '.join(best)}"] = tried[best][1]
    limits = matmuls()
    for action in [*actions.values(), *(action for action, _ in limits.values())]:
        action()
    times: dict[str, list[float]] = {name: [] for name in [*actions, *limits]}
    for _ in range(arguments.rounds):
        for name, action in [*actions.items(), *((n, a) for n, (a, _) in limits.items())]:
            times[name].append(seconds(action))
    medians = {name: statistics.median(t) for name, t in times.items()}
    rates = {name: limits[name][1] / medians[name] for name in limits}
    # The limit that a step is held to is a forward product; dX and dW are printed for reading.
    forward = {n: r for n, r in rates.items() if not n.endswith(("dX", "dW"))}
    limit = max(forward, key=forward.get)
    model = build(config, precision)
    flops = counts.train_flops_per_token(model, LENGTH) * BATCH * LENGTH
    total, active = counts.num_params(model)
    print(
        f"\n{arguments.config}: {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active, "
        f"{flops / 1e9:.0f} GFLOP a step of {BATCH * LENGTH} tokens; "
        f"compute {compute_dtype(precision)[0]}; compiled in {compile_seconds:.1f} s; "
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB "
        "(this process, peers included)"
    )
    for name, rate in rates.items():
        print(f"  {name:24s} {rate / 1e9:8.0f} GFLOP/s")
    print(f"  limit: {limit}")
    print(f"{'':36s} {'tokens/s':>9s} {'ms/step':>8s} {'of limit':>8s} {'ours/it':>8s}")
    for name in actions:
        print(
            f"{name:36s} {BATCH * LENGTH / medians[name]:9.0f} {1e3 * medians[name]:8.0f} "
            f"{flops / medians[name] / rates[limit]:8.1%} "
            f"{medians[name] / medians['ours']:8.2f}"
        )


if __name__ == "__main__":
    main()
