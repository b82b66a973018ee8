"""What a checkpoint is evaluated on: the held-out side of its own data, or named files whole.

The text is always tokenized by the checkpoint's tokenizer, never by one trained anew.
"""

import dataclasses
import pathlib
from typing import Any

from deepseek_jax.core.config import from_dict
from deepseek_jax.core.errors import InputError
from deepseek_jax.data import sources
from deepseek_jax.data.loader import Data, Dataset, open_data
from deepseek_jax.data.tokenizer import Tokenizer, load_tokenizer


def open_task(config: dict[str, Any], tokenizer: Tokenizer, name: str | None) -> Dataset:
    """The documents to score.

    Args:
      config: the checkpoint's (its last stage's data and length of a row, where files are cached).
      tokenizer: the checkpoint's.
      name: None for the held-out side of the data it was trained on last; `stdlib` for that of the
        standard library; otherwise a file or glob of text, JSON Lines (field `text`) or Parquet
        (column `text`), or a folder that `prepare` wrote.

    Raises InputError when there is no such data or it cannot be read.
    """
    last = {name: value for name, value in config["stages"][-1].items() if value is not None}
    stored = last.get("data", config.get("data"))
    data = from_dict(Data, stored, "data") if stored else Data()
    if name is None and not stored:
        raise InputError("this checkpoint does not say what it was trained on; give --data")
    if name == "stdlib":
        data = dataclasses.replace(data, source=sources.StandardLibrary(), eval_tokens=None)
    elif name is not None:
        data = dataclasses.replace(data, source=_named(name), eval_tokens=None)
    for source in (part.source for part in sources.parts(data.source)):
        if isinstance(source, sources.Records):
            prepared = load_tokenizer(pathlib.Path(source.path, "tokenizer").expanduser())
            if prepared.files() != tokenizer.files():
                raise InputError(
                    f"{source.path}: prepared with another tokenizer than this checkpoint's; "
                    "evaluate on the text it was made from"
                )
    return open_data(
        data,
        sequence_length=last.get("sequence_length", config["sequence_length"]),
        num_targets=1,
        seed=0,
        tokenizer=tokenizer,
        whole=name not in (None, "stdlib") and not isinstance(data.source, sources.Records),
    )


def _named(name: str) -> sources.Plain:
    if pathlib.Path(name, "manifest.json").expanduser().is_file():
        return sources.Records(path=name)
    return sources.kind_of((name,))(paths=(name,))
