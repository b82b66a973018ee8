"""A run as one page of pictures: losses, learning rate, speed, routers, expert load.

Everything is read from the run directory's JSON lines, so a run can be drawn while it trains.
"""

import base64
import contextlib
import html
import io
from typing import Any

import numpy as np

from deepseek_jax.core.config import from_dict, read_json
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.core.storage import Path, located
from deepseek_jax.models.counts import describe
from deepseek_jax.models.decoder import Decoder, layer_table
from deepseek_jax.monitoring.metrics import read_lines

LOOK = {
    "figure.dpi": 130, "font.size": 9, "axes.titlelocation": "left", "axes.labelcolor": "#5f6b7a",
    "xtick.color": "#5f6b7a", "ytick.color": "#5f6b7a", "grid.color": "#e6e9ee",
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
}  # fmt: skip
PARTS = 6, 160  # maps of the whole run; columns of a layer's map over time

PICTURES = {
    "loss": ("Learning", "Lower is better; bits a byte compare across tokenizers."),
    "training": ("Training", "What moves the weights, how fast it goes, and further losses."),
    "router": ("Routers", "How evenly tokens spread over experts, mean of layers."),
}
PANELS = (  # picture, title, unit, keys of metrics.jsonl or, behind eval/, of eval.jsonl
    ("loss", "Loss", "nats", ("loss", "eval/loss", "guessing_loss")),
    ("loss", "Held-out text", "bits a byte", ("eval/bits_per_byte",)),
    ("loss", "Held-out retrieval", "of queries", ("eval/recall_at_10", "eval/chance_at_10")),
    ("loss", "Right within the batch", "of rows", ("recall_at_1", "recall_at_1_back")),
    ("loss", "Loss of written captions", "nats", ("caption_loss",)),
    ("loss", "Accuracy", "of rows", ("accuracy", "eval/accuracy")),
    ("training", "Temperature of the pairs", "", ("temperature",)),
    ("training", "Effective rank of image vectors", "1: collapsed", ("effective_rank",)),
    ("training", "Learning rate", "", ("learning_rate",)),
    ("training", "Gradient norm before clipping", "", ("grad_norm",)),
    ("training", "Throughput", "tokens a second", ("tokens_per_second",)),
    ("training", "Model FLOPs utilization (MFU)", "of the matmul peak", ("mfu",)),
    ("router", "Fullest expert", "load / even load - 1", ("router/max_violation",)),
    ("router", "Spread of load", "std / even load", ("router/utilization_std",)),
    ("router", "Entropy", "1: all experts alike", ("router/entropy",)),
    ("router", "Experts without a token", "in all layers", ("router/dead_experts",)),
    ("router", "Dropped by capacity", "fraction of choices", ("router/dropped_fraction",)),
)
CURVES = {  # color and label of those that do not say which side they are of
    "guessing_loss": ("#8b949e", "where nothing is learned"),
    "eval/chance_at_10": ("#8b949e", "by chance"),
    "recall_at_1": ("#2563a8", "image to text"),
    "recall_at_1_back": ("#1a7f37", "text to image"),
}

STYLE = """
body{max-width:1120px;margin:2.5rem auto;padding:0 1.5rem;font:16px/1.5 system-ui,sans-serif;
color:#1d2733;background:#fff}h1,h2,dd{margin:0}h2{margin-top:2.5rem}img{max-width:100%}
p,dt{color:#5f6b7a;margin:.2rem 0 .8rem}dt{margin:0;font-size:.85rem}dd{font-weight:600}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:.8rem;margin:1.5rem 0}
dl div{background:#f5f7fa;border-radius:8px;padding:.6rem .9rem}
"""


def write_report(run_dir: str | Path, output: str | Path | None = None) -> str:
    """Draw a run into `output` (default: its report/): report.html, self-contained, and PNGs.

    Returns the page's path. Raises InputError when the run has no logged step.
    """
    run_dir = located(run_dir)
    series: dict[str, list] = {}  # (step, value) by key
    for file, prefix in (("metrics.jsonl", ""), ("eval.jsonl", "eval/")):
        for row in read_lines(run_dir / file):
            for key, value in row.items():
                if value is not None:
                    series.setdefault(prefix + key, []).append((row["step"], value))
    if not series:
        why = "metrics.jsonl has no logged step" if run_dir.is_dir() else "no such run directory"
        raise InputError(f"{run_dir}: nothing to draw: {why}")
    config, model = {}, None
    with contextlib.suppress(InputError):  # without a config, or one of this version, just curves
        config = read_json(run_dir / "config.json")
        model = from_dict(Decoder, config.get("model"))
    title = html.escape(run_dir.absolute().name)
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    page += f"<style>{STYLE}</style><h1>{title}</h1><p>A training run of deepseek_jax.</p><dl>"
    facts = _facts(series, config, model).items()
    page += "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in facts) + "</dl>"
    loads = read_lines(run_dir / "expert_load.jsonl")
    with require("matplotlib").rc_context(LOOK):
        pictures = _curves(series) | _heat_maps(loads, layer_table(model) if model else {})
    directory = located(output or run_dir / "report")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, (heading, text, figure) in pictures.items():
            figure.savefig(drawn := io.BytesIO())
            (directory / f"{name}.png").write_bytes(drawn.getvalue())
            inline = base64.b64encode(drawn.getvalue()).decode()
            page += f"<h2>{heading}</h2><p>{text}</p>"
            page += f'<img alt="{heading}" src="data:image/png;base64,{inline}">'
        for path in sorted((run_dir / "pictures").glob("*.png"), key=str):
            page += f"<h2>{html.escape(path.stem.replace('_', ' ').capitalize())}</h2>"
            inline = base64.b64encode(path.read_bytes()).decode()
            page += f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{inline}">'
        (directory / "report.html").write_text(page + "</html>\n")
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror})") from None
    return str(directory / "report.html")


def _facts(series: dict[str, list], config: dict, model: Decoder | None) -> dict[str, str]:
    """What stands at the top of the page; what a run lacks is left out."""
    facts = {"Steps": f"{max(points[-1][0] for points in series.values()):,}"}
    if config:
        stages = config.get("stages") or [{}]
        total = sum(stage.get("steps") or config["steps"] for stage in stages)
        facts["Steps"] += f" of {total:,}"
        facts["Batch"] = f"{config['batch_size']} x {config['sequence_length']:,} tokens"
    for key, name, form, last in (
        ("loss", "Training loss", ".4f", 20),
        ("eval/loss", "Held-out loss", ".4f", 1),
        ("eval/bits_per_byte", "Held-out bits a byte", ".4f", 1),
        ("tokens_per_second", "Tokens a second", ",.0f", 100),
        ("mfu", "Model FLOPs utilization", ".1%", 100),
    ):
        if key in series:
            facts[name] = format(np.median([value for _, value in series[key][-last:]]), form)
    if model:
        facts["Model"] = describe(model)
        facts["Layers"] = f"{model.num_layers} of width {model.embed_dim}"
        if moe := model.moe:
            active = moe.router.num_active_experts
            facts["Layers"] += f", {moe.num_experts} experts ({active} active)"
    return facts


def _grid(count: int, columns: int, height: float) -> tuple[Any, list]:
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = require("matplotlib.figure").Figure(
        (6 if columns == 1 else 11, height * rows), layout="constrained"
    )
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _curves(series: dict[str, list]) -> dict[str, tuple[str, str, Any]]:
    """{file name: (heading, text, figure)} of everything that is a curve."""
    drawn, table = {}, list(PANELS)
    for key in sorted(series.keys() - {key for *_, keys in PANELS for key in keys}):
        if key.endswith(("_accuracy", "_weight")) and not key.startswith("eval/"):
            title = key.replace("_", " ").capitalize()
            table.append(("loss", title, "of rows", (key, f"eval/{key}")))
        elif key.endswith("loss"):
            table.append(("router" if "router/" in key else "training", key, "", (key,)))
    for name, (heading, text) in PICTURES.items():
        panels = [p for p in table if p[0] == name and any(key in series for key in p[3])]
        if panels:
            figure, grid = _grid(len(panels), 2 if len(panels) in (2, 4) else 3, 3.3)
            for axes, (_, title, unit, keys) in zip(grid, panels, strict=True):
                found = [key for key in keys if key in series]
                for key in found:
                    _draw(axes, key, series[key])
                axes.set(title=title, xlabel="step", ylabel=unit)
                axes.grid()
                axes.locator_params(axis="x", nbins=5, integer=True)
                axes.ticklabel_format(axis="y", useOffset=False)
                if len(found) > 1:
                    axes.legend()
            drawn[name] = heading, text, figure
    return drawn


def _draw(axes: Any, key: str, points: list[tuple[int, float]]) -> None:
    """A curve; a long one pale, and over it the mean of its neighbors, of fewer at the ends."""
    steps, values = np.array(points, float).T
    side = ("#d9730d", "held-out") if key.startswith("eval/") else ("#2563a8", "training")
    color, label = CURVES.get(key, side)
    if window := len(values) // 60 * (key != "learning_rate"):
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        near = np.ones(2 * window + 1)
        counts = np.convolve(np.ones(len(values)), near, "same")
        values = np.convolve(values, near, "same") / counts
    marker = "o" if len(values) < 40 else ""
    axes.plot(steps, values, color=color, label=label, marker=marker, markersize=4)


def _heat_maps(loads: list, table: dict[str, tuple]) -> dict[str, tuple[str, str, Any]]:
    """Expert load, layer x expert at several moments, and expert x time for every layer."""
    shares = {}  # label -> [steps, experts], 1 is even load
    paths = list(loads[-1]["load"]) if loads else []
    loads = [row for row in loads if list(row["load"]) == paths]
    for path in sorted(paths, key=lambda path: (table.get(path, (1e9,)), path)):
        counts = np.array([row["load"][path] for row in loads], float)
        counts /= np.maximum(counts.mean(-1, keepdims=True), 1e-9)
        names = [f"layer {i}" for i in table.get(path, ())]
        for row, name in enumerate(names or [f"{path} {i}" for i in range(counts.shape[1])]):
            shares[name + " (MTP)" * path.startswith("mtp")] = counts[:, row]
    if not shares:
        return {}
    steps, labels = [row["step"] for row in loads], list(shares)
    stacked = np.stack(list(shares.values()))  # [layers, steps, experts]
    half = float(np.clip(np.percentile(np.abs(stacked - 1), 99), 0.1, 1.0))
    parts, bins = (np.array_split(np.arange(len(steps)), min(n, len(steps))) for n in PARTS)
    maps = []
    for part in parts:
        ends = sorted({steps[part[0]], steps[part[-1]]})
        title = "step " + " to ".join(f"{end:,}" for end in ends)
        maps.append((title, stacked[:, part].mean(1), None))
    moments = _maps(maps, 3, 0.9 + 0.18 * min(len(labels), 60), "expert", "", half)
    ticks = range(0, len(labels), -(-len(labels) // 20))
    for index, axes in enumerate(moments.axes[: len(maps)]):
        axes.set_yticks(ticks, ["" if index % 3 else labels[i] for i in ticks])
    columns = np.stack([stacked[:, part].mean(1) for part in bins], -1)  # [layers, experts, bins]
    extent = (steps[0], max(steps[-1], steps[0] + 1), columns.shape[1] - 0.5, -0.5)
    maps = [(label, image, extent) for label, image in zip(labels, columns, strict=True)]
    time = _maps(maps, 4, 2.0, "step", "expert", half)
    text = "An expert's tokens over an even share: white is even, red more, blue less. Each map is"
    return {
        "expert_load": ("Expert load: layer x expert", f"{text} the mean of its steps.", moments),
        "expert_load_time": ("Expert load over time", f"{text} one layer.", time),
    }


def _maps(cells: list, columns: int, height: float, x: str, y: str, half: float) -> Any:
    figure, grid = _grid(len(cells), columns, height)
    look = {"cmap": "RdBu_r", "vmin": 1 - half, "vmax": 1 + half, "interpolation": "nearest"}
    for axes, (title, image, extent) in zip(grid, cells, strict=True):
        drawn = axes.imshow(image, aspect="auto", extent=extent, **look)
        axes.set(title=title, xlabel=x, ylabel=y)
    extend, aspect = "max" if half == 1 else "both", 6 * figure.get_figheight()
    figure.colorbar(drawn, ax=grid, extend=extend, aspect=aspect, label="load / even load")
    return figure
