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
      config: the checkpoint's (its data, where files are cached, the length of a row).
      tokenizer: the checkpoint's.
      name: None for the held-out side of the data it was trained on last; `stdlib` for that of the
        standard library; otherwise a file or glob of text, JSON Lines (field `text`) or Parquet
        (column `text`), or a folder that `prepare` wrote.

    Raises InputError when there is no such data or it cannot be read.
    """
    stages = [stage["data"] for stage in config.get("stages", []) if stage.get("data")]
    stored = stages[-1] if stages else config.get("data")
    data = from_dict(Data, stored, "data") if stored else Data()
    if name is None and not stored:
        raise InputError("this checkpoint does not say what it was trained on; give --data")
    if name == "stdlib":
        data = dataclasses.replace(data, source=sources.StandardLibrary(), eval_tokens=None)
    elif name is not None:
        data = dataclasses.replace(data, source=_named(name), eval_tokens=None)
    for part in sources.parts(data.source):
        _check_tokenizer(part.source, tokenizer)
    return open_data(
        data,
        sequence_length=config["sequence_length"],
        num_targets=1,
        seed=0,
        tokenizer=tokenizer,
        whole=name not in (None, "stdlib") and not isinstance(data.source, sources.Records),
    )


def _named(name: str) -> sources.Plain:
    if (pathlib.Path(name) / "manifest.json").is_file():
        return sources.Records(path=name)
    return sources.kind_of((name,))(paths=(name,))


def _check_tokenizer(source: sources.Plain, tokenizer: Tokenizer) -> None:
    if isinstance(source, sources.Records):
        prepared = load_tokenizer(pathlib.Path(source.path) / "tokenizer")
        if prepared.files() != tokenizer.files():
            raise InputError(
                f"{source.path}: prepared with another tokenizer than this checkpoint's; evaluate "
                "on the text it was made from"
            )
