"""Hugging Face folders as models: open one, load it onto devices, write one.

What a folder holds beside weights (tokenizer, chat template, generation settings, config fields
that we have no use for) is kept as it is and written back.
"""

import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tokenizers
from jax.sharding import SingleDeviceSharding

from deepseek_jax.checkpoint import encoders, families, names, tables, vision_language
from deepseek_jax.checkpoint.entries import entries as language_entries
from deepseek_jax.checkpoint.integrity import sync
from deepseek_jax.checkpoint.manager import disk_names, read_config, resolve
from deepseek_jax.checkpoint.parts import in_parts, turn
from deepseek_jax.checkpoint.safetensors import (
    BLOCK,
    SCALE,
    WHOLE,
    Entry,
    Source,
    Tensor,
    is_folder_of_tensors,
    mapped,
    open_scales,
    open_tensors,
    shard_piece,
    shards,
    to_pickle,
    write_index,
    write_shard,
)
from deepseek_jax.core import storage, tree
from deepseek_jax.core.config import to_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.core.storage import Path
from deepseek_jax.data.tokenizer import Tokenizer, TokenizerFile, open_tokenizer
from deepseek_jax.models.build import Model, Network
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.vision_language import VisionLanguage, VisionLanguageModel

KEPT = (  # as patterns
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "preprocessor_config.json", "processor_config.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "encoding/**/*",
)  # fmt: skip
BESIDE = "huggingface"  # the folder of a converted checkpoint that holds these
SCALES = "scales.safetensors"  # in it: of the original's float8 weights
QUANTIZATION = {
    "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK],
    "activation_scheme": "dynamic",
}  # fmt: skip


class Folder(NamedTuple):
    """A Hugging Face checkpoint, its weights not read yet."""

    directory: pathlib.Path
    config: Any
    """A `Decoder`, a `VisionLanguage`, or an encoder's config."""
    original: dict[str, Any]
    """config.json as it stands."""
    tensors: dict[str, Tensor]


def fetched(path: str | Path) -> pathlib.Path:
    """A folder on this disk; out of a bucket a copy, two of its large files at a time."""
    return storage.fetched(storage.located(path), threads=2)


def open_folder(directory: str | pathlib.Path, kinds: tuple[type, ...] = (Decoder,)) -> Folder:
    """Open a language model's folder; MTP layers count only if their weights are there.

    Raises InputError when config.json or the weights cannot be understood, and for another kind of
    config than `kinds`.
    """
    folder = open_any(directory)
    if not isinstance(folder.config, kinds):
        kind = "an encoder" if encoders.family_of(folder.original) else "a vision-language model"
        raise InputError(
            f"{directory}: holds {kind} ({folder.original['model_type']}), and this is for "
            "language models; deepseek_jax.load opens it in Python"
        )
    return folder


def open_any(directory: str | pathlib.Path) -> Folder:
    """Open the folder of any known model: see `open_folder`."""
    directory = pathlib.Path(directory)
    original = _read_json(directory / "config.json")
    tensors = open_tensors(directory)
    if encoders.family_of(original):
        config = encoders.config_of(original, tensors)
        return Folder(directory, config, original, tensors)
    if vision_language.joined_of(original):
        config = vision_language.config_of(original, tensors)
        return Folder(directory, config, original, tensors)
    kind, known = original.get("model_type"), families.ARCHITECTURES
    if kind not in known:
        more = ", ".join((*known, *vision_language.FAMILIES, *encoders.FAMILIES))
        raise InputError(f"{directory}: model_type {kind!r} is not one of {more}")
    past = f"model.layers.{original.get('num_hidden_layers')}."
    if not any(name.startswith(past) for name in tensors):
        original |= {"num_nextn_predict_layers": 0}
    return Folder(directory, families.decoder(original), original, tensors)


def is_seeing(path: str | pathlib.Path) -> bool:
    """Whether a path holds a vision-language model: a folder of Hugging Face's, or one of ours."""
    if not is_folder_of_tensors(path):
        recorded = read_config(resolve(path))
        return recorded["model"].get("type") == VisionLanguage.__name__
    return vision_language.joined_of(read_optional(pathlib.Path(path), "config.json")) is not None


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object")
    return found


def params_of(folder: Folder, model: Model | VisionLanguageModel) -> dict[str, names.Source]:
    """The weights of a folder by our names on disk, none read yet but copies, which must agree.

    Raises InputError as names.sources does, and for an MTP layer with an embedding of its own.
    """
    if joined := vision_language.joined_of(folder.original):
        return vision_language.sources(joined, model, folder.tensors)
    ours = names.leaves(model)
    found = names.sources(model.config, ours, folder.tensors)
    for copy, path in names.copies(model.config, ours).items():
        same, whole = folder.tensors.get(copy), names.TOP[path]
        if same and not np.array_equal(same.read(), folder.tensors[whole].read()):
            raise InputError(f"{copy} differs from {whole}; here they share one")
    return found


def load_params(folder: Folder, model: Model, abstract: Any) -> Any:
    """The weights as arrays with `abstract`'s dtypes and shardings; each device reads its own."""
    return placed(params_of(folder, model), model.layers, abstract)


def placed(
    found: Mapping[str, Source], layers: Mapping[str, tuple[int, ...]], abstract: Any
) -> Any:
    """Weights by their names on disk as arrays with `abstract`'s dtypes and shardings."""

    def whole(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        rows = disk_names(path, leaf.shape, layers)
        source = names.stacked([found[row] for row in rows]) if rows else found[path]
        sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            values = source.read(index)
            made = np.empty(values.shape, leaf.dtype)
            turn(made, values)
            return made

        return jax.make_array_from_callback(leaf.shape, sharding, part)

    return tree.map_with_path(whole, abstract)


def load_encoder(folder: Folder, network: Network, abstract: Any) -> Any:
    """An encoder's weights as arrays with `abstract`'s dtypes and shardings.

    Raises InputError when the tensors do not fit the config.
    """
    family = encoders.family_of(folder.original)
    found = tables.sources(family, folder.config, tables.leaves(network), folder.tensors)
    return placed(found, network.layers, abstract)


def load_any(folder: Folder, network: Network, abstract: Any) -> Any:
    """The weights of a folder of any known model: see `load_params` and `load_encoder`."""
    load = load_encoder if encoders.family_of(folder.original) else load_params
    return load(folder, network, abstract)


def write_encoder(
    target: pathlib.Path, network: Network, params: Any, original: dict[str, Any]
) -> None:
    """Write an encoder as a folder that transformers loads; `original` is its config.json so far.

    Raises InputError when `original` names no family that has such an encoder.
    """
    family, ours = encoders.family_of(original), tables.leaves(network)
    if family is None:
        raise InputError(f"model_type {original.get('model_type')!r} is no encoder known here")
    config = original | family.fields(network.config)  # first: it may refuse
    arrays = {}
    for path, leaf in tree.flatten(params).items():
        rows = disk_names(path, leaf.shape, network.layers)
        arrays |= (
            dict(zip(rows, np.asarray(leaf), strict=True)) if rows else {path: np.asarray(leaf)}
        )
    entries = []
    for row in tables.table(family, network.config, ours):
        made = tables.joined(row, ours, [arrays[path] for path in row.ours])
        name = family.written(network.config, row.theirs)
        entries.append(Entry(name, made.shape, made.dtype, lambda made=made: np.atleast_1d(made)))
    target.mkdir(parents=True, exist_ok=True)
    write_shard(target / WHOLE, entries)
    config |= {"dtype": str(entries[0].dtype)}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def recorded(folder: Folder, precision: Precision) -> dict[str, Any]:
    """What a checkpoint's config.json says of a model that no run of ours trained."""
    length = min(int(folder.original.get("max_position_embeddings") or 2048), 2048)
    known = {"stages": [{}], "sequence_length": length}
    return {"model": to_dict(folder.config), "precision": to_dict(precision), **known}


def read_optional(directory: pathlib.Path, *files: str) -> dict[str, Any]:
    """The fields of these JSON files, as far as they exist; of two, the later one's."""
    paths = [directory / name for name in files if (directory / name).exists()]
    return {key: value for path in paths for key, value in _read_json(path).items()}


def token_names(directory: pathlib.Path) -> dict[str, str]:
    """What the folder calls its bos_token, eos_token, pad_token and so on, as far as it says."""
    found = read_optional(directory, "special_tokens_map.json", "tokenizer_config.json")
    plain = {key: x.get("content") if isinstance(x, dict) else x for key, x in found.items()}
    return {key: x for key, x in plain.items() if key.endswith("_token") and isinstance(x, str)}


def tokenizer_of(directory: pathlib.Path) -> Tokenizer | None:
    """The folder's tokenizer, if it has one; its texts begin with BOS if the folder says so.

    It says so in tokenizer_config.json, else by what its tokenizer.json puts around a text.
    (transformers 5.23 reads only the second, and then DeepSeek-V2 misses its BOS.)
    """
    if not (directory / "tokenizer.json").exists():
        return None
    bos = token_names(directory).get("bos_token", "")
    tokenizer = open_tokenizer(TokenizerFile(path=str(directory), bos=bos))
    says = read_optional(directory, "tokenizer_config.json").get("add_bos_token")
    tokenizer.adds_bos = tokenizer.puts_bos() if says is None else bool(says)
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """What lets transformers open a tokenizer of ours; nothing for bytes, which it has none of."""
    if not tokenizer.file:
        return {}
    name, content = tokenizer.file, tokenizer.content
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    numbers = {f"{kind}_id": number for kind, number in ids.items()}
    files = {name: content, "generation_config.json": json.dumps(numbers, indent=2).encode()}
    if name == "tokenizer.json":
        token_of = tokenizers.Tokenizer.from_buffer(content).id_to_token
        words = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
        words |= {kind: token_of(number) for kind, number in ids.items()}
        files["tokenizer_config.json"] = json.dumps(words, indent=2).encode()
    return files


def end_ids(directory: pathlib.Path, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The tokens that end a text or an answer.

    generation_config.json or else config.json names them, and the tokenizer's config one more: that
    of a document can be another.
    """
    name = token_names(directory).get("eos_token")
    end = tokenizer.token_id(name) if tokenizer and name else None
    more = () if end is None else (end,)
    for name in ("generation_config.json", "config.json"):
        found = read_optional(directory, name).get("eos_token_id")
        if found is not None:
            return (*found, *more) if isinstance(found, list) else (found, *more)
    return more


def _kept(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files of KEPT that a folder has, by their names in it."""
    paths = [path for pattern in KEPT for path in sorted(directory.glob(pattern))]
    return {path.relative_to(directory).as_posix(): path for path in paths if path.is_file()}


def keep(directory: pathlib.Path) -> dict[str, bytes]:
    """What stands beside the weights, and the float8 weights' scales, by name: see BESIDE."""
    files = {name: path.read_bytes() for name, path in _kept(directory).items()}
    files["config.json"] = (directory / "config.json").read_bytes()
    if scales := open_scales(directory):
        with tempfile.NamedTemporaryFile() as file:
            entries = [Entry(name, *scale) for name, scale in scales.items()]
            write_shard(pathlib.Path(file.name), entries)
            files[SCALES] = pathlib.Path(file.name).read_bytes()
    return {f"{BESIDE}/{name}": content for name, content in files.items()}


def write_folder(
    target: pathlib.Path,
    model: Model | VisionLanguageModel,
    params: Mapping[str, Source],
    part: tuple[int, int],
    *,
    beside: pathlib.Path,
    files: dict[str, bytes],
    dtype: str | None,
    max_shard_bytes: int | None,
    origin: str,
    progress: Callable[[int, int], None],
) -> list[int]:
    """Write weights (by our names on disk) as a folder that transformers loads: see `in_parts`.

    `beside` holds what `keep` wrote; `files` are added where it has no such file. `dtype` is a
    dtype's name, "float8-block", or None, which is as the original was. Float8 weights that did not
    change keep their values and scales; the others get new ones. Router biases stay float32.
    Without `max_shard_bytes`, the weights are one file of PyTorch.
    """
    known, scales = beside / "config.json", beside / SCALES
    original = _read_json(known) if known.exists() else {}
    scales = mapped(scales) if scales.exists() else {}
    kept = {name: path.read_bytes() for name, path in _kept(beside).items()}
    if isinstance(model.config, VisionLanguage):
        joined = vision_language.FAMILIES[vision_language.kind_of(original, model.config)]
        entries = vision_language.entries(joined, model, params, dtype)
        config = vision_language.hf_config(joined, model.config, original)
        config["dtype"] = config["torch_dtype"] = str(entries[0].dtype)
    else:
        entries = language_entries(model, params, scales, original, dtype)
        stored = next(e.dtype for e in entries if e.name == "model.embed_tokens.weight")
        config = families.hf_config(model.config, original, str(stored))
    if any(entry.name.endswith(SCALE) for entry in entries):
        config["quantization_config"] = QUANTIZATION | (original.get("quantization_config") or {})
    else:
        config.pop("quantization_config", None)
    held = shards(entries, max_shard_bytes or sum(entry.size for entry in entries))

    def finish(whole: pathlib.Path, _: dict) -> None:
        write_index(whole, held)
        for name, content in (files | kept).items():
            (whole / name).parent.mkdir(exist_ok=True)
            (whole / name).write_bytes(content)
        (whole / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if max_shard_bytes is None:
            to_pickle(whole)
        for path in (*whole.rglob("*"), whole):
            sync(path)

    pieces = [shard_piece(name, some) for name, some in held.items()]
    origin = [origin, dtype, max_shard_bytes]
    return in_parts(target, pieces, part, origin=origin, finish=finish, progress=progress)
