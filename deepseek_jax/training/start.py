"""Where a run's parameters come from when it starts from others': a run, a checkpoint, a folder."""

import dataclasses
from typing import Any

import jax
from flax.traverse_util import unflatten_dict

from deepseek_jax.checkpoint import huggingface, integrity
from deepseek_jax.checkpoint.manager import load_params, read_config
from deepseek_jax.checkpoint.safetensors import is_folder_of_tensors
from deepseek_jax.core import config as core_config
from deepseek_jax.core import tree
from deepseek_jax.core.errors import InputError
from deepseek_jax.models.audio import Wav2Vec2
from deepseek_jax.models.build import Network
from deepseek_jax.models.networks import ModelConfig, build_network
from deepseek_jax.parallel.sharding import tree_shardings
from deepseek_jax.training.optimizer import is_indexer
from deepseek_jax.training.recipe import TrainConfig


def given_params(config: TrainConfig, whole: Network, abstract: Any) -> tuple[Any, str]:
    """The parameters of `init_from`, shaped and placed as `abstract`, and what to say of them.

    Indexers that it has not, and another head of a wav2vec 2.0, start anew. InputError where it is
    of another model.
    """
    model, note = whole, ""
    folder, source = None, None
    if is_folder_of_tensors(config.init_from):
        folder = huggingface.open_any(huggingface.fetched(config.init_from))
    else:
        source = integrity.resolve(config.init_from)
    if folder:
        theirs = folder.config
    else:
        theirs = core_config.from_dict(ModelConfig, read_config(source)["model"], "model")
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
