"""Command: complete prompts from a checkpoint, or answer them as a chat."""

import dataclasses
import itertools

import tyro

from deepseek_jax.checkpoint.huggingface import is_seeing
from deepseek_jax.core.errors import InputError, run_command
from deepseek_jax.serving.language import LanguageModel, Settings, check_texts
from deepseek_jax.serving.language import load as load_language
from deepseek_jax.serving.media import FRAMES
from deepseek_jax.serving.vision_language import SeeingModel, load_seeing

MEDIA = {"image": "images", "audio": "audio", "video": "video"}  # flags, and arguments of generate

Texts = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]  # --prompt a b --prompt c


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Settings):
    """Complete prompts: one streams as it comes, several are completed as one batch."""

    checkpoint: str
    """A run (its newest good checkpoint is used), one of its checkpoints, or an HF folder."""
    prompt: Texts = ()
    """The text to go on from; several texts are several prompts."""
    image: Texts = ()
    """Files of pictures for the prompts' image tokens (as <image>), in order; a prompt without any
    gets its pictures before it."""
    audio: Texts = ()
    """Files of sounds, in the same way."""
    video: Texts = ()
    """Files of films, in the same way."""
    num_frames: int = FRAMES
    """Frames that are taken of each film."""
    stop: Texts = ()
    """Texts before which a completion ends."""
    chat: bool = False
    """Each prompt is a user's message, written as the checkpoint's chat template does."""
    system: str = ""
    """The system message of each chat."""
    thinking: bool = False
    """Chat with reasoning, in models that leave the choice."""


def main(argv: list[str]) -> None:
    """Print the completion, or each under its prompt when there are several."""
    arguments = vars(tyro.cli(Arguments, args=argv, prog="python -m deepseek_jax.generate"))
    checkpoint = arguments.pop("checkpoint")
    prompts, stop = (list(itertools.chain(*arguments.pop(name))) for name in ("prompt", "stop"))
    chat, system, thinking = (arguments.pop(name) for name in ("chat", "system", "thinking"))
    media = {kind: files for kind in MEDIA if (files := arguments.pop(kind))}
    num_frames = arguments.pop("num_frames")
    check_texts(prompts, stop)
    if len(prompts) == 1:
        media = {kind: (tuple(itertools.chain(*files)),) for kind, files in media.items()}
    for kind, files in media.items():
        if len(files) != len(prompts):
            raise InputError(f"give each prompt its own --{kind}")
    if (system or thinking) and not chat:
        raise InputError("--system and --thinking are for chats: add --chat")
    model: LanguageModel = (load_seeing if is_seeing(checkpoint) else load_language)(checkpoint)
    for kind in media:
        if not isinstance(model, SeeingModel) or (kind == "audio" and not model.config.audio):
            raise InputError(f"{checkpoint}: this model takes no {kind}: leave out --{kind}")
    if media:
        arguments["num_frames"] = num_frames

    def show(new: str) -> None:
        print(new, end="", flush=True)

    if chat:
        before = [{"role": "system", "content": system}] if system else []
        for number, prompt in enumerate(prompts):
            if len(prompts) > 1:
                print(f"--- {prompt!r}")
            shown = [{"type": k, "path": x} for k, files in media.items() for x in files[number]]
            content = [*shown, {"type": "text", "text": prompt}] if shown else prompt
            messages = [*before, {"role": "user", "content": content}]
            model.chat(messages, thinking=thinking, stop=stop, stream=show, **arguments)
            print()
        return
    arguments |= {MEDIA[kind]: [list(own) for own in files] for kind, files in media.items()}
    if len(prompts) == 1:
        model.generate(prompts, stop=stop, stream=lambda _, new: show(new), **arguments)
        print()
        return
    completions = model.generate(prompts, stop=stop, **arguments)
    for prompt, completion in zip(prompts, completions, strict=True):
        print(f"--- {prompt!r}\n{completion}")


if __name__ == "__main__":
    run_command(main)
