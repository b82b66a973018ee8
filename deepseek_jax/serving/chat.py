"""Messages as the text that a checkpoint was taught to answer: its Jinja template, or V3.2's form.

Templates come from strangers. They run in Jinja's sandbox, see copies of plain data only, may not
blow up texts or numbers, and have TIME seconds. What a template gives is the whole text: no BOS is
added to it. Left out: parsing an answer, and going on from the beginning of one.
"""

import contextlib
import datetime
import functools
import json
import pathlib
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deepseek_jax.checkpoint import huggingface
from deepseek_jax.core.errors import InputError
from deepseek_jax.core.extras import require
from deepseek_jax.data.sources import one_line, reported
from deepseek_jax.serving import deepseek_v32

PARTS = ("text", "image", "video", "audio")  # of a message whose content is a list
ROLES = ("system", "developer", "user", "assistant", "tool")
TIME = 10.0  # seconds that a template may take
LARGEST = 2**24  # product of two numbers, or characters of a repeated text, in a template

NO_MARKS: Mapping[str, str] = types.MappingProxyType({})

# From checked messages, tools or None, and further variables to a text.
Renderer = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]], str]


def renderer(directory: pathlib.Path, marks: Mapping[str, str] = NO_MARKS) -> Renderer | None:
    """What writes conversations as the checkpoint wants them; None if it does not say how.

    `directory` is a Hugging Face folder, or what `huggingface.keep` kept of one. `marks` stand in
    texts for media, by kind. InputError if its files are damaged.
    """
    if templates := _templates(directory):
        inner = functools.partial(_rendered, templates, huggingface.token_names(directory))
        return functools.partial(_of_parts, inner, marks)
    kind = huggingface.read_optional(directory, "config.json").get("model_type")
    if kind == "deepseek_v32":
        return functools.partial(_of_parts, deepseek_v32.rendered, marks)
    return None


def _of_parts(
    inner: Renderer,
    marks: Mapping[str, str],
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    variables: dict[str, Any],
) -> str:
    """What `inner` writes of messages of which some are lists of parts.

    Templates read texts, or such lists, or both; which, only trying tells. First the parts become
    one text, with marks: who reads lists alone finds nothing in it, and gets the list.
    """
    lists = [m for m in messages if isinstance(m["content"], list)]
    if not lists:
        return inner(messages, tools, variables)
    for kind in {part["type"] for m in lists for part in m["content"]} - {"text", *marks}:
        raise InputError(f"this model takes no {kind}: its tokenizer has no mark for one")
    flat = [m | {"content": _as_text(m["content"], marks)} for m in messages]
    asked = [part for m in lists if m["role"] == "user" for part in m["content"]]
    with contextlib.suppress(InputError):
        text = inner(flat, tools, variables)
        if all(_as_text([part], marks).strip() in text for part in asked):
            return text
    text = inner(messages, tools, variables)
    if not all(part.get("text", "").strip() in text for part in asked):
        raise InputError("the chat template leaves out what the user says; correct it")
    return text


def _as_text(content: Any, marks: Mapping[str, str]) -> Any:
    """A message's content as one text; what is no list as it is."""
    if not isinstance(content, list):
        return content
    return "".join(part.get("text") or marks.get(part["type"], "") for part in content)


def _templates(directory: pathlib.Path) -> dict[str, str]:
    """The folder's templates by name; as in transformers, files go before tokenizer_config.json."""
    files = {path.stem: path for path in directory.glob("additional_chat_templates/*.jinja")}
    if (usual := directory / "chat_template.jinja").exists():
        files["default"] = usual
    if files:
        with reported():
            return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    order = ("chat_template.json", "tokenizer_config.json")
    found = huggingface.read_optional(directory, *order).get("chat_template") or {}
    try:
        if isinstance(found, list):
            found = {each["name"]: each["template"] for each in found}
        found = {"default": found} if isinstance(found, str) else dict(found)
        if not all(isinstance(x, str) for pair in found.items() for x in pair):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{directory}: chat_template is neither a text nor named texts") from None
    return found


def checked(messages: Any, tools: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Copies of messages and tools as plain data; InputError for what no template could mean.

    Fields that are None are left out, as transformers does, but `content` beside tool calls, which
    DeepSeek's own templates expect to be None then.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise InputError('messages must be a list, as [{"role": "user", "content": "Hello"}]')
    if not messages:
        raise InputError("there is no message; give at least one")
    for number, message in enumerate(messages):
        if complaint := _complaint(message):
            raise InputError(f"message {number}: {complaint}")
    if tools is not None and not (
        isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise InputError("tools must be a list of JSON schemas, each a dict")
    plain = _plain([dict(message) for message in messages], "messages")
    for message in plain:
        for key in [key for key, x in message.items() if x is None and key != "content"]:
            del message[key]
        message.setdefault("content", None)
    return plain, _plain(list(tools), "tools") if tools else None


def _complaint(message: Any) -> str:
    if not isinstance(message, Mapping):
        return f"it is a {type(message).__name__}; it must be a dict with role and content"
    role, calls = message.get("role"), message.get("tool_calls")
    if role not in ROLES:
        what = f"its role is {role!r}" if "role" in message else "it has no role"
        return f"{what}; it must be one of {', '.join(ROLES)}"
    if calls is not None and not (
        isinstance(calls, list | tuple) and all(isinstance(call, Mapping) for call in calls)
    ):
        return "its tool_calls must be a list of dicts"
    content = message.get("content")
    if isinstance(content, list | tuple) and content:
        return next(filter(None, map(_part_complaint, content)), "")
    if not isinstance(content, str) and not (content is None and role == "assistant" and calls):
        return f"its content must be text, not {type(content).__name__}"
    return ""


def _part_complaint(part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in PARTS:
        what = f"is {kind!r}" if kind else "has no type"
        return f"a part of its content {what}; it must be one of {', '.join(PARTS)}"
    if kind == "text" and not isinstance(part.get("text"), str):
        return 'a text of its content must be {"type": "text", "text": "..."}'
    return ""


def _plain(value: Any, name: str) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: not plain JSON data ({one_line(error)})") from None


def _rendered(
    templates: dict[str, str],
    names: dict[str, str],
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    variables: dict[str, Any],
) -> str:
    name = "tool_use" if tools and "tool_use" in templates else "default"
    if name not in templates:
        there = ", ".join(sorted(templates))
        raise InputError(f"the checkpoint's chat templates have no default, only {there}")
    known = {"documents": None, "add_generation_prompt": True, **names}
    known |= _plain(variables, "variables") | {"messages": messages, "tools": tools}
    with _within(TIME):
        try:
            return _compiled(templates[name]).render(known)
        except InputError:
            raise
        except Exception as error:  # a template can raise anything
            what = f"the chat template cannot write this: {one_line(error)}"
            raise InputError(f"{what}; correct the messages, or the template") from None


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise InputError when what runs here takes longer: Python looks at the clock line by line."""
    end, before = time.monotonic() + seconds, sys.gettrace()

    def watch(*_: Any) -> Callable:
        if time.monotonic() > end:
            raise InputError(f"the chat template did not end within {seconds:g} s; replace it")
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


@functools.lru_cache(8)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@functools.cache
def _environment() -> Any:
    """Jinja as chat templates expect it, which is as transformers sets it up."""
    jinja2: Any = require("jinja2")
    extensions: Any = require("jinja2.ext")

    class Generation(extensions.Extension):
        """`{% generation %}` marks what an assistant wrote; it changes no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    environment = require("jinja2.sandbox").ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.intercepted_binops = frozenset(("*", "**"))
    environment.binop_table |= {"*": _times, "**": _power}
    environment.filters["tojson"] = _json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": lambda *pairs, **fields: dict(*pairs, **fields),
        "namespace": _namespaces(jinja2),
    }
    return environment


def _namespaces(jinja2: Any) -> Callable:
    """`namespace(...)`, without names that mean something to Python."""

    class Namespace(jinja2.utils.Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                _refuse(f"a namespace's field cannot be called {name}")
            super().__setitem__(name, value)

    def namespace(*pairs: Any, **fields: Any) -> Namespace:
        made = Namespace()
        for name, value in dict(*pairs, **fields).items():
            made[name] = value
        return made

    return namespace


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML; models were taught plain JSON."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise InputError(f"the chat template refuses this: {one_line(Exception(message))}")


def _power(*_: Any) -> None:
    _refuse("it uses **")


def _times(left: Any, right: Any) -> Any:
    sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
    if sizes[0] * sizes[1] > LARGEST:
        _refuse(f"it multiplies to more than {LARGEST}")
    return left * right
