"""Written and spoken digits through noise: what fusion gains, and whom it believes.

    python benchmarks/audio_visual.py [--seeds 5] [--steps N]

Trains configs/audio_visual_digits.py with several seeds; then noise rises on one side of what was
held out while the other's stays. Writes benchmarks/audio_visual.json and
docs/audio_visual_digits.png. Intervals are standard errors over seeds, each of which has its own
training, noise and speakers' words; the difference to the better modality is taken seed by seed.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile

import jax
import numpy as np
from matplotlib.figure import Figure

from deepseek_jax.core.config import load_config
from deepseek_jax.evaluation.classification import answers, classification, scores_of
from deepseek_jax.training.loop import Lent, train
from deepseek_jax.training.recipe import TrainConfig

ROOT = pathlib.Path(__file__).parents[1]
LEVELS = {  # of the noisy side; what the other has meanwhile
    "image": ((0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0), 2.0),
    "sound": ((0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0), 0.4),
}
NAMES = ("image", "sound")
COLORS = {"together": "#1d2733", "image": "#2563a8", "sound": "#d9730d"}


def measured(model, params, dataset) -> dict[str, dict[str, list[float]]]:
    """Of each noisy side: accuracies and weights, a number a level."""
    found = {}
    for side, (levels, other) in LEVELS.items():
        rows = []
        for level in levels:
            noise = {f"{name}_noise": level if name == side else other for name in NAMES}
            batches = dataset.held_batches(64, **noise)
            given = model, params, batches, dataset.config.normalization
            rows.append(scores_of(answers(*given), model.config.names, dataset.config.classes))
        kept = [
            "accuracy",
            *(f"{name}_{kind}" for name in NAMES for kind in ("accuracy", "weight")),
        ]
        found[side] = {kind: [row[kind] for row in rows] for kind in kept}
    return found


def claims(seeds: list, side: str) -> dict:
    """Means and standard errors over seeds, and whether the three claims hold."""
    stacked = {kind: np.array([seed[side][kind] for seed in seeds]) for kind in seeds[0][side]}
    errors = {kind: x.std(0, ddof=1) / np.sqrt(len(seeds)) for kind, x in stacked.items()}
    means = {kind: x.mean(0) for kind, x in stacked.items()}
    alone = np.stack([stacked[f"{name}_accuracy"] for name in NAMES])
    best = alone.mean(1).argmax(0)
    gain = stacked["accuracy"] - np.take_along_axis(alone, best[None, None], 0)[0]
    gain_mean, gain_error = gain.mean(0), gain.std(0, ddof=1) / np.sqrt(len(seeds))
    above = gain_mean > 2 * gain_error
    middle = above[1:-1]
    weight = means[f"{side}_weight"]
    return {
        "levels": list(LEVELS[side][0]),
        "other": LEVELS[side][1],
        "mean": {kind: x.round(5).tolist() for kind, x in means.items()},
        "standard_error": {kind: x.round(5).tolist() for kind, x in errors.items()},
        "gain": gain_mean.round(5).tolist(),
        "gain_standard_error": gain_error.round(5).tolist(),
        "never_below_by_more_than_one_standard_error": bool((gain_mean >= -gain_error).all()),
        "middle_levels_above_by_two_standard_errors": int(middle.sum()),
        "weight_falls_at_every_level": bool((np.diff(weight) < 0).all()),
    }


def draw(found: dict, path: pathlib.Path) -> None:
    """Accuracy and weight over noise, a column a noisy side."""
    figure = Figure((10, 6.4), layout="constrained", dpi=120)
    for column, (side, one) in enumerate(found.items()):
        other = NAMES[1 - NAMES.index(side)]
        top, low = (figure.add_subplot(2, 2, 1 + column + 2 * row) for row in range(2))
        for label, kind in (("together", "accuracy"), *((n, f"{n}_accuracy") for n in NAMES)):
            bars = one["mean"][kind], one["standard_error"][kind]
            style = "-" if label == "together" else "--"
            top.errorbar(one["levels"], *bars, color=COLORS[label], label=label, linestyle=style)
        for name in NAMES:
            bars = one["mean"][f"{name}_weight"], one["standard_error"][f"{name}_weight"]
            low.errorbar(one["levels"], *bars, color=COLORS[name], label=name)
        top.set(title=f"Noise on the {side}, {one['other']:g} on the {other}", ylabel="accuracy")
        low.set(xlabel=f"noise on the {side}", ylabel="weight in the fusion", ylim=(0, 1))
        for axes in (top, low):
            axes.grid(color="#e6e9ee")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
    figure.savefig(path)


def write(found: dict, seeds: int, config: TrainConfig) -> None:
    """The numbers as JSON, and the picture."""
    about = {"seeds": seeds, "steps": config.steps, "batch_size": config.batch_size}
    path = ROOT / "benchmarks" / "audio_visual.json"
    path.write_text(json.dumps(about | {"noise_on": found}, indent=1) + "\n")
    draw(found, ROOT / "docs" / "audio_visual_digits.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    config = load_config(ROOT / "configs" / "audio_visual_digits.py", TrainConfig)
    config = dataclasses.replace(config, steps=options.steps or config.steps, eval_every=0)
    seeds: list[dict] = []

    def closing(model, params, dataset, _) -> str:
        seeds.append(measured(model, params, dataset))
        if len(seeds) > 1:  # after every seed, as a long run may be cut off
            write({side: claims(seeds, side) for side in LEVELS}, len(seeds), config)
        return json.dumps(seeds[-1])

    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
        for seed in range(options.seeds):
            own = dataclasses.replace(config, seed=seed, run_dir=f"{folder}/{seed}", log_every=100)
            train(own, Lent(classification, closing))
    for side in LEVELS if len(seeds) > 1 else ():
        one = claims(seeds, side)
        print(f"\nnoise on the {side} | together | image | sound | gain | weight of the {side}")
        kinds = ("accuracy", "image_accuracy", "sound_accuracy")
        for i, level in enumerate(one["levels"]):
            cells = [f"{one['mean'][k][i]:.3f} ± {one['standard_error'][k][i]:.3f}" for k in kinds]
            cells.append(f"{one['gain'][i]:+.3f} ± {one['gain_standard_error'][i]:.3f}")
            cells.append(f"{one['mean'][f'{side}_weight'][i]:.3f}")
            print(f"{level:g} | " + " | ".join(cells))
        print({name: value for name, value in one.items() if isinstance(value, bool | int)})


if __name__ == "__main__":
    main()
