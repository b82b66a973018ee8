"""Command: translate checkpoints: Orbax, HF/PyTorch safetensors."""

import argparse
import collections
import math
import pathlib
import re

import jax.numpy as jnp

from deepseek_jax.checkpoint import families, huggingface
from deepseek_jax.checkpoint.integrity import MANIFEST, resolve
from deepseek_jax.checkpoint.manager import read_config, read_params, write_params
from deepseek_jax.checkpoint.parts import check_new
from deepseek_jax.checkpoint.safetensors import is_folder_of_tensors
from deepseek_jax.core.config import from_dict, num_bytes
from deepseek_jax.core.errors import InputError, run_command
from deepseek_jax.core.precision import Precision
from deepseek_jax.core.progress import byte_progress
from deepseek_jax.data.sources import reported
from deepseek_jax.data.tokenizer import INFO, load_tokenizer
from deepseek_jax.models.build import build
from deepseek_jax.models.counts import describe
from deepseek_jax.models.decoder import Decoder


def main(argv: list[str]) -> None:
    """Convert or inspect as the command line says."""
    parser = argparse.ArgumentParser(
        prog="deepseek_jax.convert", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inward = commands.add_parser("from-hf", help="a Hugging Face folder to a checkpoint of ours")
    outward = commands.add_parser("to-hf", help="a checkpoint of ours to a Hugging Face folder")
    look = commands.add_parser("inspect", help="say what a checkpoint of either kind holds")
    look.add_argument("path", metavar="PATH")
    for command in (inward, outward):
        command.add_argument("source", metavar="SRC")
        command.add_argument("target", metavar="DST", help="the folder to write, which must be new")
        command.add_argument(
            "--part", metavar="I/N", default="1/1",
            help="write a share, so that N processes do it together; the last one completes it",
        )  # fmt: skip
    kinds = ["float32", "bfloat16", "float16"]
    inward.add_argument("--dtype", choices=kinds, help="of the weights; by default their own")
    outward.add_argument("--dtype", choices=[*kinds, "float8-block"], help="as the original's")
    outward.add_argument("--max-shard-size", default="5GB", help="bytes a file (KB, MB, GB)")
    outward.add_argument(
        "--format", choices=["safetensors", "torch"], default="safetensors",
        help="of the weights; torch: one pytorch_model.bin, however large",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if options.command == "inspect":
        print(inspect(pathlib.Path(options.path)))
        return
    source, target = pathlib.Path(options.source), pathlib.Path(options.target).absolute()
    part = _part(options.part)
    with reported(str(target)):
        check_new(target)
        if options.command == "from-hf":
            missing = from_hf(source, target, options.dtype, part)
        else:
            size = num_bytes(options.max_shard_size, "--max-shard-size")
            size = size if options.format == "safetensors" else None
            missing = to_hf(source, target, options.dtype, size, part)
    if missing:
        table = ", ".join(f"{number}/{part[1]}" for number in missing)
        print(f"part {options.part} is written; {target} still needs --part {table}")
    else:
        print(f"{target}: written")


def _part(text: str) -> tuple[int, int]:
    """I and N of "I/N"."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--part {text}: not a part such as 2/4, the second of four")
    return int(match[1]), int(match[2])


def from_hf(
    source: pathlib.Path, target: pathlib.Path, dtype: str | None, part: tuple[int, int] = (1, 1)
) -> list[int]:
    """Write part (I, N) of a Hugging Face folder as the checkpoint `target`; the missing parts.

    Weights get `dtype`, or keep their own; float8 becomes float32.
    """
    folder = huggingface.open_folder(source)
    params = huggingface.params_of(folder, build(folder.config, Precision(compute="float32")))
    for name, weight in params.items():
        if dtype and not name.endswith("router/bias"):
            params[name] = weight._replace(dtype=jnp.dtype(dtype))
    files = huggingface.keep(source)
    if tokenizer := huggingface.tokenizer_of(source):
        files |= tokenizer.files()
    facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(source.iterdir())]
    return write_params(
        target,
        params,
        part,
        config=huggingface.recorded(folder, Precision()),
        files=files,
        origin=[dtype, facts],
        progress=byte_progress(target.name, every=1),
    )


def to_hf(
    source: pathlib.Path,
    target: pathlib.Path,
    dtype: str | None,
    shard: int | None,
    part: tuple[int, int] = (1, 1),
) -> list[int]:
    """Write part (I, N) of a checkpoint of ours as a folder that transformers loads.

    The missing parts come back. Without bytes a `shard`, the weights are in PyTorch's form.
    """
    source = resolve(source)
    config = from_dict(Decoder, read_config(source)["model"], "model")
    beside, files = source / huggingface.BESIDE, {}
    if (source / INFO).exists() and not beside.exists():
        files = huggingface.tokenizer_files(load_tokenizer(source))
    return huggingface.write_folder(
        target,
        build(config, Precision(compute="float32")),
        read_params(source),
        part,
        beside=beside,
        files=files,
        dtype=dtype,
        max_shard_bytes=shard,
        origin=(source / MANIFEST).read_text(),
        progress=byte_progress(target.name, every=1),
    )


def inspect(path: pathlib.Path) -> str:
    """What a checkpoint is: family, sizes, dtypes, and which tensors would not fit."""
    if is_folder_of_tensors(path):
        folder = huggingface.open_folder(path)
        config, tensors = folder.config, folder.tensors
        family = folder.original["model_type"]
        try:
            huggingface.params_of(folder, build(config, Precision(compute="float32")))
            fit = "every tensor fits"
        except InputError as error:
            fit = str(error)
    else:
        path = resolve(path)
        config = from_dict(Decoder, read_config(path)["model"], "model")
        tensors, family, fit = read_params(path), families.family_of(config), "a checkpoint of ours"
    sizes = collections.Counter()
    for tensor in tensors.values():
        sizes[str(tensor.dtype)] += math.prod(tensor.shape) * tensor.dtype.itemsize
    kinds = ", ".join(f"{kind} {size / 1e9:.3g} GB" for kind, size in sizes.most_common())
    return f"{family}: {describe(config)}\n{len(tensors)} tensors: {kinds}\n{fit}"


if __name__ == "__main__":
    run_command(main)
