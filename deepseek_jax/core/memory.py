"""Huge pages for large arrays: the C library asks for them only if told before a process starts.

A training step on a CPU passes gigabytes through fresh memory. In pages of 4 KiB the kernel's
faults and the address look-ups take a fifth of the step (benchmarks/README.md).
"""

import os
import pathlib
import sys

TUNABLES = "glibc.malloc.hugetlb=1"  # advise the kernel to back large blocks with huge pages
PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_pages() -> dict[str, str]:
    """What a new process needs in its environment; nothing where the kernel has no such pages.

    Nor where the variable is set already, which is also the way to switch this off: GLIBC_TUNABLES=
    """
    if "GLIBC_TUNABLES" in os.environ or not PAGES.exists() or "[never]" in PAGES.read_text():
        return {}
    return {"GLIBC_TUNABLES": TUNABLES}


def restart_with_huge_pages(command: str) -> None:
    """Start this process anew with glibc's huge pages on, if it is `python -m command`.

    It keeps its id, arguments and files. Call it before threads or devices are started.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.name != command or not (wanted := huge_pages()):
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)
