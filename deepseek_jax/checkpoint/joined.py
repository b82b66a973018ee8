"""Models of an encoder, a projector and a decoder in one folder: what their families share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from deepseek_jax.checkpoint import families
from deepseek_jax.checkpoint.tables import Family, Named, under
from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.hybrid import Hybrid
from deepseek_jax.models.sam import SAM
from deepseek_jax.models.vision_language import VisionLanguage
from deepseek_jax.models.vit import ViT

MOST = 8  # layers of a projector that have names here


class Joined(NamedTuple):
    """One model_type: an encoder, a projector and a decoder in one folder."""

    family: Family
    """Of everything but the decoder's weights."""
    prefixes: Mapping[str, str]
    """{how a decoder's names begin in a folder of its own: how they do here}."""


def text_fields(config: Decoder) -> dict[str, Any]:
    """The text_config of a decoder; the dtype stands above it."""
    fields = families.hf_config(config, {}, "")
    return {name: value for name, value in fields.items() if name not in ("dtype", "torch_dtype")}


def check_said(back: VisionLanguage, config: VisionLanguage, family: str) -> None:
    """InputError where config.json, read back as `back`, is another model.

    How a model is initialized and computed is nobody else's business.
    """
    wrong = [
        name
        for name in ("projector", "image_id", "prefix")
        if getattr(back, name) != getattr(config, name)
    ]
    if text_fields(back.language) != text_fields(config.language):
        wrong.append("language")
    wrong += _unlike(back.vision, config.vision, "vision")
    if wrong:
        raise InputError(f"{family} has no equal of this model's {', '.join(wrong)}")


def one_encoder(config: VisionLanguage) -> ViT:
    """What sees; InputError where it is no ViT."""
    if not isinstance(config.vision, ViT):
        raise InputError(f"a {type(config.vision).__name__} sees, where the folder has a ViT")
    return config.vision


def _unlike(back: Any, config: Any, name: str) -> list[str]:
    """The fields of an encoder's config that say another model."""
    if isinstance(config, Transformer) and isinstance(back, Transformer):
        back = dataclasses.replace(back, remat=config.remat, unroll=config.unroll)
    if isinstance(config, ViT | SAM | Hybrid) and type(back) is type(config):
        return [
            fault
            for field, value in vars(config).items()
            if field != "init_scale"
            for fault in _unlike(getattr(back, field), value, f"{name}.{field}")
        ]
    return [name] if back != config else []


def modules_of(
    vision: Mapping[str, str], prefix: str, projector: Mapping[int, str]
) -> Callable[[VisionLanguage], dict[str, str]]:
    """`Family.modules`: the encoder's behind `prefix`, and the projector's layers from 1 on."""
    linear = {f"projector/linear_{number}": there for number, there in projector.items()}
    made = under(vision, "vision/", prefix) | linear
    return lambda config: made


Part: TypeAlias = tuple[Mapping[str, Any], str]  # names within an encoder, and what is before them


def hybrid_modules(
    low: Part, high: Part, more: Mapping[str, str]
) -> Callable[[VisionLanguage], dict[str, str]]:
    """`Family.modules` of a Hybrid's two encoders and `more`."""
    made = under(low[0], "vision/low/", low[1]) | under(high[0], "vision/high/", high[1]) | more
    return lambda config: made


def hybrid_leaves(low: Part, high: Part, more: Mapping[str, Named]) -> dict[str, Named]:
    """`Family.leaves` of the same."""
    parts = (("low", *low), ("high", *high))
    return {
        f"vision/{part}/{ours}": named._replace(name=prefix + named.name)
        for part, leaves, prefix in parts
        for ours, named in leaves.items()
    } | more


def leaves_of(prefix: str, leaves: Mapping[str, Named]) -> dict[str, Named]:
    """`Family.leaves` of the encoder behind `prefix`."""
    return {f"vision/{o}": n._replace(name=prefix + n.name) for o, n in leaves.items()}
