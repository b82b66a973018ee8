"""Command: draw a run (losses, expert load, throughput) as a page of pictures."""

import tyro

from deepseek_jax.core.errors import run_command
from deepseek_jax.monitoring.report import write_report


def report(run: tyro.conf.Positional[str], output: str | None = None) -> None:
    """Draw a run's losses, learning rate, speed and expert load: report.html and PNGs.

    Args:
      run: The run directory (it holds metrics.jsonl).
      output: Where the page and the pictures go; by default RUN/report.
    """
    print(write_report(run, output))


def main(argv: list[str]) -> None:
    """Write the page and print its path."""
    tyro.cli(report, args=argv, prog="deepseek_jax.report")


if __name__ == "__main__":
    run_command(main)
