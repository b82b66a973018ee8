"""Generation, ours against HF transformers' `generate` (torch): first token, others, memory.

    python benchmarks/decode.py [--rounds 5] [--layers 3] [--dtypes float32 bfloat16]

Both complete the same prompts greedily with the same random weights, read from one folder:
DeepSeek-V2-Lite at half its width (hidden 1024; 16 heads of 128 + 64, latent 512; 64 experts of
704, top-6, and 2 shared; 1 of 3 layers dense; vocabulary 32,000). 512 tokens of prompt, 128 new.
Each runs in a process of its own; they take turns and medians are printed, since the machine's
speed drifts. Compilation and first calls are outside. Both run on the GPU where there is one.
Torch has all cores, inference mode, sdpa, its cache and, for each batch size, its faster experts
backend, tried first (batched_mm is left out: it would gather every token's experts, 18 GB for one
prompt). In float32 the tokens of both are compared: from a row's first difference on everything may
differ, so the margin of transformers' choice at that place is printed.
"""

import argparse
import dataclasses
import multiprocessing
import os
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers

from deepseek_jax.checkpoint import huggingface
from deepseek_jax.core.precision import Precision
from deepseek_jax.models.build import build
from deepseek_jax.serving.language import LanguageModel

PROMPT, NEW, BATCHES = 512, 128, (1, 16)
BACKENDS = ("eager", "grouped_mm")
SHAPE = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 5472,
    "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "moe_intermediate_size": 704, "first_k_dense_replace": 1, "eos_token_id": None,
    "bos_token_id": None,
}  # fmt: skip


def prompts(batch: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (batch, PROMPT)).tolist()


def write_model(folder: pathlib.Path, layers: int, dtype: str) -> None:
    """Save the measured model as transformers does."""
    torch.manual_seed(0)
    config = transformers.DeepseekV2Config(**SHAPE, num_hidden_layers=layers)
    model = transformers.DeepseekV2ForCausalLM(config).to(getattr(torch, dtype))
    print(
        f"\n{dtype}: {model.num_parameters() / 1e6:.0f} M parameters, {layers} layers", flush=True
    )
    model.save_pretrained(folder)


def ours(path: pathlib.Path, dtype: str) -> Callable:
    """(rows, number of new tokens) -> their new tokens."""
    folder = huggingface.open_folder(path)
    config = dataclasses.replace(folder.config, scan=False)  # as `load` does
    folder = folder._replace(config=config)
    model = build(config, Precision(compute=dtype, params=dtype))
    params = huggingface.load_params(folder, model, model.shapes)
    lm = LanguageModel(model, params, None, folder.config)
    return lambda rows, new: lm.generate_tokens(rows, max_new_tokens=new)


def theirs(path: pathlib.Path, dtype: str) -> Callable:
    """The same of transformers; `told` is how."""
    torch.set_num_threads(os.cpu_count())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).to(device)

    @torch.inference_mode()
    def complete(rows: list[list[int]], new: int, **more: bool) -> object:
        ids = torch.tensor(rows, device=device)
        mask = torch.ones_like(ids)
        done = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **more
        )
        return done if more else done[:, ids.shape[1] :].tolist()

    def fastest(batch: int) -> str:
        tried = {}
        for backend in BACKENDS:
            model.set_experts_implementation(backend)
            complete(prompts(batch), 2)
            tried[backend] = seconds(complete, batch, 16)
            print(f"transformers, {backend}, batch {batch}: {tried[backend]:.1f} s", flush=True)
        return min(tried, key=tried.get)

    best = {batch: fastest(batch) for batch in BATCHES}

    def run(rows: list[list[int]], new: int, **more: bool) -> object:
        model.set_experts_implementation(best[len(rows)])
        return complete(rows, new, **more)

    run.told = best
    return run


def margins(complete: Callable, batch: int) -> np.ndarray:
    """How far each of transformers' choices [B, NEW] was above the next best."""
    found = complete(prompts(batch), NEW, output_scores=True, return_dict_in_generate=True)
    best = torch.stack(found.scores, 1).float().topk(2, -1).values
    return (best[..., 0] - best[..., 1]).cpu().numpy()


def seconds(complete: Callable, batch: int, new: int) -> float:
    rows, start = prompts(batch), time.perf_counter()
    assert len(complete(rows, new)[0]) == new
    return time.perf_counter() - start


def serve(pipe, make: Callable, path: pathlib.Path, dtype: str) -> None:
    """One process: opens the model, says how, then does what it is asked until it is told None."""
    complete = make(path, dtype)
    for batch in BATCHES:
        complete(prompts(batch), NEW)
    pipe.send(getattr(complete, "told", {}))
    while (asked := pipe.recv()) is not None:
        what, batch = asked
        if what == "tokens":
            pipe.send(complete(prompts(batch), NEW))
        elif what == "margins":
            pipe.send(margins(complete, batch))
        else:
            complete(prompts(batch), 1)  # settles: the other's turn took caches and memory
            pipe.send((seconds(complete, batch, 1), seconds(complete, batch, NEW)))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


class Contender:
    """A process that `serve`s."""

    def __init__(self, make: Callable, path: pathlib.Path, dtype: str):
        self._pipe, other = multiprocessing.Pipe()
        arguments = (other, make, path, dtype)
        self._process = multiprocessing.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        other.close()
        self.told = self._pipe.recv()

    def ask(self, *asked: object) -> object:
        self._pipe.send(asked)
        return self._pipe.recv()

    def end(self) -> float:
        """The most memory that it held, in GB, torch and JAX included."""
        self._pipe.send(None)
        peak = self._pipe.recv()
        self._process.join()
        return peak


def agreement(one: Contender, other: Contender, batch: int) -> str:
    """How many greedy tokens of both agree, each row up to its first difference."""
    a, b = (np.array(c.ask("tokens", batch)) for c in (one, other))
    same = np.minimum.accumulate(a == b, 1)
    firsts = [(row, n) for row, n in enumerate(same.sum(1)) if n < NEW]
    close = other.ask("margins", batch)
    at = ", ".join(f"{close[place]:.1e}" for place in firsts)
    apart = f"; margins where rows part: {at}" if firsts else ""
    return f"{same.sum()} of {same.size} tokens agree, {same.all(1).sum()} of {batch} rows{apart}"


def compare(path: pathlib.Path, dtype: str, rounds: int) -> None:
    rows = {"ours": Contender(ours, path, dtype), "transformers": Contender(theirs, path, dtype)}
    times: dict[tuple, list] = {(batch, name): [] for batch in BATCHES for name in rows}
    for _ in range(rounds):
        for batch, name in times:
            times[batch, name].append(rows[name].ask("seconds", batch))
    if dtype == "float32":
        for batch in BATCHES:
            print(f"batch {batch}: {agreement(rows['ours'], rows['transformers'], batch)}")
    peak = {name: row.end() for name, row in rows.items()}
    print(
        f"{'batch, contender':40s} {'tokens/s':>9s} {'first, ms':>10s} {'further, ms':>12s} "
        f"{'further/s':>10s} {'GB':>6s}"
    )
    for (batch, name), measured in times.items():
        first, whole = (statistics.median(column) for column in zip(*measured, strict=True))
        step = statistics.median(b - a for a, b in measured) / (NEW - 1)
        how = rows[name].told.get(batch, "")
        print(
            f"{f'{batch:2d}, {name} {how}':40s} {batch * NEW / whole:9.1f} {1e3 * first:10.0f} "
            f"{1e3 * step:12.1f} {batch / step:10.1f} {peak[name]:6.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    transformers.utils.logging.disable_progress_bar()
    for dtype in arguments.dtypes:
        with tempfile.TemporaryDirectory() as name:
            write_model(pathlib.Path(name), arguments.layers, dtype)
            compare(pathlib.Path(name), dtype, arguments.rounds)


if __name__ == "__main__":
    main()
