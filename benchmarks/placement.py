"""How many devices a token is sent to: experts as they are, shuffled, clustered, balanced, copied.

    python benchmarks/placement.py [--run runs/quickstart] [--devices 8] [--nodes 2]

Trains the quickstart unless --run holds it already. One half of the held-out tokens shows which
experts fire together and how busy each is; the table is of the other half, a mean over layers.
"""

import argparse
import dataclasses
import pathlib
import tempfile

import numpy as np

from deepseek_jax.core.config import load_config
from deepseek_jax.evaluation.placement import halves, held_out_routes, mean_traffic, orders, unmoved
from deepseek_jax.evaluation.suite import held_out, open_task
from deepseek_jax.ops.placement import Devices, replicated
from deepseek_jax.serving.language import load
from deepseek_jax.training.loop import Lent, train
from deepseek_jax.training.recipe import TrainConfig

QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=2)
    options = parser.parse_args()
    devices = Devices(num_devices=options.devices, num_nodes=options.nodes)
    with tempfile.TemporaryDirectory() as folder:
        if options.run is None:
            config = dataclasses.replace(load_config(QUICKSTART, TrainConfig), run_dir=folder)
            train(config, Lent(held_out, lambda *_: ""))
        lm = load(options.run or folder)
        targets = max(1, lm.config.num_mtp_layers)
        dataset = open_task(lm.recorded, lm.tokenizer, None, targets)
        seen, fresh = halves(held_out_routes(lm.model, lm.params, dataset, 16))
    moe = lm.config.moe
    num_experts, num_groups = moe.num_experts, moe.router.num_groups
    load_of = {
        path: [np.bincount(x.reshape(-1), minlength=num_experts).astype(float) for x in layers]
        for path, layers in seen.items()
    }

    def copied(spare: int) -> dict:
        num_slots = num_experts + spare * devices.num_devices
        return {
            path: [replicated(load, num_slots, devices, num_groups=num_groups) for load in loads]
            for path, loads in load_of.items()
        }

    rng, found = np.random.default_rng(0), orders(seen, moe, devices)
    same = unmoved(seen, num_experts)
    shuffled = {path: rng.permuted(order, axis=1) for path, order in same.items()}
    tokens = next(iter(fresh.values())).shape[1]
    print(f"{devices}, {tokens:,} tokens, {num_experts} experts")
    print("experts | devices a token | nodes a token | busiest device / mean")
    for name, slots in (
        ("as they are", same),
        ("shuffled", shuffled),
        ("clustered", found),
        ("EPLB, none copied", copied(0)),
        ("EPLB, a copy a device", copied(1)),
        ("EPLB, two copies a device", copied(2)),
    ):
        cost = mean_traffic(fresh, slots, devices)
        print(f"{name} | {cost.devices:.3f} | {cost.nodes:.3f} | {cost.imbalance:.3f}")


if __name__ == "__main__":
    main()
