"""Reference: chats are written and encoded as the originals do it, rendered as transformers does.

The committed table comes from DeepSeek's own tokenizers, templates and encoder: see
make_chat_cases.py. Templates that misbehave are stopped, and bad messages are refused.
"""

import json
import pathlib
import random
import sys

import pytest
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from deepseek_jax.checkpoint import huggingface
from deepseek_jax.core.errors import InputError
from deepseek_jax.data.tokenizer import Bytes, DeepSeek, open_tokenizer
from deepseek_jax.serving import chat
from deepseek_jax.serving.language import LanguageModel

HERE = pathlib.Path(__file__).parent
CASES = json.loads((HERE / "chat_cases.json").read_text())
V1, V3, V31 = ((HERE / f"chat/{name}.jinja").read_text() for name in ("v1", "v3", "v31"))
R1 = V3.replace("  <｜Assistant｜>\n", "  <｜Assistant｜><think>{{ '\\n' }}\n")
TEMPLATES = {"v1": V1, "v3": V3, "r1": R1, "v31": V31}
SPEAKERS = {  # who speaks in each form
    "v1": ("DeepSeekMoE", "V2-Lite", "V2"), "v3": ("V3",), "r1": ("V3",), "v31": ("V3",),
    "v32": ("V3.2",),
}  # fmt: skip
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
NAMES = {"bos_token": BOS, "eos_token": EOS}
HELLO = [{"role": "user", "content": "Hello"}]
THINK, END = 128_798, 128_799


def folder(where: pathlib.Path, **files: str | dict) -> pathlib.Path:
    """A folder of files, dicts as JSON; `_` in a name stands before its ending."""
    where.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = where / ".".join(name.rsplit("_", 1))
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return where


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A maker of language models without a model: what chat_tokens needs, from a folder."""

    def make(name: str) -> LanguageModel:
        where = folder(
            tmp_path_factory.mktemp(name),
            tokenizer_json=(HERE / f"chat/{'v1' if name == 'v1' else 'v3'}.json").read_text(),
            tokenizer_config_json=NAMES | {"add_bos_token": name == "v1"},
            config_json={"model_type": "deepseek_v32" if name == "v32" else "deepseek_v3"},
            **({"chat_template_jinja": TEMPLATES[name]} if name in TEMPLATES else {}),
        )
        tokenizer, renderer = huggingface.tokenizer_of(where), chat.renderer(where)
        return LanguageModel(None, None, tokenizer, None, renderer=renderer)

    made = {name: make(name) for name in SPEAKERS}
    return made.__getitem__


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.shows("chat", family=family) for family in families])
        for name, families in SPEAKERS.items()
    ],
)
def test_ids_are_the_originals(speaker, name):
    lm, cases = speaker(name), [case for case in CASES if case["model"] == name]
    assert len(cases) > 8
    for case in cases:
        options = {key: case[key] for key in ("tools", "thinking", "variables") if key in case}
        ids = lm.chat_tokens(case["messages"], **options)
        assert ids == case["ids"], case["name"]
        assert ids[0] == lm.tokenizer.bos_id
        assert ids.count(lm.tokenizer.bos_id) == 1 + (case["name"] == "spelled")


def test_the_ids_on_the_model_card():
    """The only ids that DeepSeek itself published; they tie the table to the outside."""
    case = next(case for case in CASES if case["name"] == "published" and case["thinking"])
    assert case["ids"] == [
        0, 128803, 33310, 128804, 128799, 19923, 3, 342, 1030, 22651, 4374, 1465, 16, 1, 128803,
        19, 13, 19, 127252, 128804, 128798,
    ]  # fmt: skip


def test_marks_are_tokens_and_stay_visible(speaker):
    assert speaker("r1").chat_tokens(HELLO)[-2:] == [THINK, 201]
    assert speaker("v31").chat_tokens(HELLO)[-1] == END
    for thinking, last in ((True, THINK), (False, END)):
        assert speaker("v31").chat_tokens(HELLO, thinking=thinking)[-1] == last
        assert speaker("v32").chat_tokens(HELLO, thinking=thinking)[-1] == last
    assert speaker("v32").chat_tokens(HELLO) == speaker("v32").chat_tokens(HELLO, thinking=False)
    tokenizer = speaker("v3").tokenizer
    marks = "<think></think><｜User｜><｜tool▁sep｜>"
    ids = tokenizer.encode_marked(f"{BOS}{marks}{EOS}")
    assert ids == [0, 128798, 128799, 128803, 128814, 1]
    assert tokenizer.decode(ids) == marks
    assert len(tokenizer.encode(BOS)) > 1  # a document's text, which names no token
    newest = open_tokenizer(DeepSeek())
    assert newest.encode_marked(f"{BOS}<think></think>{EOS}") == [0, 128_821, 128_822, 1]
    assert len(speaker("v1").tokenizer.encode_marked("<think>")) > 1


FEATURES = """
{%- set seen = namespace(n=0) %}
  {% for message in messages %}
    {%- if message.role == "tool" %}{% continue %}{% endif %}
    {%- generation %}{{ message.content }}{% endgeneration %}
    {% set seen.n = seen.n + 1 %}
    {{ message | tojson }} {{ message | tojson(indent=2) }}
    {{- message | tojson(ensure_ascii=true, sort_keys=true, separators=(",", ":")) }}
  {% endfor %}
{{ tools | tojson if tools else "none" }} {{ documents }} {{ seen.n }} {{ bos_token }} {{ missing }}
{{ dict(a=seen.n)["a"] * 2 }} {{ add_generation_prompt }} {{ "-" * 3 }} {{ strftime_now("%Y") }}
{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}
"""
WORDS = ["hi", " ", "你好", "🦊", "\n\n", "</think>", "{{ x }}", "<b>'\"&", "\t", "é", "", "\\n"]


def conversation(rng: random.Random) -> list[dict]:
    words = lambda: "".join(rng.choices(WORDS, k=3))  # noqa: E731
    found = []
    for _ in range(rng.randint(1, 7)):
        role = rng.choice(["system", "user", "user", "assistant", "tool"])
        found.append({"role": role, "content": words()})
        if role == "assistant" and rng.random() < 0.4:
            function = {"name": words(), "arguments": '{"a": "ü"}'}
            found[-1]["tool_calls"] = [{"type": "function", "function": function}] * 2
            found[-1]["content"] = rng.choice([words(), None])
    return found


@pytest.mark.parametrize("template", [*TEMPLATES.values(), FEATURES], ids=[*TEMPLATES, "features"])
def test_texts_are_those_of_transformers(template, tmp_path):
    where = folder(
        tmp_path, tokenizer_config_json=NAMES | {"chat_template": template}, config_json={}
    )
    render, rng, texts = chat.renderer(where), random.Random(0), set()
    for turn in range(60):
        messages, tools = conversation(rng), [{"name": "f", "x": "中"}] if turn % 3 else None
        if template is V1:
            messages = [message for message in messages if message["content"] is not None]
        if not messages:
            continue
        variables = {"enable_thinking": bool(turn % 2), "thinking": bool(turn % 5)}
        variables |= {} if turn % 4 else {"add_generation_prompt": False}
        theirs = render_jinja_template(
            [messages], tools=tools, chat_template=template,
            **NAMES | {"add_generation_prompt": True} | variables,
        )[0][0]  # fmt: skip
        assert render(*chat.checked(messages, tools), variables) == theirs
        texts.add(theirs)
    assert len(texts) > 40


NAMED = [{"name": "default", "template": "d{{ bos_token }}"}, {"name": "tool_use", "template": "t"}]


@pytest.mark.parametrize(
    ("config", "files", "texts"),
    [
        ({"chat_template": "one{{ eos_token }}"}, {}, ["one</s>", "one</s>"]),
        ({"chat_template": NAMED}, {}, ["d<s>", "t"]),
        ({"chat_template": NAMED}, {"chat_template.jinja": "file"}, ["file", "file"]),
        (
            {"chat_template": "config"},
            {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "more"},
            ["file", "more"],
        ),
    ],
)
def test_templates_are_found_where_transformers_finds_them(config, files, texts, tmp_path):
    ends = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>"}
    content = (HERE / "chat/v1.json").read_text().replace(BOS, "<s>").replace(EOS, "</s>")
    folder(tmp_path, tokenizer_json=content, tokenizer_config_json=ends | config)
    (tmp_path / "additional_chat_templates").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for tools, text in zip((None, [{"name": "f"}]), texts, strict=True):
        assert chat.renderer(tmp_path)(*chat.checked(HELLO, tools), {}) == text
        assert theirs.apply_chat_template(HELLO, tools=tools, tokenize=False) == text


def test_other_forms_of_templates(tmp_path):
    named = folder(tmp_path / "a", tokenizer_config_json={"chat_template": {"default": "x"}})
    assert chat.renderer(named)(HELLO, None, {}) == "x"
    legacy = folder(tmp_path / "b", chat_template_json={"chat_template": "legacy"})
    assert chat.renderer(legacy)(HELLO, None, {}) == "legacy"
    own = folder(tmp_path / "c", config_json={"model_type": "deepseek_v32"})
    assert chat.renderer(own)(HELLO, None, {}).endswith("</think>")
    assert chat.renderer(folder(own, chat_template_jinja="x"))(HELLO, None, {}) == "x"
    assert chat.renderer(folder(tmp_path / "d", config_json={"model_type": "llama"})) is None
    for number, bad in enumerate(([1], 5, {"default": 3}, [{"name": "x"}])):
        where = folder(tmp_path / f"bad{number}", tokenizer_config_json={"chat_template": bad})
        with pytest.raises(InputError, match="neither a text nor named texts"):
            chat.renderer(where)
    odd = folder(tmp_path / "odd", tokenizer_config_json={"chat_template": {"rag": "x"}})
    with pytest.raises(InputError, match="no default, only rag"):
        chat.renderer(odd)(HELLO, None, {})


def user(**fields) -> dict:
    return {"role": "user", "content": "a"} | fields


@pytest.mark.parametrize(
    ("messages", "options", "complaint"),
    [
        ([], {}, "there is no message"),
        ("Hello", {}, "messages must be a list"),
        (user(), {}, "messages must be a list"),
        (["Hello"], {}, "message 0: it is a str"),
        ([{"content": "a"}], {}, "message 0: it has no role"),
        ([user(), user(role="bot")], {}, "message 1: its role is 'bot'; it must be one of system"),
        ([user(role=["user"])], {}, "its role is"),
        ([{"role": "user"}], {}, "its content must be text, not NoneType"),
        ([user(content=[])], {}, "its content must be text, not list"),
        ([user(content=[{"type": "text"}])], {}, "a text of its content must be"),
        ([user(content=[{"type": "image_url"}])], {}, "is 'image_url'; it must be one of text, im"),
        ([user(content=["a"])], {}, "a part of its content has no type"),
        ([user(role="assistant", content=None)], {}, "its content must be text"),
        ([user(role="assistant", tool_calls={"a": 1})], {}, "its tool_calls must be a list"),
        ([user(content="\ud800")], {}, "is not valid UTF-8"),
        ([user(x={1, 2})], {}, "messages: not plain JSON data"),
        ([user()], {"tools": {"name": "f"}}, "tools must be a list"),
        ([user()], {"tools": ["f"]}, "tools must be a list"),
        ([user()], {"variables": {"x": object()}}, "variables: not plain JSON data"),
        ([user(role="assistant", tool_calls=[{}])], {}, "the chat template cannot write this"),
    ],
)  # fmt: skip
def test_bad_messages_are_refused(speaker, messages, options, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        speaker("v3").chat_tokens(messages, **options)
    assert "\n" not in str(error.value)


CALL = {"function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("messages", "tools", "complaint"),
    [
        ([user(role="tool")], None, "message 0: a tool's result without a call"),
        ([user(role="assistant", tool_calls=[CALL]), *[user(role="tool")] * 2], None, "message 2"),
        ([user(role="assistant", tool_calls=[CALL]), user(), user(role="tool")], None, "message 2"),
        ([user(role="developer", content="")], None, "developer's message needs content"),
        ([user(), user(role="assistant")], None, "needs reasoning_content or tool_calls"),
        ([user(role="assistant", tool_calls=[{}])], None, "not as OpenAI's API has them"),
        ([user()], [{"name": "f"}], "not as OpenAI's API has them"),
        ([user(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])],
         None, "not as OpenAI's API has them"),
        ([user(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": "[]"}}])],
         None, "not as OpenAI's API has them"),
    ],
)  # fmt: skip
def test_messages_that_v32_cannot_mean(speaker, messages, tools, complaint):
    with pytest.raises(InputError, match=complaint):
        speaker("v32").chat_tokens(messages, tools=tools, thinking=True)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('only\n one system') }}", "refuses this: only one system"),
        ("{% for x in %}", "cannot write this"),
        ("{{ messages[7].content.x }}", "cannot write this: .*no element 7"),
        ("{% include '/etc/passwd' %}", "cannot write this"),
        ("{{ ''.__class__.__mro__ }}", "cannot write this: access to attribute '__class__'"),
        ("{{ '{0.__class__.x}'.format(1) }}", "cannot write this: access to attribute"),
        ("{{ namespace.__globals__.x }}", "cannot write this: access to attribute"),
        ("{{ dict.mro() }}", "cannot write this"),
        ("{{ messages.append(1) }}", "cannot write this: access to attribute 'append'"),
        ("{% set n = namespace() %}{% set n.__call__ = 1 %}", "field cannot be called __call__"),
        ("{{ namespace(_x=1) }}", "field cannot be called _x"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", r"it uses \*\*"),
        ("{{ 'a' * 99999999 }}", "multiplies to more than"),
        ("{{ [1] * 99999999 }}", "multiplies to more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot write this"),
        ("{{ range(10 * 99999) }}", "cannot write this: Range too big"),
        ("", "gives no text"),
    ],
)
def test_templates_cannot_harm(template, complaint, tmp_path):
    tokenizer = open_tokenizer(Bytes())
    where = folder(tmp_path, chat_template_jinja=template)
    lm = LanguageModel(None, None, tokenizer, None, renderer=chat.renderer(where))
    with pytest.raises(InputError, match=complaint) as error:
        lm.chat_tokens(HELLO)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ lipsum(n=99999999) }}",
    ],
)
def test_templates_end(template, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "TIME", 0.2)
    where = folder(tmp_path, chat_template_jinja=template)
    with pytest.raises(InputError, match="did not end within 0.2 s"):
        chat.renderer(where)(HELLO, None, {})


def test_messages_stay_as_they_were(speaker):
    messages = [user(role="assistant", content=None, name=None, tool_calls=[CALL])]
    before = json.dumps(messages)
    speaker("v32").chat_tokens(messages, tools=[CALL])
    assert json.dumps(messages) == before


def test_fields_that_are_none_are_left_out(speaker):
    """V3's template would take a tool_calls of None for calls."""
    plain = [{"role": "assistant", "content": "a"}, *HELLO]
    given = [message | {"tool_calls": None, "name": None} for message in plain]
    for name in ("v3", "v31", "v32"):
        assert speaker(name).chat_tokens(given) == speaker(name).chat_tokens(plain)


def test_variables_reach_the_template(tmp_path):
    template = "{{ [thinking, enable_thinking, add_generation_prompt, x] }}"
    render = chat.renderer(folder(tmp_path, chat_template_jinja=template))
    lm = LanguageModel(None, None, open_tokenizer(Bytes()), None, renderer=render)
    for options, text in (
        ({}, "[Undefined, Undefined, True, Undefined]"),
        ({"thinking": False}, "[False, False, True, Undefined]"),
        ({"thinking": True, "variables": {"x": "é"}}, "[True, True, True, 'é']"),
        (
            {"thinking": True, "variables": {"thinking": 3, "add_generation_prompt": False}},
            "[3, True, False, Undefined]",
        ),
    ):
        assert lm.tokenizer.decode(lm.chat_tokens(HELLO, **options)) == text


def test_a_template_needs_the_chat_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for cached in (chat._environment, chat._compiled):
        cached.cache_clear()
    render = chat.renderer(folder(tmp_path, chat_template_jinja="x"))
    with pytest.raises(InputError, match=r"pip install 'deepseek_jax\[chat\]'"):
        render(HELLO, None, {})


def test_who_cannot_chat_says_so(lm):
    with pytest.raises(InputError, match="this checkpoint has no chat template"):
        lm.chat(HELLO)
    with pytest.raises(InputError, match="this checkpoint has no tokenizer"):
        LanguageModel(None, None, None, None).chat(HELLO)
