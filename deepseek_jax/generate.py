"""Command: complete prompts from a checkpoint."""

import dataclasses
import itertools

import tyro

from deepseek_jax.core.errors import run_command
from deepseek_jax.serving.language import check_request, load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Complete prompts: one streams as it comes, several are completed as one batch."""

    checkpoint: str
    """A run directory (its newest good checkpoint is used) or one of its checkpoints."""
    prompt: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """The text to go on from; several texts are several prompts."""
    max_new_tokens: int = 128
    """The most tokens to add to each prompt."""
    temperature: float = 0.0
    """What divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw from this many likeliest tokens only."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens that hold this much probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that already stand in the text become less likely."""
    seed: int = 0
    """Of the draws."""
    stop: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Texts before which a completion ends."""


def main(argv: list[str]) -> None:
    """Print the completion, or each under its prompt when there are several."""
    arguments = vars(tyro.cli(Arguments, args=argv, prog="python -m deepseek_jax.generate"))
    checkpoint = arguments.pop("checkpoint")
    prompts = list(itertools.chain(*arguments.pop("prompt")))
    settings = arguments | {"stop": list(itertools.chain(*arguments["stop"]))}
    check_request(prompts, **settings)
    model = load(checkpoint)
    if len(prompts) == 1:
        model.generate(prompts, stream=_show, **settings)
        print()
        return
    for prompt, completion in zip(prompts, model.generate(prompts, **settings), strict=True):
        print(f"--- {prompt!r}\n{completion}")


def _show(row: int, text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    run_command(main)
