"""A plan (training/planning), or the best of many, as text and as a picture."""

import pathlib
from typing import Any

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.monitoring.report import LOOK

PARTS = {  # of a device's memory, bottom to top: its color
    "parameters": "#2f6fde", "optimizer": "#7aa5f0", "batch and padding": "#c9d8f5",
    "temporaries": "#e8833a", "results beyond": "#b9c1cc", "code": "#5f6b7a",
}  # fmt: skip

HINT = (
    "to try          the experts' weights come to every device's tokens; with moe.exchange.kind "
    "padded the tokens go to the experts"
)


def table(found: dict[str, Any]) -> str:
    """A plan as text."""
    rows = [
        f"{found['config']} on {found['topology']}: {found['devices']} x {found['device']}, "
        f"{layout_text(found)}",
        f"parameters      {found['params'] / 1e9:,.3f} B, {found['active_params'] / 1e9:,.3f} B "
        f"active a token; {found['params_dtype']}, moments {', '.join(found['moments'])}",
        f"a step          {found['tokens']:,} tokens in rows of {found['sequence_length']:,}, "
        f"{found['model_flops'] / 1e12:,.1f} TFLOP, {found['compute']}, remat {found['remat']}",
    ]
    if found["estimate"]:
        rows.insert(
            1,
            "AN ESTIMATE     no compiler for this chip is here: the program is partitioned for "
            "virtual CPU devices, whose kernels, fusions and temporaries differ",
        )
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    m = {name: size / 1e9 for name, size in found["memory"].items()}
    if found["refusal"]:
        rows.append(f"{verdict}: the compiler says: {found['refusal']}")
        verdict = "needs"
    if m:
        needs = max(m["total"], found["refused_bytes"] / 1e9)
        rows.append(
            f"{verdict:15} {needs:.2f} of {found['memory_limit'] / 1e9:.1f} GB a device: "
            f"arguments {m['arguments']:.2f}, temporaries {m['temporaries']:.2f}, outputs beyond "
            f"them {m['outputs'] - m['aliased']:.2f}, code {m['code']:.2f}"
        )
    if m.get("host"):
        rows.append(f"on its host     {m['host']:.2f} of {found['host_limit'] / 1e9:.1f} GB")
    if not found["refusal"]:
        rows.append("collectives     (times a step, GB that a device sends)")
        rows += [
            f"  {row['kind']:20} {' x '.join(row['axes']):24} {row['count']:8,} "
            f"{row['bytes'] / 1e9:10.3f}"
            for row in found["collectives"]
        ]
        times = ", ".join(
            f"{_said(name)} {1e3 * t:,.1f}" for name, t in found["bound_seconds"].items()
        )
        rows += [
            f"bounds, ms      {times}",
            f"at best         {1e3 * found['step_seconds']:,.1f} ms a step, bound by "
            f"{_said(found['bound'])}: {found['tokens'] / found['step_seconds']:,.0f} "
            f"tokens/s, MFU {found['mfu']:.1%}",
        ]
        sparse = found["active_params"] < found["params"] and "expert" in found["mesh"]
        if sparse and found["exchange"] == "none" and found["bound"].endswith("network"):
            rows.append(HINT)
    rows += [f"warning         {remark}" for remark in found["remarks"]]
    return "\n".join([*rows, f"compiled in     {found['compile_seconds']:.0f} s"])


def layout_text(found: dict[str, Any]) -> str:
    """The mesh, and how tokens come to experts where they do."""
    travel = "" if found["exchange"] == "none" else f", {found['exchange']} exchange"
    return mesh_text(found["mesh"]) + travel


def mesh_text(mesh: dict[str, int]) -> str:
    """`fsdp 16 x expert 32`."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items()) or "one device"


def _said(bound: str) -> str:
    return bound.replace("_", " ")


def ranking(found: list[dict[str, Any]]) -> str:
    """Plans that were compiled in a search, best first, as a table."""
    head = f"{'mesh':32} {'remat':8} {'batch':>7} {'GB':>7} {'of':>6} {'ms a step':>10} {'MFU':>6}"
    rows = [head + f" {'ns a token':>11}  bound"]
    for one in found:
        if not one["fits"]:
            continue
        seconds = one["step_seconds"]
        rows.append(
            f"{mesh_text(one['mesh']):32} {one['remat']:8} {one['batch_size']:7,} "
            f"{one['memory']['total'] / 1e9:7.2f} {one['memory_limit'] / 1e9:6.1f} "
            f"{1e3 * seconds:10,.1f} {one['mfu']:6.1%} {1e9 * seconds / one['tokens']:11.3f}  "
            f"{_said(one['bound'])}"
        )
    refused = sum(not one["fits"] for one in found)
    return "\n".join(rows + [f"{refused} more were compiled and do not fit"] * bool(refused))


def drawable(path: str | pathlib.Path) -> pathlib.Path:
    """The path of a picture; InputError unless it ends in .png or .svg."""
    path = pathlib.Path(path)
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"--picture {path}: it ends in .png or .svg, please")
    return path


def draw(found: dict[str, Any], path: str | pathlib.Path) -> None:
    """Write a plan's picture: a device's memory by kind, and the step on its roofline.

    Raises InputError for a kind of file that is neither .png nor .svg.
    """
    path = drawable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with require("matplotlib").rc_context(LOOK):
        figure = require("matplotlib.figure").Figure(figsize=(10.5, 4.2), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1, 1.6))
        _memory(left, found)
        _bounds(middle, found)
        _roofline(right, found)
        estimate = " (an estimate)" if found["estimate"] else ""
        figure.suptitle(
            f"{found['config']} on {found['topology']}{estimate}: {layout_text(found)}, "
            f"batch {found['batch_size']:,} x {found['sequence_length']:,}, remat {found['remat']}",
            x=0.01,
            ha="left",
        )
        figure.savefig(path)


def draw_scaling(plans: list[dict[str, Any]], path: str | pathlib.Path) -> list[float]:
    """Write the picture of plans of one batch on more and more devices.

    Returns each one's efficiency: tokens a second and device over those of the best; 0 for one that
    does not fit.
    """
    fitting = [one for one in plans if one["fits"]]
    speeds = [one["tokens"] / one["step_seconds"] / one["devices"] for one in fitting]
    chips = [one["devices"] for one in fitting]
    with require("matplotlib").rc_context(LOOK):
        figure = require("matplotlib.figure").Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name in {name: None for one in fitting for name in one["bound_seconds"]}:
            times = [one["bound_seconds"][name] for one in fitting]
            if max(times) > 0:
                left.loglog(chips, times, "o-", markersize=4, label=_said(name))
        left.set_title("Bounds of a step, seconds")
        left.legend()
        right.semilogx(
            chips, [100 * speed / max(speeds) for speed in speeds], "o-", label="efficiency"
        )
        right.semilogx(chips, [100 * one["mfu"] for one in fitting], "s--", label="MFU")
        right.set(ylim=(0, 105))
        right.set_title("Percent, at best")
        right.legend()
        for axes in (left, right):
            axes.set_xticks(chips, [f"{n:,}" for n in chips])
            axes.minorticks_off()
            axes.set_xlabel("chips")
            axes.grid(True, alpha=0.6)
        figure.savefig(path)
    found = dict(zip(chips, speeds, strict=True))
    return [found.get(one["devices"], 0.0) / max(speeds) for one in plans]


def memory_parts(found: dict[str, Any]) -> dict[str, int]:
    """A device's bytes by kind, in the order of PARTS; together they are the total."""
    m = found["memory"]
    known = {name: m[name] for name in ("parameters", "optimizer")}
    return known | {
        "batch and padding": m["arguments"] - sum(known.values()),
        "temporaries": m["temporaries"],
        "results beyond": m["outputs"] - m["aliased"],
        "code": m["code"],
    }


def _memory(axes: Any, found: dict[str, Any]) -> None:
    limit, below = found["memory_limit"] / 1e9, 0.0
    for name, size in memory_parts(found).items():
        axes.bar(0, size / 1e9, bottom=below, width=0.5, color=PARTS[name], label=name)
        below += size / 1e9
    axes.axhline(limit, color="#c0392b", linewidth=1.2, linestyle="--")
    axes.annotate(f"limit {limit:.1f}", (0.98, limit), (0, 3), ha="right", color="#c0392b",
                  xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
    axes.set(xlim=(-0.4, 1.5), ylim=(0, 1.12 * max(limit, below)), xticks=[], ylabel="GB a device")
    axes.set_title(f"Memory: {below:.1f} GB {'fits' if found['fits'] else 'does not fit'}")
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], names[::-1], loc="upper right", bbox_to_anchor=(1.0, 0.86), fontsize=8
    )


def _bounds(axes: Any, found: dict[str, Any]) -> None:
    axes.set_title("Bounds of a step")
    if "bound_seconds" not in found:
        axes.text(0.5, 0.5, "there is no program", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    times = {_said(name): 1e3 * t for name, t in found["bound_seconds"].items()}
    colors = ["#2f6fde" if t == max(times.values()) else "#b9c1cc" for t in times.values()]
    bars = axes.barh(list(times), list(times.values()), color=colors)
    axes.bar_label(
        bars, [f"{t:,.3g}" if t < 10 else f"{t:,.0f}" for t in times.values()], padding=3
    )
    axes.invert_yaxis()
    axes.set(xlabel="ms", xlim=(0, 1.25 * max(times.values())))


def _roofline(axes: Any, found: dict[str, Any]) -> None:
    axes.set_title("Roofline of a device")
    peak, bandwidth = found["peak_flops"] / 1e12, found["bandwidth"] / 1e12
    ridge = peak / bandwidth
    flops = found["model_flops"] / found["devices"] / 1e12
    intensity = flops / (found["bytes_moved"] / 1e12) if "bytes_moved" in found else ridge
    ends = min(ridge, intensity) / 20, max(ridge, intensity) * 20
    roof = ends[0], ridge, ends[1]
    axes.loglog(roof, [min(peak, bandwidth * x) for x in roof], color="#1d2733")
    axes.annotate(f"{peak:,.0f} TFLOP/s", (ends[1], peak), (0, 4), ha="right",
                  textcoords="offset points")  # fmt: skip
    if "step_seconds" in found:
        axes.plot(intensity, flops / found["step_seconds"], "o", color="#e8833a", markersize=9)
        said = f"at best {found['mfu']:.0%} of the peak,\nbound by {_said(found['bound'])}"
        axes.text(0.98, 0.05, said, ha="right", transform=axes.transAxes)
    axes.set(xlabel="model FLOPs a byte of HBM moved", ylabel="TFLOP/s")
    axes.grid(True, alpha=0.6)
