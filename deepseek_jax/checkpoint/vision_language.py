"""Vision-language models of Hugging Face: every family's table, and their weights both ways.

The decoder's names are those of its own family (names.py) behind a prefix; the encoder's and the
projector's are tables of tables.py.
"""

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint import deepseek_vl, deepseek_vl2, multi_modality, names, tables
from deepseek_jax.checkpoint.joined import Joined
from deepseek_jax.checkpoint.manager import disk_names
from deepseek_jax.checkpoint.names import Leaf
from deepseek_jax.checkpoint.safetensors import WHOLE, Entry, Source, Tensor, write_shard
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.hybrid import Hybrid
from deepseek_jax.models.projectors import Resampler
from deepseek_jax.models.vision_language import VisionLanguage, VisionLanguageModel
from deepseek_jax.models.vit import ViT

LANGUAGE = "language/"  # before the decoder's weights here
FAMILIES: dict[str, Joined] = {
    **deepseek_vl.FAMILIES,
    **deepseek_vl2.FAMILIES,
    **multi_modality.FAMILIES,
}


def joined_of(original: Mapping[str, Any]) -> Joined | None:
    """The row of a config.json; None where its model is no vision-language model known here."""
    return FAMILIES.get(original.get("model_type", ""))


def kind_of(original: Mapping[str, Any], config: VisionLanguage) -> str:
    """The model_type to write a model as: `original`'s, else the first that can express it.

    Raises InputError when none can.
    """
    if (
        config.audio
        or not isinstance(config.vision, ViT | Hybrid)
        or isinstance(config.projector, Resampler)
    ):
        raise InputError("no folder of Hugging Face has an ear, a NaFlex or a Resampler as here")
    if joined_of(original):
        return original["model_type"]
    faults = []
    for kind, joined in FAMILIES.items():
        try:
            joined.family.fields(config)
        except InputError as error:
            faults.append(str(error))
        else:
            return kind
    raise InputError(f"no folder of Hugging Face has such a model: {'; '.join(faults)}")


def config_of(original: Mapping[str, Any], tensors: Collection[str]) -> VisionLanguage:
    """Our config of a config.json, which `joined_of` knows, and its tensors' names.

    Raises InputError for what has no equal here.
    """
    return tables.read_config(FAMILIES[original["model_type"]].family, original, tensors)


def _apart(leaves: Mapping[str, Leaf]) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """The decoder's leaves, by their names in a model of its own, and the others."""
    language = {
        path.removeprefix(LANGUAGE): leaf
        for path, leaf in leaves.items()
        if path.startswith(LANGUAGE)
    }
    return language, {p: leaf for p, leaf in leaves.items() if not p.startswith(LANGUAGE)}


def _swapped(name: str, prefixes: Mapping[str, str]) -> str | None:
    """The name with the value of the prefix that it has instead; None where it has none."""
    return next((v + name.removeprefix(k) for k, v in prefixes.items() if name.startswith(k)), None)


def sources(
    joined: Joined, network: VisionLanguageModel, tensors: Mapping[str, Tensor]
) -> dict[str, Source]:
    """Each weight of ours, on disk's names, out of tensors of theirs, none read yet.

    Raises InputError for tensors that match nothing, are missing, or have another shape.
    """
    language, others = _apart(tables.leaves(network))
    back = {there: alone for alone, there in joined.prefixes.items()}
    alone = {name: _swapped(name, back) for name in tensors}
    of_language = {short: tensors[name] for name, short in alone.items() if short is not None}
    rest = {name: tensors[name] for name, short in alone.items() if short is None}
    try:
        found = names.sources(network.config.language, language, of_language)
    except InputError as error:
        raise InputError(f"the decoder: {error}") from None
    found = {LANGUAGE + path: source for path, source in found.items()}
    return found | tables.sources(joined.family, network.config, others, rest)


def entries(
    joined: Joined,
    network: VisionLanguageModel,
    params: Mapping[str, Source],
    dtype: str | None = None,
) -> list[Entry]:
    """The tensors of a folder, none made yet, from weights by our names on disk.

    In `dtype`, or as they are; routers' biases always as they are. InputError for float8.
    """
    if dtype == "float8-block":
        raise InputError("vision-language models are not written in float8: choose another dtype")
    language, others = _apart(tables.leaves(network))
    found = []

    def read(paths: tuple[str, ...], prefix: str = "") -> list[np.ndarray]:
        return [params[prefix + path].read(()) for path in paths]

    for row in tables.table(joined.family, network.config, others):
        made = lambda row=row: np.atleast_1d(tables.joined(row, others, read(row.ours)))  # noqa: E731
        found.append(Entry(row.theirs, row.shape, params[row.ours[0]].dtype, made))
    decoder = network.config.language
    for row in names.table(decoder, language):
        made = lambda row=row: names.joined(row, language, read(row.ours, LANGUAGE))  # noqa: E731
        kind, shape = params[LANGUAGE + row.ours[0]].dtype, names.their_shape(row, language)
        found.append(Entry(_swapped(row.theirs, joined.prefixes), shape, kind, made))
    for name, shape in names.empty(decoder).items():
        name = _swapped(name, joined.prefixes)
        found.append(Entry(name, shape, found[0].dtype, lambda: np.zeros(0)))
    if dtype is None:
        return found
    own = [e.name.endswith("correction_bias") for e in found]
    kind = jnp.dtype(dtype)
    return [e if kept else e._replace(dtype=kind) for e, kept in zip(found, own, strict=True)]


def write(
    target: pathlib.Path, network: VisionLanguageModel, params: Any, original: Mapping[str, Any]
) -> None:
    """Write a model as a folder like the one that `original` is the config.json of.

    Of Janus's, what draws is left out. Raises InputError when no family has such a model.
    """
    joined = FAMILIES[kind_of(original, network.config)]
    config = hf_config(joined, network.config, original)  # first: it may refuse
    found = {}
    for path, leaf in tree.flatten(params).items():
        array = np.asarray(leaf)
        rows = disk_names(path, array.shape, network.layers)
        for row, one in zip(rows or [path], array if rows else [array], strict=True):
            found[row] = Source(one.shape, one.dtype, lambda index, one=one: one[index])
    made = entries(joined, network, found)
    target.mkdir(parents=True, exist_ok=True)
    write_shard(target / WHOLE, made)
    config |= {"dtype": str(made[0].dtype)}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _kept(known: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """`part` with what else is known, in encoders' own parts too (`multi_modality`'s params)."""
    deep = ("params", "high_res_cfg", "low_res_cfg")
    inner = {k: _kept(known[k], part[k]) for k in deep if k in known and k in part}
    return {**known, **part, **inner}


def hf_config(joined: Joined, config: VisionLanguage, original: Mapping[str, Any]) -> dict:
    """A config.json; `original`'s other fields are kept, those of its parts too.

    Raises InputError when the family cannot express the config.
    """
    fields = joined.family.fields(config)
    for name, part in fields.items():
        if isinstance(part, dict):
            known = original.get(name) or {}
            longest = {k: known[k] for k in ("max_position_embeddings",) if k in known}
            fields[name] = _kept(known, part) | longest
    return {**original, **fields, "model_type": kind_of(original, config)}
