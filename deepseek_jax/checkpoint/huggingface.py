"""Hugging Face folders as models: open one, load it onto devices, write one.

What a folder holds beside weights (tokenizer, chat template, generation settings, config fields
that we have no use for) is kept as it is and written back.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from deepseek_jax.checkpoint import names
from deepseek_jax.checkpoint.manager import disk_names
from deepseek_jax.checkpoint.safetensors import Tensor, open_tensors, write_tensors
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.build import Model
from deepseek_jax.models.decoder import Decoder, layer_table

KEPT = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json",
    "merges.txt",
)  # fmt: skip
BESIDE = "huggingface"  # the folder of a converted checkpoint that holds these


class Folder(NamedTuple):
    """A Hugging Face checkpoint, its weights not read yet."""

    directory: pathlib.Path
    config: Decoder
    original: dict[str, Any]
    """config.json as it stands."""
    tensors: dict[str, Tensor]


def open_folder(directory: str | pathlib.Path) -> Folder:
    """Open a folder; MTP layers count only if their weights are there.

    Raises InputError when config.json or the weights cannot be understood.
    """
    directory = pathlib.Path(directory)
    try:
        original = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{directory / 'config.json'}: {error}") from None
    tensors = open_tensors(directory)
    past = f"model.layers.{original.get('num_hidden_layers')}."
    if not any(name.startswith(past) for name in tensors):
        original |= {"num_nextn_predict_layers": 0}
    return Folder(directory, names.decoder(original), original, tensors)


def params_of(folder: Folder, model: Model) -> dict[str, names.Source]:
    """The weights of a folder by our names on disk, none read yet; InputError as names.sources."""
    return names.sources(folder.config, names.leaves(model), folder.tensors)


def load_params(folder: Folder, model: Model, abstract: Any) -> Any:
    """The weights as arrays with `abstract`'s dtypes and shardings; each device reads its own."""
    found, layers = params_of(folder, model), layer_table(model.config)

    def placed(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        rows = disk_names(path, leaf.shape, layers)
        source = names.stacked([found[row] for row in rows]) if rows else found[path]
        sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
        part = lambda index: np.ascontiguousarray(source.read(index)).astype(leaf.dtype)  # noqa: E731
        return jax.make_array_from_callback(leaf.shape, sharding, part)

    return tree.map_with_path(placed, abstract)


def kept_files(directory: pathlib.Path) -> dict[str, bytes]:
    """What stands beside the weights, by name."""
    return {
        name: (directory / name).read_bytes()
        for name in ("config.json", *KEPT)
        if (directory / name).exists()
    }


def write_folder(
    directory: pathlib.Path,
    model: Model,
    params: Mapping[str, Tensor],
    *,
    files: Mapping[str, bytes],
    dtype: np.dtype | None,
    max_shard_bytes: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write weights (by our names on disk) into a folder that transformers loads.

    `files` are those of `kept_files`; `dtype` None keeps each weight's own. Router biases stay
    float32.
    """
    ours = names.leaves(model)
    rows = names.table(model.config, ours)
    original = json.loads(files.get("config.json", b"{}"))
    done = [0, 0]

    def entry(row: names.Row) -> tuple:
        kind = params[row.ours[0]].dtype
        if dtype is not None and not row.theirs.endswith("e_score_correction_bias"):
            kind = np.dtype(dtype)
        shape = names.their_shape(row, ours)
        size = int(np.prod(shape)) * kind.itemsize
        done[1] += size

        def read() -> np.ndarray:
            arrays = [params[path].read() for path in row.ours]
            progress(done[0], done[1])
            done[0] += size
            return names.joined(row, ours, arrays).astype(kind)

        return row.theirs, read, shape, kind

    entries = [entry(row) for row in rows]
    kinds = {str(kind) for name, _, _, kind in entries if name == "model.embed_tokens.weight"}
    config = names.hf_config(model.config, original, kinds.pop())
    write_tensors(directory, entries, max_shard_bytes)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
