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
import sys
import traceback
import types
import typing
from typing import Any, Literal, TypeVar

import tyro

from deepseek_jax.core.errors import InputError

T = TypeVar("T")

VERSION = 1  # of the JSON form; a renamed field gets a row in MIGRATIONS
MIGRATIONS: dict[tuple[str, str], str] = {}  # (class name, old field) -> new field


def load_config(path: str | pathlib.Path, kind: type[T]) -> T:
    """Run a config file and return what its `get_config()` gives.

    Raises InputError when the file is missing, fails, or returns something other than `kind`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        known = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), known, n=3) or known[:5]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise InputError(f"{path}: no such config file{hint}")
    module = types.ModuleType(f"deepseek_jax_config_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses defined in a config look their module up
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        if not hasattr(module, "get_config"):
            raise InputError(f"{path}: a config file must define get_config()")
        config = module.get_config()
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
        found = type(config).__name__
        raise InputError(f"{path}: get_config() returned {found}, not {kind.__name__}")
    return config


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def override(config: T, argv: list[str], prog: str, description: str = "") -> T:
    """The config with command-line flags (`--model.num-layers 4`) applied by tyro.

    Unknown flags, wrong types and values that contradict each other end the process with tyro's
    message and exit code 2.
    """
    return tyro.cli(
        type(config),
        default=config,
        args=argv,
        prog=prog,
        description=description,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )


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
    if origin in (typing.Union, types.UnionType):
        if isinstance(data, dict):
            tag = data.get("type")
            by_name: dict = {m.__name__: m for m in members if hasattr(m, "__dataclass_fields__")}
            if tag not in by_name:
                raise InputError(f"{where}.type is {tag!r}, not one of {sorted(by_name)}")
            return _from_fields(by_name[tag], data, where)
        for member in members:
            with contextlib.suppress(InputError):
                return from_dict(member, data, where)
        raise InputError(f"{where} is {data!r}, which fits none of {members}")
    if origin is Literal:
        if data not in members:
            raise InputError(f"{where} is {data!r}, not one of {members}")
        return data
    if origin is tuple:
        if not isinstance(data, list):
            raise InputError(f"{where} is {data!r}, not a list")
        kinds = members[:1] * len(data) if members[-1] is Ellipsis else members
        if len(kinds) != len(data):
            raise InputError(f"{where} has {len(data)} items, not {len(kinds)}")
        parts = enumerate(zip(kinds, data, strict=True))
        return tuple(from_dict(part, item, f"{where}[{i}]") for i, (part, item) in parts)
    if dataclasses.is_dataclass(kind):
        return _from_fields(kind, data, where)
    if kind is float and type(data) is int:
        return float(data)
    if type(data) is kind:
        return data
    raise InputError(f"{where} is {data!r}, which is not {getattr(kind, '__name__', kind)}")


def _from_fields(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise InputError(f"{where} is {data!r}, not the fields of a {kind.__name__}")
    if data.get("type", kind.__name__) != kind.__name__:
        raise InputError(f"{where}.type is {data['type']!r}, not {kind.__name__!r}")
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    values = {}
    for given, item in data.items():
        if given == "type":
            continue
        name = str(MIGRATIONS.get((kind.__name__, given), given))
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{where} has an unknown field {given!r}{hint}")
        values[name] = from_dict(hints[name], item, f"{where}.{name}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {_one_line(error)}") from None


def save_json(config: Any, path: str | pathlib.Path) -> None:
    """Write a config as versioned, tagged JSON."""
    text = json.dumps({"version": VERSION, **to_dict(config)}, indent=2)
    pathlib.Path(path).write_text(text + "\n")


def read_json(path: str | pathlib.Path) -> dict[str, Any]:
    """The tagged data of a config file written by `save_json`, checked for its version."""
    try:
        data = json.loads(pathlib.Path(path).read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict) or data.pop("version", None) != VERSION:
        raise InputError(f"{path}: not a config of version {VERSION}")
    return data
