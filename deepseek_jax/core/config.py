"""Typed configs: load a file, override from the command line, validate, serialize.

A config is a tree of frozen keyword-only dataclasses; a choice is a union of them. Facts that span
fields are checked in `__post_init__` with a full sentence (ValueError). In JSON every dataclass
carries its class name under `type`, so that a union member can be found again.
"""

import contextlib
import dataclasses
import difflib
import json
import pathlib
import re
import runpy
import traceback
import types
import typing
from typing import Any, Literal, TypeVar

import tyro

from deepseek_jax.core.errors import InputError
from deepseek_jax.core.storage import Path, located, put

T = TypeVar("T")

VERSION = 1  # of the JSON form; a renamed field gets a row in MIGRATIONS
# (class name, old field) -> new field, {old value: what it is called now}; other values stay
MIGRATIONS: dict[tuple[str, str], tuple[str, dict[Any, Any]]] = {
    ("VisionLanguage", "whole_images"): ("prefix", {False: "causal", True: "images"}),
}


def load_config(path: str | pathlib.Path, kind: type[T]) -> T:
    """What a config file's `get_config()` gives; InputError if missing, failing or no `kind`."""
    path = pathlib.Path(path)
    if not path.is_file():
        known = sorted(str(p) for p in path.parent.glob("*.py"))
        near = difflib.get_close_matches(str(path), known, n=3) or known[:5]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise InputError(f"{path}: no such config file{hint}")
    try:
        defined = runpy.run_path(str(path), run_name=f"deepseek_jax_config_{path.stem}")
        if "get_config" not in defined:
            raise InputError(f"{path}: a config file must define get_config()")
        config = defined["get_config"]()
    except InputError:
        raise
    except Exception as error:  # whatever the user's file raises is the user's to read
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines.append(error.lineno)
        where = f"{path}:{lines[-1]}" if lines else path
        raise InputError(f"{where}: {_one_line(error)}") from None
    if not isinstance(config, kind):
        found = f"{type(config).__name__}, not {kind.__name__}"
        raise InputError(f"{path}: get_config() returned {found}")
    return config


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def override(config: T, argv: list[str], prog: str, description: str = "") -> T:
    """The config with flags (`--model.num-layers 4`); bad ones exit with tyro's message, code 2."""
    marks = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return tyro.cli(
        type(config), prog=prog, description=description, args=argv, default=config, config=marks
    )


def num_bytes(text: str, flag: str) -> int:
    """Bytes of a size such as 256MB, units being powers of 1,000; InputError names the `flag`."""
    size = re.fullmatch(r"0*([1-9]\d*) ?([KMG]B)?", text.upper())
    if not size:
        raise InputError(f"{flag} {text} is not a size such as 256MB")
    return int(size[1]) * 1000 ** ("", "KB", "MB", "GB").index(size[2] or "")


def to_dict(value: Any) -> Any:
    """A config as JSON-ready data, every dataclass with its class name under `type`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    return value


def from_dict(kind: Any, data: Any, where: str = "config") -> Any:
    """The inverse of `to_dict` for a value annotated `kind`; InputError names what does not fit."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(data, list):
        kinds = members[:1] * len(data) if members[-1] is Ellipsis else members
        if len(kinds) != len(data):
            raise InputError(f"{where} has {len(data)} items, not {len(kinds)}")
        parts = enumerate(zip(kinds, data, strict=True))
        return tuple(from_dict(part, item, f"{where}[{i}]") for i, (part, item) in parts)
    choices = {m.__name__: m for m in members or [kind] if hasattr(m, "__dataclass_fields__")}
    if choices and origin is not tuple and isinstance(data, dict):
        tag = data.get("type", None if members else kind.__name__)
        if tag not in choices:
            raise InputError(f"{where}.type is {tag!r}, not one of {sorted(choices)}")
        return _from_fields(choices[tag], data, where)
    if origin in (typing.Union, types.UnionType):
        for member in members:
            with contextlib.suppress(InputError):
                return from_dict(member, data, where)
    if type(data) is kind or (origin is Literal and data in members):
        return data
    if kind is float and type(data) is int:
        return float(data)
    wanted = "a list" if origin is tuple else f"one of {members}" if members else kind.__name__
    raise InputError(f"{where} is {data!r}, not {wanted}")


def _from_fields(kind: Any, data: dict[str, Any], where: str) -> Any:
    hints, values = typing.get_type_hints(kind), {}
    for name in (name for name in data if name != "type"):
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{where} has an unknown field {name!r}{hint}")
        values[name] = from_dict(hints[name], data[name], f"{where}.{name}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {_one_line(error)}") from None


def save_json(config: Any, path: str | Path) -> None:
    """Write a config as versioned, tagged JSON; a kill leaves the old file or the new one."""
    text = json.dumps({"version": VERSION, **to_dict(config)}, indent=2)
    put(located(path), f"{text}\n".encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """The tagged data of a config file written by `save_json`, in today's names (MIGRATIONS).

    InputError for another version.
    """
    try:
        data = json.loads(located(path).read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise InputError(f"{path}: not readable as JSON ({reason})") from None
    if not isinstance(data, dict) or data.pop("version", None) != VERSION:
        raise InputError(f"{path}: not a config of version {VERSION}")
    return _migrated(data)


def _migrated(data: Any) -> Any:
    """Recorded data with renamed fields, and their values, under their new names."""
    if isinstance(data, list):
        return [_migrated(item) for item in data]
    if not isinstance(data, dict):
        return data
    found = {}
    for old, value in data.items():
        name, values = MIGRATIONS.get((str(data.get("type")), old), (old, {}))
        known = [new for before, new in values.items() if before == value]
        found[name] = known[0] if known else _migrated(value)
    return found
