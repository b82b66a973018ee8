"""How fast this machine could go, and where the time goes.

MFU needs a peak: published bfloat16 figures for accelerators, a measurement for anything else
(a CPU's rate differs four-fold by output type, so the best of three counts).
"""

import collections
import functools
import pathlib
import shutil
import time
import timeit

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData
from jax.sharding import AxisType

from deepseek_jax.core.storage import Object, Path, located, nearby
from deepseek_jax.core.target import published_flops

# The FLOP/s that matmuls can reach on all devices of the job together, and how that is known.
Peak = collections.namedtuple("Peak", "flops how")


def matmul_peak(seconds: float = 0.8) -> Peak:
    """The published peak of this job's devices, or what they do in about `seconds`."""
    kind = jax.devices()[0].device_kind
    if flops := published_flops(kind):
        return Peak(flops * jax.device_count(), f"published for {kind}")
    one = jax.make_mesh((1,), ("one",), (AxisType.Auto,), devices=jax.local_devices()[:1])
    with jax.set_mesh(one):  # in place of the caller's mesh, which would share the work out
        rate, name = _best_rate(seconds)
    # A CPU is one machine a process, into however many devices it is split.
    parts = jax.process_count() if jax.default_backend() == "cpu" else jax.device_count()
    return Peak(rate * parts, f"measured, {name}")


@functools.cache  # measured once a process
def _best_rate(seconds: float) -> tuple[float, str]:
    """The best FLOP/s and its kind of square matmul, taken in turns: neighbors slow all alike."""
    runs, best = [], (0.0, "")
    for given, result in (("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32",) * 2):
        product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=result))
        small, big = (jnp.ones((size, size), given) for size in (512, 2048))
        _seconds(product, small)  # compiles
        x = big if 64 * _seconds(product, small) < seconds else small  # nobody waits for ever
        _seconds(product, x)
        runs.append((product, x, f"{given} to {result}"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for product, x, name in runs:
            best = max(best, (2 * len(x) ** 3 / _seconds(product, x), name))
    return best


def _seconds(product, x) -> float:
    return timeit.timeit(lambda: product(x, x).block_until_ready(), number=1)


class Profiler:
    """Traces the steps first..last of a run into `run_dir`/profile, for xprof and TensorBoard.

    In a bucket the trace is written on this host's disk first.
    """

    def __init__(self, run_dir: str | Path, first: int, last: int):
        self._kept = located(run_dir) / "profile"
        self.directory = nearby(located(run_dir), "profile")
        self._first, self._last, self._tracing = first, last, False

    def before(self, step: int) -> None:
        """Call before `step` starts, with earlier work finished (jax.block_until_ready)."""
        if self._first <= step <= self._last and not self._tracing:
            jax.profiler.start_trace(self.directory)
            self._tracing = True

    def after(self, step: int) -> str:
        """Call when `step` has finished; gives the table of costly operations after the last."""
        return self.close() if step >= self._last else ""

    def close(self) -> str:
        """End a trace that is still open; its table, which profile/operations.txt gets as well."""
        if not self._tracing:
            return ""
        jax.profiler.stop_trace()
        self._tracing = False
        table = operation_table(self.directory)
        (self.directory / "operations.txt").write_text(table)
        if isinstance(self._kept, Object):
            for path in filter(pathlib.Path.is_file, self.directory.rglob("*")):
                name = path.relative_to(self.directory).as_posix()
                (self._kept / name).write_bytes(path.read_bytes())
            shutil.rmtree(self.directory)
        return table


def operation_table(directory: str | pathlib.Path, most: int = 20) -> str:
    """The operations that took longest in the newest trace under a profile directory.

    A line each: milliseconds over all calls and threads, share of all operations, calls, name.
    """
    traces = sorted(pathlib.Path(directory).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    planes = list(ProfileData.from_file(str(traces[-1])).planes) if traces else []
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    times, calls = collections.Counter(), collections.Counter()
    for line in [line for plane in devices or planes for line in plane.lines]:
        for event in line.events:
            name = event.name.partition(" = ")[0].lstrip("%")
            operation = line.name == "XLA Ops" or any(key == "hlo_op" for key, _ in event.stats)
            inside = ("while", "conditional", "call")  # their time is that of what they contain
            if operation and name.partition(".")[0] not in inside:
                times[name] += event.duration_ns / 1e6
                calls[name] += 1
    table = f"{'ms':>10} {'share':>6} {'calls':>6}  operation\n"
    for name, time_spent in times.most_common(most):
        share = time_spent / times.total()
        table += f"{time_spent:10.2f} {share:6.1%} {calls[name]:6d}  {name}\n"
    return table
