"""A run as one page of pictures: losses, learning rate, speed, routers, expert load.

Everything is read from the run directory's JSON lines, so a run can be drawn while it trains.
"""

import base64
import contextlib
import html
import io
import pathlib
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepseek_jax.core.config import from_dict, read_json
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.counts import describe
from deepseek_jax.models.decoder import Decoder, layer_table
from deepseek_jax.monitoring.metrics import read_lines

BLUE, ORANGE, GRAY, PALE = "#2563a8", "#d9730d", "#5f6b7a", "#e6e9ee"
MOMENTS, COLUMNS = 6, 160  # maps of the whole run; columns of a layer's map over time

PICTURES = {
    "loss": ("Learning", "Lower is better; bits a byte compare across tokenizers."),
    "optimization": ("Optimization", "What moves the weights, and further losses."),
    "speed": ("Speed", "How fast, and how much of what the hardware's matmuls reach."),
    "router": ("Routers", "How evenly tokens spread over experts, mean of layers."),
}
PANELS = (  # picture, title, unit, keys of metrics.jsonl or, behind eval/, of eval.jsonl
    ("loss", "Loss", "nats a token", ("loss", "eval/loss")),
    ("loss", "Held-out text", "bits a byte", ("eval/bits_per_byte",)),
    ("optimization", "Learning rate", "", ("learning_rate",)),
    ("optimization", "Gradient norm before clipping", "", ("grad_norm",)),
    ("speed", "Throughput", "tokens a second", ("tokens_per_second",)),
    ("speed", "Model FLOPs utilization", "fraction of the matmul peak", ("mfu",)),
    ("router", "Fullest expert", "load / even load - 1", ("router/max_violation",)),
    ("router", "Spread of load", "std / even load", ("router/utilization_std",)),
    ("router", "Entropy", "1: all experts alike", ("router/entropy",)),
    ("router", "Experts without a token", "in all layers", ("router/dead_experts",)),
    ("router", "Dropped by capacity", "fraction of choices", ("router/dropped_fraction",)),
)
EXACT = ("learning_rate", "router/dead_experts", "router/dropped_fraction")  # never smoothed

STYLE = """
body{max-width:1120px;margin:2.5rem auto;padding:0 1.5rem;color:#1d2733;background:#fff;
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.7rem;margin:0}h2{margin:2.5rem 0 0;
font-size:1.2rem}p{color:#5f6b7a;margin:.2rem 0 .8rem}img{max-width:100%}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:.8rem;margin:1.5rem 0}
dl div{background:#f5f7fa;border-radius:8px;padding:.6rem .9rem}
dt{color:#5f6b7a;font-size:.85rem}dd{margin:0;font-weight:600}
"""

Series = dict[str, list[tuple[int, float]]]  # (step, value) by key


def write_report(run_dir: str | pathlib.Path, output: str | pathlib.Path | None = None) -> str:
    """Draw a run into `output` (default: its report/): report.html, self-contained, and PNGs.

    Returns the page's path. Raises InputError when the run has no logged step.
    """
    run_dir = pathlib.Path(run_dir)
    series: Series = {}
    for file, prefix in (("metrics.jsonl", ""), ("eval.jsonl", "eval/")):
        for row in read_lines(run_dir / file):
            for key in [key for key, value in row.items() if value is not None]:
                series.setdefault(prefix + key, []).append((row["step"], row[key]))
    if not series:
        why = "metrics.jsonl has no logged step" if run_dir.is_dir() else "no such run directory"
        raise InputError(f"{run_dir}: nothing to draw: {why}")
    config = read_json(run_dir / "config.json") if (run_dir / "config.json").exists() else {}
    model = None
    with contextlib.suppress(InputError):  # another version's run is drawn without its model
        model = from_dict(Decoder, config.get("model"))
    title = html.escape(run_dir.absolute().name)
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    page += f"<style>{STYLE}</style><h1>{title}</h1><p>A training run of deepseek_jax.</p><dl>"
    for name, text in _facts(series, config, model).items():
        page += f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>"
    page += "</dl>"
    loads = read_lines(run_dir / "expert_load.jsonl")
    pictures = _curves(series) | _heat_maps(loads, layer_table(model) if model else {})
    directory = pathlib.Path(output or run_dir / "report")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, (heading, text, figure) in pictures.items():
            buffer = io.BytesIO()
            FigureCanvasAgg(figure).print_png(buffer)
            (directory / f"{name}.png").write_bytes(buffer.getvalue())
            inline = base64.b64encode(buffer.getvalue()).decode()
            page += f"<h2>{heading}</h2><p>{text}</p>"
            page += f'<img alt="{heading}" src="data:image/png;base64,{inline}">'
        (directory / "report.html").write_text(page + "</html>\n")
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror})") from None
    return str(directory / "report.html")


def _facts(series: Series, config: dict[str, Any], model: Decoder | None) -> dict[str, str]:
    """What stands at the top of the page; what a run lacks is left out."""
    facts = {"Steps": f"{max(points[-1][0] for points in series.values()):,}"}
    if {"batch_size", "sequence_length", "steps"} <= config.keys():
        facts["Steps"] += f" of {config['steps']:,}"
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
        attention = type(model.attention).__name__
        facts["Layers"] = f"{model.num_layers} of width {model.embed_dim}, {attention}"
    if model and model.moe:
        moe = model.moe
        facts["Experts"] = f"{moe.router.num_active_experts} of {moe.num_experts} a token"
        facts["Router"] = f"{type(moe.router).__name__}, {moe.num_shared_experts} shared experts"
    return facts


def _grid(count: int, columns: int, height: float) -> tuple[Figure, list]:
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (6 if columns == 1 else 11, height * rows)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, list(axes[:count])


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left", color="#1d2733")
    axes.set_xlabel(x, fontsize=9, color=GRAY)
    axes.set_ylabel(y, fontsize=9, color=GRAY)
    axes.tick_params(labelsize=8.5, colors=GRAY, length=2)


def _curves(series: Series) -> dict[str, tuple[str, str, Figure]]:
    """{file name: (heading, text, figure)} of everything that is a curve."""
    drawn, known = {}, {key for *_, keys in PANELS for key in keys}
    others = sorted(key for key in series if key.endswith("loss") and key not in known)
    table = [*PANELS, *(("optimization", key, "", (key,)) for key in others)]
    for name, (heading, text) in PICTURES.items():
        panels = [p for p in table if p[0] == name and any(key in series for key in p[3])]
        if panels:
            figure, grid = _grid(len(panels), 2 if len(panels) < 3 else 3, 3.3)
            for axes, (_, title, unit, keys) in zip(grid, panels, strict=True):
                for key, color in zip(keys, (BLUE, ORANGE), strict=False):
                    _draw(axes, key, series.get(key, []), color)
                axes.grid(color=PALE, linewidth=0.8)
                axes.spines[["top", "right"]].set_visible(False)
                _label(axes, title, "step", unit)
                if sum(key in series for key in keys) > 1:
                    axes.legend(frameon=False, fontsize=9)
            drawn[name] = heading, text, figure
    return drawn


def _draw(axes: Any, key: str, points: list[tuple[int, float]], color: str) -> None:
    steps, values = np.array(points, float).reshape(-1, 2).T
    window = len(values) // 60 * (key not in EXACT)
    if window:  # a mean of neighbors, of fewer at the ends, over the pale curve
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        ones, counts = np.ones(2 * window + 1), np.ones(len(values))
        values = np.convolve(values, ones)[window:-window]
        values /= np.convolve(counts, ones)[window:-window]
    dots = {"marker": "o", "markersize": 4} if len(values) < 40 else {}
    label = "held-out" if key.startswith("eval/") else "training"
    axes.plot(steps, values, color=color, linewidth=1.8, label=label, **dots)
    if len(values) and not np.ptp(values):
        axes.margins(y=1)  # a constant: no room for made-up wiggles


def _heat_maps(
    loads: list, table: dict[str, tuple[int, ...]]
) -> dict[str, tuple[str, str, Figure]]:
    """Expert load, layer x expert at several moments, and expert x time for every layer."""
    shares = {}  # label -> [steps, experts], 1 is even load
    paths = {path for row in loads for path in row["load"]}
    for path in sorted(paths, key=lambda path: (table.get(path, (1e9,)), path)):
        counts = np.array([row["load"][path] for row in loads if path in row["load"]], float)
        counts /= np.maximum(counts.mean(-1, keepdims=True), 1e-9)
        names = [f"layer {i}" for i in table.get(path, ())]
        for row, name in enumerate(names or [f"{path} {i}" for i in range(counts.shape[1])]):
            shares[name + " (MTP)" * path.startswith("mtp")] = counts[:, row]
    if not shares:
        return {}
    steps = [row["step"] for row in loads]
    spread = np.concatenate([np.abs(share - 1).ravel() for share in shares.values()])
    half = float(np.clip(np.percentile(spread, 99), 0.1, 1.0))
    look = {"cmap": "RdBu_r", "vmin": 1 - half, "vmax": 1 + half, "aspect": "auto"}

    parts = np.array_split(np.arange(len(steps)), min(MOMENTS, len(steps)))
    moments, grid = _grid(len(parts), 3, 0.9 + 0.18 * min(len(shares), 60))
    widest = max(share.shape[1] for share in shares.values())
    ticks = range(0, len(shares), -(-len(shares) // 20))
    for axes, part in zip(grid, parts, strict=True):
        image = np.full((len(shares), widest), np.nan)
        for row, share in enumerate(shares.values()):
            image[row, : share.shape[1]] = share[part].mean(0)
        colors = axes.imshow(image, interpolation="nearest", **look)
        ends = sorted({steps[part[0]], steps[part[-1]]})
        _label(axes, "step " + " to ".join(f"{end:,}" for end in ends), "expert", "")
        shown = axes.get_subplotspec().is_first_col()
        axes.set_yticks(ticks, [list(shares)[i] if shown else "" for i in ticks])
    bar = moments.colorbar(colors, ax=grid, extend="max" if half == 1 else "both", aspect=30)
    _label(bar.ax, "", "", "load / even load")

    time, grid = _grid(len(shares), 4, 2.0)
    parts = np.array_split(np.arange(len(steps)), min(COLUMNS, len(steps)))
    for axes, (name, share) in zip(grid, shares.items(), strict=True):
        image = np.stack([share[part].mean(0) for part in parts], 1)
        extent = (steps[0], max(steps[-1], steps[0] + 1), share.shape[1] - 0.5, -0.5)
        axes.imshow(image, interpolation="nearest", extent=extent, **look)
        _label(axes, name, "step", "expert")
    text = "The tokens that an expert gets over an even share: white is even, red more, blue less."
    heading = "Expert load: layer x expert"
    return {
        "expert_load": (heading, f"{text} Each map is the mean of the steps above it.", moments),
        "expert_load_time": ("Expert load over time", "A map for every layer.", time),
    }
