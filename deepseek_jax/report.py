"""Command: draw a run (losses, expert load, throughput) as a page of pictures."""

import dataclasses
import sys

import tyro

from deepseek_jax.core.errors import run_command
from deepseek_jax.monitoring.report import write_report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Draw a run's losses, learning rate, speed and expert load into report.html and PNGs."""

    run: tyro.conf.Positional[str]
    """The run directory (it holds metrics.jsonl)."""
    output: str | None = None
    """Where the page and the pictures go; by default RUN/report."""


def main(argv: list[str]) -> None:
    """Write the page and print where it is."""
    arguments = tyro.cli(Arguments, args=argv, prog="deepseek_jax.report")
    print(write_report(arguments.run, arguments.output), file=sys.stdout)


if __name__ == "__main__":
    run_command(main)
