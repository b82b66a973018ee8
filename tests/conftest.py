"""Every test runs on 8 CPU devices, with shape checks on and warnings as errors."""

import gc
import os
import pathlib
import tempfile

import fast

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        fast.FLAGS,
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",  # core/target.order_collectives
    ]
)

import bucket
import family_table
import jax
import pytest
from jaxtyping import install_import_hook

from deepseek_jax.core import precision, storage

jax.config.update("jax_numpy_rank_promotion", "raise")
# Each process has its own: JAX writes an entry in place, and another would read half of it.
_cache = pathlib.Path(tempfile.gettempdir()) / "deepseek_jax_test_compilation"
_cache /= os.environ.get("PYTEST_XDIST_WORKER", "alone")
jax.config.update("jax_compilation_cache_dir", str(_cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Python looks for garbage after 700 new objects, and a trace makes a hundred thousand.
gc.set_threshold(200_000, 20, 50)

# Shapes in the signatures are checked while the tests run.
install_import_hook(
    ["deepseek_jax.ops", "deepseek_jax.layers", "deepseek_jax.models"], "beartype.beartype"
)

# Where a test says nothing of precision it is float32, whatever this CPU has.
precision._cpu_flags = set


@pytest.fixture(autouse=True, scope="module")
def _forgotten():
    """Each file's compiled programs go with it: Linux maps at most 65,530 pieces into a process,
    and the whole suite's programs have more (then loading one more is a segmentation fault)."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def gs():
    """What gs:// means in a file's tests and in the processes that they start (tests/bucket.py)."""
    with bucket.serving() as (served, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        storage._bucket.cache_clear()
        yield served


def pytest_addoption(parser):
    parser.addoption("--write-families", action="store_true", help="write docs/families.md")


def pytest_xdist_auto_num_workers(config):
    """Runs over all files take two processes, others one."""
    return min(2, os.cpu_count()) if family_table.takes_all_files(config) else 0


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" and report.passed:
        report.user_properties.append(("shown", family_table.shows(item)))
    return report


def pytest_runtest_logreport(report):
    family_table.note(report)


def pytest_sessionfinish(session, exitstatus):
    done = exitstatus == 0 and not hasattr(session.config, "workerinput")
    if done and (wrong := family_table.difference(session.config)):
        print(f"\n{wrong}")
        session.exitstatus = 1
