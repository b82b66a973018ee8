"""Command: translate checkpoints: Orbax, HF/PyTorch safetensors; place experts on devices."""

import argparse
import collections
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint import encoders, families, huggingface
from deepseek_jax.checkpoint.integrity import MANIFEST, resolve
from deepseek_jax.checkpoint.manager import read_config
from deepseek_jax.checkpoint.params import read_params, write_params
from deepseek_jax.checkpoint.parts import check_new
from deepseek_jax.checkpoint.safetensors import is_folder_of_tensors
from deepseek_jax.core.config import from_dict, num_bytes, to_dict
from deepseek_jax.core.errors import InputError, run_command
from deepseek_jax.core.precision import Precision
from deepseek_jax.core.progress import byte_progress
from deepseek_jax.core.storage import Object, located, on_disk
from deepseek_jax.data.sources import reported
from deepseek_jax.data.tokenizer import INFO, Characters, load_tokenizer
from deepseek_jax.data.vision import NORMALIZATIONS, ImageTransform
from deepseek_jax.evaluation.placement import (
    halves,
    held_out_routes,
    mean_traffic,
    orders,
    unmoved,
)
from deepseek_jax.evaluation.suite import open_task
from deepseek_jax.models.audio import Wav2Vec2
from deepseek_jax.models.counts import describe
from deepseek_jax.models.decoder import Decoder, layer_table
from deepseek_jax.models.networks import build_network
from deepseek_jax.models.placement import AXES, taken
from deepseek_jax.models.two_tower import TwoTower, build_towers
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.ops.placement import Devices
from deepseek_jax.serving.encoder import load_speech, load_towers
from deepseek_jax.serving.language import load
from deepseek_jax.training.recipe import differences

KINDS = (Decoder, VisionLanguage)  # the configs of what is converted tensor by tensor
SHARED = ("dtype", "max_shard_size", "format", "part")  # how these are written
# Where two configs may differ and compute the same.
AS_IT_RUNS = tuple(
    f"model/{part}{name}"
    for part in ("", "image/", "text/", "image/transformer/", "text/transformer/")
    for name in ("init_scale", "remat", "unroll")
)


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
    lay = commands.add_parser("place", help="put experts that fire together on the same devices")
    lay.add_argument("source", metavar="SRC", help="a run or checkpoint of ours")
    lay.add_argument("target", metavar="DST", help="the checkpoint to write, which must be new")
    lay.add_argument("--devices", type=int, required=True, help="that share a layer's experts")
    lay.add_argument("--nodes", type=int, default=1, help="of devices, joined by a slow network")
    lay.add_argument("--data", help="text to watch them on; by default what training held out")
    lay.add_argument("--tokens", type=int, default=100_000, help="how much of it")
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
        print(inspect(_source(options.path)))
        return
    target = on_disk(options.target, "the folder to write,").absolute()
    source = _source(options.source)
    if options.command == "place":
        with reported(str(target)):
            check_new(target)
            devices = Devices(num_devices=options.devices, num_nodes=options.nodes)
            print(place(source, target, devices, options.data, options.tokens))
        return
    part = _part(options.part)
    with reported(str(target)):
        check_new(target)
        if options.command == "from-hf":
            missing = from_hf(source, target, options.dtype, part)
        elif write := WHOLES.get(read_config(resolve(source))["model"].get("type")):
            named = {name: outward.get_default(name) for name in SHARED}
            if given := [name for name, usual in named.items() if getattr(options, name) != usual]:
                flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
                raise InputError(f"{source}: an encoder is written whole: leave out {flags}")
            missing = write(source, target)
        else:
            size = num_bytes(options.max_shard_size, "--max-shard-size")
            size = size if options.format == "safetensors" else None
            missing = to_hf(source, target, options.dtype, size, part)
    if missing:
        table = ", ".join(f"{number}/{part[1]}" for number in missing)
        print(f"part {options.part} is written; {target} still needs --part {table}")
    else:
        print(f"{target}: written")


def _source(path: str) -> pathlib.Path:
    """A folder to read; out of a bucket a copy of it, of a run the newest good checkpoint's."""
    place = located(path)
    if isinstance(place, Object):
        return huggingface.fetched(place) if is_folder_of_tensors(place) else resolve(place)
    return place


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
    folder = huggingface.open_folder(source, KINDS)
    network = build_network(folder.config, Precision(compute="float32"))
    params = huggingface.params_of(folder, network)
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


def _model_of(path: pathlib.Path) -> Decoder | VisionLanguage:
    """The model of a checkpoint of ours; InputError for a kind that is not converted."""
    model = read_config(path)["model"]
    kind = next((k for k in KINDS if k.__name__ == model.get("type")), Decoder)
    return from_dict(kind, model, "model")


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
    config = _model_of(source)
    beside, files = source / huggingface.BESIDE, {}
    if (source / INFO).exists() and not beside.exists():
        files = huggingface.tokenizer_files(load_tokenizer(source))
    return huggingface.write_folder(
        target,
        build_network(config, Precision(compute="float32")),
        read_params(source),
        part,
        beside=beside,
        files=files,
        dtype=dtype,
        max_shard_bytes=shard,
        origin=(source / MANIFEST).read_text(),
        progress=byte_progress(target.name, every=1),
    )


def speech_to_hf(source: pathlib.Path, target: pathlib.Path) -> list[int]:
    """Write a wav2vec 2.0 of ours, with its characters, as a folder that transformers loads.

    Nothing is missing then.
    """
    model = load_speech(source)
    huggingface.write_encoder(target, model.encoder, model.params, {"model_type": "wav2vec2"})
    characters = model.tokenizer.files()
    (target / Characters.file).write_bytes(characters[Characters.file])
    masks = model.config.conv_norm == "layer"  # the others are not made to see them
    told = {
        "tokenizer_config.json": {
            "tokenizer_class": "Wav2Vec2CTCTokenizer", "word_delimiter_token": "|",
            "pad_token": model.tokenizer.token(model.tokenizer.eos_id),
        },
        "preprocessor_config.json": {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1,
            "sampling_rate": model.data.rate, "padding_value": 0.0, "padding_side": "right",
            "do_normalize": model.normalize, "return_attention_mask": masks,
        },
    }  # fmt: skip
    for name, fields in told.items():
        (target / name).write_text(json.dumps(fields, indent=2) + "\n")
    return []


def towers_to_hf(source: pathlib.Path, target: pathlib.Path) -> list[int]:
    """Write two towers of ours as a folder that transformers loads as its CLIP or SigLIP.

    Nothing is missing then. InputError where transformers' would compute something else.
    """
    model, recorded = load_towers(source), read_config(resolve(source))
    config = from_dict(TwoTower, recorded["model"], "model")  # of its own image size
    kind = "siglip" if config.loss == "sigmoid" else "clip"
    original = {"model_type": kind} | encoders.FAMILIES[kind].fields(config)
    told = [{"model": to_dict(one)} for one in (encoders.config_of(original), config)]
    if different := differences(*told, AS_IT_RUNS):
        there = "; ".join(different[:5])
        raise InputError(f"{source}: as transformers' {kind} it would be another model: {there}")
    huggingface.write_encoder(target, build_towers(config), model.params, original)
    files = huggingface.tokenizer_files(model.tokenizer)
    files.pop("generation_config.json", None)
    if model.data.image.fit != "pad":  # which neither processor knows
        image = dataclasses.replace(model.data.image, size=config.image.image_size[0])
        files["preprocessor_config.json"] = json.dumps(processor(image), indent=2).encode()
    for name, content in files.items():
        (target / name).write_bytes(content)
    return []


def processor(image: ImageTransform) -> dict[str, Any]:
    """What tells transformers' CLIPImageProcessor to prepare images so."""
    side, crop = {"height": image.size, "width": image.size}, image.fit == "crop"
    mean, deviation = NORMALIZATIONS[image.normalization]
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": image.size} if crop else side,
        "resample": {"lanczos": 1, "bilinear": 2, "bicubic": 3}[image.method],
        "do_center_crop": crop, "crop_size": side,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": mean, "image_std": deviation,
    }  # fmt: skip


WHOLES = {Wav2Vec2.__name__: speech_to_hf, TwoTower.__name__: towers_to_hf}


def place(
    source: pathlib.Path, target: pathlib.Path, devices: Devices, data: str | None, tokens: int
) -> str:
    """Write a checkpoint of ours with its experts in another order; what it says does not change.

    The order comes from what half of `tokens` of text makes the experts do; a table of what the
    other half costs before and after comes back.
    """
    source = resolve(source)
    lm = load(source)
    moe = lm.config.moe
    if moe is None:
        raise InputError(f"{source}: has no experts to place")
    if lm.tokenizer is None:
        raise InputError(f"{source}: has no tokenizer, so no text can show what its experts do")
    if tokens < 1:
        raise InputError(f"--tokens is {tokens}; at least 1, please")
    devices.of_slots(moe.num_experts)
    dataset = open_task(lm.recorded, lm.tokenizer, data, max(1, lm.config.num_mtp_layers))
    seen, fresh = halves(held_out_routes(lm.model, lm.params, dataset, 8, tokens))
    found, layers = orders(seen, moe, devices), layer_table(lm.config)
    of_layer = {f"layer_{layers[path][0]}": own[0] for path, own in found.items()}
    params = read_params(source)
    for name, weight in params.items():
        layer, _, rest = name.partition("/")
        if layer in of_layer and rest in AXES:
            index = taken(rest, of_layer[layer], moe.router.num_groups)
            params[name] = weight._replace(read=_reordered(weight.read, AXES[rest], index))
    beside = source / huggingface.BESIDE
    kept = (path for path in beside.rglob("*") if path.is_file())
    write_params(
        target,
        params,
        (1, 1),
        config=lm.recorded,
        files=lm.tokenizer.files() | {str(p.relative_to(source)): p.read_bytes() for p in kept},
        origin=[
            (source / MANIFEST).read_text(),
            {name: own.tolist() for name, own in of_layer.items()},
        ],
        progress=byte_progress(target.name, every=1),
    )
    rows = ["experts | devices a token | nodes a token | busiest device / mean"]
    for name, slots in (("before", unmoved(fresh, moe.num_experts)), ("after", found)):
        cost = mean_traffic(fresh, slots, devices)
        rows.append(f"{name} | {cost.devices:.3f} | {cost.nodes:.3f} | {cost.imbalance:.3f}")
    return "\n".join([*rows, f"{target}: written"])


def _reordered(
    read: Callable[[tuple], np.ndarray], axis: int, index: np.ndarray
) -> Callable[[tuple], np.ndarray]:
    """What reads a weight that takes `index` along `axis`; of experts, one at a time too."""

    def part(where: tuple) -> np.ndarray:
        if where and axis == 0:
            return read((int(index[where[0]]), *where[1:]))
        return read(()).take(index, axis)[where]

    return part


def inspect(path: pathlib.Path) -> str:
    """What a checkpoint is: family, sizes, dtypes, and which tensors would not fit."""
    if is_folder_of_tensors(path):
        folder = huggingface.open_folder(path, KINDS)
        config, tensors = folder.config, folder.tensors
        family = folder.original["model_type"]
        try:
            network = build_network(config, Precision(compute="float32"))
            huggingface.params_of(folder, network)
            fit = "every tensor fits"
        except InputError as error:
            fit = str(error)
    else:
        path = resolve(path)
        config, fit = _model_of(path), "a checkpoint of ours"
        tensors, sees = read_params(path), isinstance(config, VisionLanguage)
        family = "a vision-language model" if sees else families.family_of(config)
    sizes = collections.Counter()
    for tensor in tensors.values():
        sizes[str(tensor.dtype)] += math.prod(tensor.shape) * tensor.dtype.itemsize
    kinds = ", ".join(f"{kind} {size / 1e9:.3g} GB" for kind, size in sizes.most_common())
    return f"{family}: {describe(config)}\n{len(tensors)} tensors: {kinds}\n{fit}"


if __name__ == "__main__":
    run_command(main)
