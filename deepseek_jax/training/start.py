"""Where a run's parameters come from when it starts from others': a run, a checkpoint, a folder."""

import dataclasses
import functools
from typing import Any

import jax
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.checkpoint import huggingface, integrity
from deepseek_jax.checkpoint.manager import load_params, read_config
from deepseek_jax.checkpoint.safetensors import is_folder_of_tensors
from deepseek_jax.core import config as core_config
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.precision import Precision
from deepseek_jax.models.audio import Wav2Vec2, Whisper
from deepseek_jax.models.build import Network
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.encoder import build_encoder
from deepseek_jax.models.naflex import NaFlex
from deepseek_jax.models.networks import ModelConfig, build_network
from deepseek_jax.models.sam import SAM
from deepseek_jax.models.two_tower import TwoTower
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.models.vit import ViT
from deepseek_jax.parallel.sharding import tree_shardings
from deepseek_jax.training.optimizer import is_indexer
from deepseek_jax.training.recipe import InitPart, TrainConfig, differences


def given_params(config: TrainConfig, whole: Network, abstract: Any) -> tuple[Any, str]:
    """The parameters of `init_from`, shaped and placed as `abstract`, and what to say of them.

    Indexers that it has not, and another head of a wav2vec 2.0, start anew. InputError where it is
    of another model.
    """
    model, note = whole, ""
    folder, source, theirs = _opened(config.init_from)
    if type(theirs) is not type(config.model):
        found, wanted = type(theirs).__name__, type(config.model).__name__
        raise InputError(f"{config.init_from} holds a {found}, and this run trains a {wanted}")
    indexer = getattr(getattr(config.model, "attention", None), "indexer", None)
    there, anew = abstract, set[str]()
    if indexer and getattr(theirs.attention, "indexer", indexer) is None:
        # As V3.2 grew out of V3.1.
        attention = dataclasses.replace(config.model.attention, indexer=None)
        bare = dataclasses.replace(config.model, attention=attention)
        model, note = build_network(bare, config.precision), ", its new indexers made anew"
        leaves = tree.flatten(abstract)
        anew = {path for path in leaves if is_indexer(path)}
        there = unflatten_dict({p: x for p, x in leaves.items() if p not in anew}, sep="/")
    elif isinstance(theirs, Wav2Vec2) and theirs.head != config.model.head:
        # As wav2vec 2.0 learns to write after it was pretrained.
        given = dataclasses.replace(config.model, head=theirs.head, mask_vector=theirs.mask_vector)
        model, note = build_network(given, config.precision), ", its new head made anew"
        mesh = jax.tree.leaves(abstract)[0].sharding.mesh
        places = tree_shardings(mesh, model.specs, model.shapes)
        there = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model.shapes, places
        )
        anew = tree.flatten(abstract).keys() - tree.flatten(there).keys()
    if folder:
        params = huggingface.load_any(folder, model, there)
    else:
        params = load_params(source, there, model.layers)
    leaves = tree.flatten(abstract)
    places = {path: leaves[path].sharding for path in sorted(anew)}

    def make() -> dict[str, Any]:
        fresh = tree.flatten(whole.init(jax.random.key(config.seed)))
        return {path: fresh[path] for path in places}  # nothing else is computed

    added = jax.jit(make, out_shardings=places)() if anew else {}
    kept = {path: leaf for path, leaf in tree.flatten(params).items() if path in leaves}
    said = f"starting from the parameters of {config.init_from}{note}"
    return unflatten_dict(kept | added, sep="/"), said


def _opened(given: str) -> tuple[huggingface.Folder | None, Any, Any]:
    """A folder of Hugging Face's, or else a checkpoint's directory; the config of its model."""
    if is_folder_of_tensors(given):
        folder = huggingface.open_any(huggingface.fetched(given))
        return folder, None, folder.config
    source = integrity.resolve(given)
    return None, source, core_config.from_dict(ModelConfig, read_config(source)["model"], "model")


# Where a part stands in a decoder that sees, and where in a source of some kind.
OWN = {
    "vision": "vision",
    "vision_low": "vision/low",
    "vision_high": "vision/high",
    "audio": "audio/encoder",
    "language": "language",
}
PLACES: dict[tuple[str, type], str] = {
    ("vision", ViT): "",
    ("vision", NaFlex): "",
    ("vision", TwoTower): "image",
    ("vision", VisionLanguage): "vision",
    ("vision_low", ViT): "",
    ("vision_low", TwoTower): "image",
    ("vision_high", SAM): "",
    ("audio", Whisper): "",
    ("audio", VisionLanguage): "audio/encoder",
    ("language", Decoder): "",
    ("language", VisionLanguage): "language",
}


def params_of_parts(config: TrainConfig, whole: Network, abstract: Any) -> tuple[Any, str]:
    """New parameters with those of `init_parts` in their places, and what to say of them.

    Shaped and placed as `abstract`. Of an encoder's source a pooling head may be left over.
    InputError names what else does not match.
    """
    leaves, found, notes = tree.flatten(abstract), dict[str, Any](), list[str]()
    for number, part in enumerate(config.init_parts):
        before = f"{OWN[part.part]}/"
        ours = {p.removeprefix(before): x for p, x in leaves.items() if p.startswith(before)}
        try:
            loaded, theirs = _part(part, ours, config.precision)
        except InputError as error:
            raise InputError(f"init_parts[{number}]: {error}") from None
        found |= {before + path: leaf for path, leaf in loaded.items()}
        notes += set_otherwise(theirs, _within(config.model, OWN[part.part]), part.part)
    places = {path: leaf.sharding for path, leaf in leaves.items() if path not in found}

    def rest() -> dict[str, Any]:
        fresh = tree.flatten(whole.init(jax.random.key(config.seed)))
        return {path: fresh[path] for path in places}  # nothing else is computed

    found |= jax.jit(rest, out_shardings=places)()
    said = ", ".join(f"{part.part} from {part.source}" for part in config.init_parts)
    said = f"starting with {said}, the rest anew"
    if notes:
        said += f"; warning: there it computes otherwise: {'; '.join(notes[:5])}"
    return unflatten_dict({path: found[path] for path in leaves}, sep="/"), said


# What a part may be otherwise and compute the same: how it runs, begins and is balanced, and what
# is read off it.
ELSEWHERE = ("init_scale", "pooling", "image_size", "remat", "unroll", "scan")
ELSEWHERE += ("transformer/remat", "transformer/unroll", "moe/exchange/", "moe/balance/")


def set_otherwise(theirs: Any, ours: Any, name: str) -> list[str]:
    """How a part that fits by its shapes was computed where it comes from, setting by setting."""
    free = tuple(f"{name}/{field}" for field in ELSEWHERE)
    return differences(*({name: core_config.to_dict(one)} for one in (theirs, ours)), free)


def _within(config: Any, place: str) -> Any:
    return functools.reduce(getattr, place.split("/") if place else [], config)


def _part(part: InitPart, ours: dict[str, Any], precision: Precision) -> tuple[dict[str, Any], Any]:
    """A part's parameters by path within it, as the abstract `ours`, and the config that it has
    where it comes from; InputError says why not."""
    folder, source, theirs = _opened(part.source)
    if (part.part, type(theirs)) not in PLACES:
        kinds = ", ".join(kind.__name__ for name, kind in PLACES if name == part.part)
        found = type(theirs).__name__
        raise InputError(f"{part.source} holds a {found}; {part.part} comes from one of {kinds}")
    make = build_network if isinstance(theirs, ModelConfig) else build_encoder
    network = make(theirs, precision)
    inside = PLACES[part.part, type(theirs)]
    before = f"{inside}/" if inside else ""
    whole = tree.flatten(network.shapes)
    own = {p.removeprefix(before): x.shape for p, x in whole.items() if p.startswith(before)}
    headless = part.part.startswith("vision") and not any(path.startswith("head/") for path in ours)
    own = {path: shape for path, shape in own.items() if not (headless and path[:5] == "head/")}
    if wrong := tree.difference({path: x.shape for path, x in ours.items()}, own):
        raise InputError(f"{part.source} does not fit model.{part.part}: {wrong}")
    shaped, everywhere = {}, NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
    for path, leaf in whole.items():
        mine = ours.get(path.removeprefix(before)) if path.startswith(before) else None
        dtype, lies = (mine.dtype, mine.sharding) if mine else (leaf.dtype, everywhere)
        shaped[path] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=lies)
    abstract = unflatten_dict(shaped, sep="/")
    if folder:
        loaded = huggingface.load_any(folder, network, abstract)
    else:
        loaded = load_params(source, abstract, network.layers)
    flat = tree.flatten(loaded)
    return {path: flat[before + path] for path in ours}, _within(theirs, inside)
