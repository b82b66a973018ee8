"""DeepSeek-V3.2's conversations: it comes with Python code instead of a template, never run here.

The form (the model card of DeepSeek-V3.2): a question is followed at once by the assistant's mark
and by <think> or, where no thinking is wanted or it is over, </think>. Reasoning stays only after
the last question. Tools are described in the system message; calls are written as DSML, and
results follow the call's end of sentence. The texts between the marks are the model's own.
"""

import json
from typing import Any

from deepseek_jax.core.errors import InputError
from deepseek_jax.data.sources import one_line
from deepseek_jax.data.tokenizer import BOS, EOS

USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
DSML = "\uff5cDSML\uff5c"
TOOLS = """

## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<DSMLfunction_calls>" block like the following as part of \
your reply to the user:
<DSMLfunction_calls>
<DSMLinvoke name="$FUNCTION_NAME">
<DSMLparameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</DSMLparameter>
...
</DSMLinvoke>
<DSMLinvoke name="$FUNCTION_NAME2">
...
</DSMLinvoke>
</DSMLfunction_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists \
and objects should use JSON format. The "string" attribute should be set to "true" for string type \
parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider \
outputting a thinking block. Here is an example:

<DSMLfunction_calls>
...
</DSMLfunction_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
""".replace("DSML", DSML)
FORMAT = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


def rendered(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, variables: dict[str, Any]
) -> str:
    """The text of messages that `chat.checked` gave; of the variables only `thinking` counts.

    `tools` are those of a system message at the beginning. System and developer messages may have
    `tools` and `response_format` of their own, an assistant's `reasoning_content` and `tool_calls`.
    Raises InputError where the model's own code fails; but a developer's message before the last
    question stays, where that code drops it and then fails.
    """
    if tools:
        first = messages[0]["role"] == "system"
        system = messages[0] if first else {"role": "system", "content": ""}
        messages = [system | {"tools": tools}, *messages[first:]]
    thinking = bool(variables.get("thinking"))
    asked = [i for i, message in enumerate(messages) if message["role"] in ("user", "developer")]
    last, text, waiting = max(asked, default=-1), BOS[0], [0, 0]  # results: seen, and called for
    for i, message in enumerate(messages):
        try:
            text += _written(message, thinking and i >= last, waiting)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = f"its tools or tool calls are not as OpenAI's API has them ({one_line(error)!r})"
            raise InputError(f"message {i}: {why}") from None
        except InputError as error:
            raise InputError(f"message {i}: {error}") from None
    return text


def _written(message: dict[str, Any], thinks: bool, waiting: list[int]) -> str:
    """One message; `thinks` from the last question on, if there is to be reasoning."""
    role, content, opened = message["role"], message["content"], "<think>" if thinks else "</think>"
    if role == "tool":
        return _result(content, opened, waiting)
    calls = message.get("tool_calls") or [] if role == "assistant" else []
    waiting[:] = 0, len(calls)
    if role == "user":
        return f"{USER}{content}{ASSISTANT}{opened}"
    if role == "assistant":
        reasoning = message.get("reasoning_content") or ""
        if not thinks:
            return f"{content or ''}{_calls(calls)}{EOS[0]}"
        if not (reasoning or calls):
            raise InputError("an assistant that thinks needs reasoning_content or tool_calls")
        return f"{reasoning}</think>{content or ''}{_calls(calls)}{EOS[0]}"
    described = _described(message)
    if role == "system":
        return content + described
    if not content:
        raise InputError("a developer's message needs content")
    return f"{USER}{described}\n\n# The user's message is: {content}{ASSISTANT}{opened}"


def _result(content: str, opened: str, waiting: list[int]) -> str:
    """One result, and around the first and last of a message's calls what embraces them all."""
    waiting[0] += 1
    if waiting[0] > waiting[1]:
        raise InputError("a tool's result without a call before it")
    before = "\n\n<function_results>" if waiting[0] == 1 else ""
    after = f"\n</function_results>\n\n{opened}" if waiting[0] == waiting[1] else ""
    return f"{before}\n<result>{content}</result>{after}"


def _calls(calls: list[dict[str, Any]]) -> str:
    if not calls:
        return ""
    lines = [f"\n\n<{DSML}function_calls>"]
    for function in (call["function"] for call in calls):
        given = function["arguments"]
        given = json.loads(given) if isinstance(given, str) else given
        lines.append(f'<{DSML}invoke name="{function["name"]}">')
        lines.append("\n".join(_parameter(name, value) for name, value in given.items()))
        lines.append(f"</{DSML}invoke>")
    return "\n".join([*lines, f"</{DSML}function_calls>"])


def _parameter(name: str, value: Any) -> str:
    text = isinstance(value, str)
    head = f'<{DSML}parameter name="{name}" string="{str(text).lower()}">'
    return f"{head}{value if text else _json(value)}</{DSML}parameter>"


def _described(message: dict[str, Any]) -> str:
    """The tools and the form of answers that a system or developer message asks for."""
    tools, form = message.get("tools"), message.get("response_format")
    schemas = "\n".join(_json(tool["function"]) for tool in tools or [])
    listed = f"{TOOLS}{schemas}\n</functions>\n" if tools else ""
    return listed + (FORMAT + _json(form) if form else "")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
