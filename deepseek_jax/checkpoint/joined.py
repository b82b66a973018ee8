"""Models of an encoder, a projector and a decoder in one folder: what their families share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from deepseek_jax.checkpoint import families
from deepseek_jax.checkpoint.tables import Family, Named, under
from deepseek_jax.core.errors import InputError
from deepseek_jax.layers.encoder import Transformer
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.vision_language import VisionLanguage

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
    for name, value in vars(config.vision).items():
        found = getattr(back.vision, name)
        if isinstance(value, Transformer):
            ways = {"remat": value.remat, "unroll": value.unroll}
            found = Transformer(**(vars(found) | ways))
        if name != "init_scale" and found != value:
            wrong.append(f"vision.{name}")
    if wrong:
        raise InputError(f"{family} has no equal of this model's {', '.join(wrong)}")


def modules_of(
    vision: Mapping[str, str], prefix: str, projector: Mapping[int, str]
) -> Callable[[VisionLanguage], dict[str, str]]:
    """`Family.modules`: the encoder's behind `prefix`, and the projector's layers from 1 on."""
    linear = {f"projector/linear_{number}": there for number, there in projector.items()}
    made = under(vision, "vision/", prefix) | linear
    return lambda config: made


def leaves_of(prefix: str, leaves: Mapping[str, Named]) -> dict[str, Named]:
    """`Family.leaves` of the encoder behind `prefix`."""
    return {f"vision/{o}": n._replace(name=prefix + n.name) for o, n in leaves.items()}
