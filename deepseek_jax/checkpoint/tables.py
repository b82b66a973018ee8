"""Names and shapes of weights, Hugging Face's encoders and ours: tables used in both directions.

A family's names are module by module: a module's `weight` or `scale` is `weight` there, its `bias`
is `bias`. A torch matrix is [outputs, inputs] and ours [inputs..., outputs...]; a convolution there
is [outputs, channels, taps...] and ours [taps..., channels, outputs]. Sources: the models of
transformers 5.23 and the published checkpoints.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.checkpoint.manager import disk_names
from deepseek_jax.checkpoint.names import Leaf
from deepseek_jax.checkpoint.safetensors import Source, Tensor
from deepseek_jax.core import tree
from deepseek_jax.core.axes import Spec
from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.build import Network


class Named(NamedTuple):
    """A leaf of ours under a name of theirs, where it has more dimensions than here, all 1."""

    name: str
    ones: int = 0


class Family(NamedTuple):
    """One model_type of transformers."""

    config: Callable[[Mapping[str, Any]], Any]
    """config.json -> our config. Raises InputError for what has no equal here."""
    fields: Callable[[Any], dict[str, Any]]
    """Our config -> the fields of config.json."""
    modules: Callable[[Any], dict[str, str]]
    """Our config -> {module of ours: module of theirs}, a layer's number as {}."""
    leaves: Mapping[str, Named] = MappingProxyType({})
    """Leaves of ours that are no module's weight, scale or bias there; those that lie in one tensor
    in their order there."""
    ignored: str = r".*position_ids"
    """Tensors that are no weights, or serve nothing here."""
    prefix: str = ""
    """What published checkpoints put before the names that transformers now writes."""
    optional: Mapping[str, str] = MappingProxyType({})
    """{a tensor of theirs: the field that `config` finds saying whether it is there}, where
    config.json itself need not say."""
    renamed: Mapping[str, str] = MappingProxyType({})
    """Patterns of names in older or larger checkpoints, and what stands for them in `modules`."""
    written: Callable[[Any, str], str] = lambda config, name: name
    """Our config and a name of `modules` -> the name that is written."""
    places: Callable[[Any, int], tuple[int, ...]] = lambda config, number: (number,)
    """Our config, a layer's number -> what stands for {0}, {1}, ... in its names."""


def read_config(family: Family, original: Mapping[str, Any], tensors: Collection[str]) -> Any:
    """Our config of a config.json; InputError for what has no equal here.

    The names of the tensors beside it say what config.json may not.
    """
    names = {name.removeprefix(family.prefix) for name in tensors}
    there = {field: name in names for name, field in family.optional.items()}
    try:
        return family.config(there | {**original})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"config.json: {error}") from None


class Row(NamedTuple):
    """One tensor of theirs, its shape, and the leaves of ours that lie in it, in order."""

    theirs: str
    shape: tuple[int, ...]
    ours: tuple[str, ...]


def leaves(network: Network) -> dict[str, Leaf]:
    """A network's weights by their names on disk, stacks as layers."""
    specs = tree.flatten(network.specs, is_leaf=lambda node: isinstance(node, Spec))
    found = {}
    for path, leaf in tree.flatten(network.shapes).items():
        one = Leaf(leaf.shape, specs[path])
        if rows := disk_names(path, leaf.shape, network.layers):
            one = Leaf(leaf.shape[1:], specs[path].unstacked())
        found |= dict.fromkeys(rows or [path], one)
    return found


def table(family: Family, config: Any, ours: Mapping[str, Leaf]) -> list[Row]:
    """Their names of all of our weights. Raises InputError for one that has none there."""
    modules, rows = family.modules(config), {}
    places = {pattern: i for i, pattern in enumerate(family.leaves)}
    patterns = {path: re.sub(r"layer_\d+", "layer", path) for path in ours}
    for path in sorted(ours, key=lambda path: places.get(patterns[path], -1)):
        leaf, pattern = ours[path], patterns[path]
        number = re.search(r"layer_(\d+)", path)
        module, _, last = pattern.rpartition("/")
        if (named := family.leaves.get(pattern)) is None:
            if (there := modules.get(module)) is None:
                raise InputError(f"this family of encoders has no weight like {path}")
            named = Named(f"{there}.{'bias' if last == 'bias' else 'weight'}")
        name = named.name.format(*(family.places(config, int(number[1])) if number else ()))
        shape = (1,) * named.ones + _turned(np.empty(leaf.shape, np.void), leaf).shape
        if name in rows:
            before = rows[name]
            shape = (before.shape[0] + shape[0], *shape[1:])
            rows[name] = Row(name, shape, (*before.ours, path))
        else:
            rows[name] = Row(name, shape, (path,))
    return [*rows.values()]


def _is_convolution(leaf: Leaf) -> bool:
    return len(leaf.shape) > 2 and leaf.spec.axes[0] == "patch" and bool(leaf.spec.reduced)


def _order(leaf: Leaf) -> tuple[int, ...]:
    """Our dimensions in their order: outputs, then inputs, a convolution's channels first."""
    if _is_convolution(leaf):
        last = len(leaf.shape) - 1
        return (last, last - 1, *range(last - 1))
    return (*leaf.spec.outputs, *leaf.spec.reduced)


def _lies_alike(leaf: Leaf) -> bool:
    """Whether a leaf has the same dimensions there: a number, a vector a position or a token."""
    return not leaf.shape or leaf.spec.axes[0] in ("position", "vocab")


def _turned(array: np.ndarray, leaf: Leaf) -> np.ndarray:
    """A leaf of ours as it lies there."""
    if _lies_alike(leaf):
        return array
    if not leaf.spec.reduced:
        return array.reshape(-1)
    turned = array.transpose(_order(leaf))
    if _is_convolution(leaf):
        return turned
    return turned.reshape(math.prod(leaf.shape[i] for i in leaf.spec.outputs), -1)


def _back(part: np.ndarray, leaf: Leaf) -> np.ndarray:
    """A part of their tensor as a leaf of ours."""
    if _lies_alike(leaf) or not leaf.spec.reduced:
        return part.reshape(leaf.shape)
    order = _order(leaf)
    return part.reshape([leaf.shape[i] for i in order]).transpose(np.argsort(order))


def joined(row: Row, ours: Mapping[str, Leaf], arrays: list[np.ndarray]) -> np.ndarray:
    """Their tensor from the weights of ours that lie in it."""
    turned = [_turned(array, ours[path]) for path, array in zip(row.ours, arrays, strict=True)]
    return (np.concatenate(turned) if len(turned) > 1 else turned[0]).reshape(row.shape)


def _parts(row: Row, ours: Mapping[str, Leaf], tensor: Tensor) -> Iterator[tuple[str, Source]]:
    first = 0
    for path in row.ours:
        leaf = ours[path]
        shared = len(row.ours) > 1
        size = _turned(np.empty(leaf.shape, np.void), leaf).shape[0] if shared else 0
        own = slice(first, first + size)
        first += size

        def read(index: tuple, leaf=leaf, own=own, shared=shared) -> np.ndarray:
            whole = tensor.read()
            return _back(whole[own] if shared else whole, leaf)[index]

        yield path, Source(leaf.shape, tensor.dtype, read)


def sources(
    family: Family, config: Any, ours: Mapping[str, Leaf], theirs: Mapping[str, Tensor]
) -> dict[str, Source]:
    """Each weight of ours, on disk's names, out of tensors of theirs, none read yet.

    Raises InputError for tensors that match nothing, are missing, or have another shape.
    """
    theirs = {_plain(name, family): tensor for name, tensor in theirs.items()}
    rows = table(family, config, ours)
    wanted = {row.theirs: row.shape for row in rows}
    faults = [
        f"{name} matches nothing in this model"
        for name in theirs
        if name not in wanted and not re.fullmatch(family.ignored, name)
    ]
    faults += [f"{name} is missing" for name in wanted if name not in theirs]
    faults += [
        f"{name} has shape {theirs[name].shape}, not {shape}"
        for name, shape in wanted.items()
        if name in theirs and theirs[name].shape != shape
    ]
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise InputError(f"the tensors do not fit the config: {'; '.join(faults[:5])}{more}")
    return {path: part for row in rows for path, part in _parts(row, ours, theirs[row.theirs])}


def _plain(name: str, family: Family) -> str:
    """The name of a tensor as the family's table has it."""
    name = name.removeprefix(family.prefix)
    for pattern, new in family.renamed.items():
        name = re.sub(pattern, new, name)
    return name


def only(given: Mapping[str, Any], what: str, **fixed: Any) -> None:
    """Raise InputError where a config sets a field to what has no equal here."""
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise InputError(f"{what}: {name} is {given[name]!r}; only {value!r} is understood")


ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())} | {
    "gelu_tanh": "gelu_pytorch_tanh"
}


def activation(hf: Mapping[str, Any], name: str) -> str:
    """Our name of the activation in field `name`."""
    theirs = hf.get(name)
    if theirs not in ACTIVATIONS:
        raise InputError(f"{name} is {theirs!r}; understood are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[theirs]


def square(size: int | list[int]) -> tuple[int, int]:
    """Height and width of a size that may be one number."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def transformer(hf: Mapping[str, Any], **own: Any) -> Transformer:
    """CLIP's, ViT's and SigLIP's fields of a transformer; `own` before them."""
    common = {
        "num_layers": hf["num_hidden_layers"],
        "embed_dim": hf["hidden_size"],
        "num_heads": hf["num_attention_heads"],
        "activation": activation(hf, "hidden_act"),
        "norm_eps": hf["layer_norm_eps"],
    }
    if "mlp_dim" not in own:
        common["mlp_dim"] = hf["intermediate_size"]
    return Transformer(**(common | own))


def transformer_fields(t: Transformer) -> dict[str, Any]:
    """What CLIP and its kin call the fields of a transformer."""
    return {
        "num_hidden_layers": t.num_layers,
        "hidden_size": t.embed_dim,
        "num_attention_heads": t.num_heads,
        "intermediate_size": t.mlp_dim,
        "hidden_act": THEIR_ACTIVATIONS[t.activation],
        "layer_norm_eps": t.norm_eps,
    }


def under(modules: Mapping[str, str], ours: str, theirs: str) -> dict[str, str]:
    """The modules of a part of a model, by their names in the whole."""
    return {ours + o: theirs + t for o, t in modules.items()}
