"""Lists of chat messages, OpenAI's and ShareGPT's way of writing them → one checked form."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from postgrad.data.jsontext import JsonProblem, parse
from postgrad.data.rows import short
from postgrad.errors import DataError
from postgrad.types import Message, Source

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "ai": "assistant", "bot": "assistant", "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
FUNCTION_CALL = "function_call"
KNOWN_KEYS = {
    "role", "content", "from", "value", "tool_calls", "function_call", "reasoning_content", "thinking", "name",
    "tool_call_id", "weight", "train",
}  # fmt: skip
_MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos")
Turn = tuple[str, Message]
"""A message and the field it came from, such as ``messages[2]``."""


@dataclass(frozen=True, slots=True)
class Place:
    """Makes errors that name file and row."""

    source: Source

    def error(self, reason: str, cure: str, field: str | None) -> DataError:
        """An error about one field of the row."""
        return DataError(reason, cure, file=self.source.file, row=self.source.row, field=field)


def parse_turns(value: Any, field: str, place: Place) -> list[Turn]:
    """Normalise a list of messages, each with ``role``/``content`` or ``from``/``value``.

    Raises:
        DataError: naming the message and key, for anything that is not such a list.
    """
    if isinstance(value, str):
        cure = "write the list itself, not its text"
        if value.lstrip().startswith("[{'"):
            cure = "this is Python's way of writing lists, not JSON: save the data as JSONL"
        raise place.error(f"is text, not a list of messages: {short(value)}", cure, field)
    if not isinstance(value, list | tuple):
        cure = 'write [{"role": "user", "content": "…"}, …]'
        raise place.error(f"is no list of messages but {type_name(value)}", cure, field)
    if not value:
        raise place.error("has no messages", "give at least a user and an assistant message, or remove the row", field)
    return [(f"{field}[{index}]", _message(item, f"{field}[{index}]", place)) for index, item in enumerate(value)]


def is_sharegpt(value: Any) -> bool:
    """Whether the messages are written with ``from`` and ``value``."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and value[0].get("role") is None


def check_turns(turns: list[Turn], place: Place, given: int = 0) -> None:
    """Refuse conversations whose turns are in an order no chat template means, or that have nothing to train on.

    Args:
        turns: the conversation.
        place: where it is.
        given: how many leading messages are never trained.

    Raises:
        DataError: naming the first turn that is out of order.
    """
    whole = turns[0][0].partition("[")[0]
    trained = [(field, turn) for field, turn in turns[given:] if turn["role"] == "assistant"]
    if not trained:
        cure = "add the assistant's answer, or remove the row"
        raise place.error("nothing to train on: there is no assistant turn", cure, turns[-1][0].partition("[")[0])
    if all(turn.get("weight") == 0 for _, turn in trained):
        cure = "give one assistant turn weight 1, or remove the row"
        raise place.error("nothing to train on: every assistant turn has weight 0", cure, whole)
    before = _check_orders(turns, place)
    if before == "user":
        cure = "remove the last user turn, or add its answer"
        raise place.error("ends with a user turn that no answer follows", cure, turns[-1][0])
    if before == "tool":
        cure = "remove the tool result, or add the assistant's answer"
        raise place.error("ends with a tool result that no answer follows", cure, turns[-1][0])


def check_question(turns: list[Turn], place: Place) -> None:
    """Refuse conversations that do not end where an answer is due.

    Raises:
        DataError: naming the first turn that is out of order.
    """
    last = _check_orders(turns, place)
    if last not in ("user", "tool"):
        reason = f"ends with {'an assistant' if last == 'assistant' else 'a system'} turn, so that nothing is asked"
        cure = "end with the user's turn" if last == "system" else "remove the last turn, or name the column 'messages'"
        raise place.error(reason, cure, turns[-1][0])


def _check_orders(turns: list[Turn], place: Place) -> str:
    """Check each turn against the one before it; the last turn's role."""
    before = ""
    for field, turn in turns:
        _check_order(before, turn["role"], field, place)
        before = turn["role"]
    return before


def _check_order(before: str, role: str, field: str, place: Place) -> None:
    if role == "system" and before:
        raise place.error("wrong role order: a system message that is not first", "move it to the front", field)
    if role == "assistant" and before in ("", "system"):
        cure = "put the user's question before it, or remove this turn"
        raise place.error("wrong role order: the assistant speaks before any user turn", cure, field)
    if role == before and role in ("user", "assistant"):
        cure = "join the two into one, or add the turn that is missing between them"
        raise place.error(f"wrong role order: two {role} turns in a row", cure, field)
    if role == "tool" and before not in ("assistant", "tool"):
        cure = "put the assistant turn that calls the tool before it"
        raise place.error(f"wrong role order: a tool result after {before or 'nothing'}", cure, field)


def text_message(role: str, text: Any, field: str, place: Place) -> Message:
    """A message out of a column of text, such as Alpaca's ``output``.

    Raises:
        DataError: for something that is not text, or is empty.
    """
    if not isinstance(text, str):
        raise place.error(f"is no text but {type_name(text)}", "write it as text", field)
    if role in ("user", "assistant") and not text.strip():
        raise place.error("is empty", "fill it in, or remove the row", field)
    return {"role": role, "content": text}


def read_json_text(value: Any, field: str, place: Place) -> Any:
    """The value itself, or what its text says where it is JSON text.

    Raises:
        DataError: for text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse(value)
    except JsonProblem as problem:
        raise place.error(problem.describe(lines=True), problem.cure, field) from None


def type_name(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return "text" if isinstance(value, str) else f"a {type(value).__name__}"


def _message(item: Any, field: str, place: Place) -> Message:
    if not isinstance(item, Mapping):
        cure = 'write {"role": "user", "content": "…"}' if item is not None else "remove it, or fill it in"
        raise place.error(f"is no message but {type_name(item)}", cure, field)
    item = {key: value for key, value in item.items() if value is not None}
    for key in _MEDIA_KEYS:
        if item.get(key):
            raise place.error("images, sound and video are not supported", "use rows of text only", f"{field}.{key}")
    role_key = "role" if "role" in item or "from" not in item else "from"
    content_key = "content" if "content" in item or "value" not in item else "value"
    role, calls = _role(item, f"{field}.{role_key}", place)
    if calls:
        message: Message = {"role": "assistant", "content": ""}
        message["tool_calls"] = _tool_calls(item.get(content_key), f"{field}.{content_key}", place)
    else:
        message = {"role": role}
        message |= _calls(item, role, field, place)
        message["content"] = _content(item, content_key, message, field, place)
    message |= _reasoning(item, role, field, place)
    message |= _weight(item, role, field, place)
    for key in ("name", "tool_call_id"):
        if key in item and item[key] != "":
            if not isinstance(item[key], str):
                raise place.error(f"is no text but {type_name(item[key])}", "write it as text", f"{field}.{key}")
            message[key] = item[key]
    return message


def _role(item: Mapping[str, Any], field: str, place: Place) -> tuple[str, bool]:
    """The normalised role, and whether the message is a ShareGPT function call."""
    role = item.get("role", item.get("from"))
    known = "the roles are system, user, assistant and tool"
    if role is None:
        raise place.error("the role is missing or null", f"{known}; name the key 'role'", field)
    if not isinstance(role, str):
        raise place.error(f"the role is no text but {type_name(role)}", known, field)
    word = role.strip().lower()
    if word == FUNCTION_CALL:
        return "assistant", True
    if word not in ROLES:
        near = difflib.get_close_matches(word, ROLES, n=1, cutoff=0.6)
        cure = f"did you mean {near[0]!r}?" if near else known
        raise place.error(f"unknown role {short(role)}", cure, field)
    return ROLES[word], False


def _content(item: Mapping[str, Any], key: str, message: Message, field: str, place: Place) -> str:
    role, field = message["role"], f"{field}.{key}"
    content = item.get(key)
    if content is None:
        if message.get("tool_calls"):
            return ""
        raise place.error("the content is missing or null", "fill it in, or remove the message", field)
    if isinstance(content, list | tuple):
        content = "".join(_part(part, f"{field}[{index}]", place) for index, part in enumerate(content))
    if not isinstance(content, str):
        cure = "write it as text" + ("; a tool result as JSON text" if role == "tool" else "")
        raise place.error(f"the content is no text but {type_name(content)}", cure, field)
    if not content.strip() and (role == "user" or (role == "assistant" and not message.get("tool_calls"))):
        raise place.error("the content is empty", "fill it in, or remove the message", field)
    return content


def _part(part: Any, field: str, place: Place) -> str:
    shape = 'a part of text is {"type": "text", "text": "…"}'
    if not isinstance(part, Mapping):
        raise place.error(f"is no content part but {type_name(part)}", shape, field)
    kind = part.get("type", "text")
    if kind != "text":
        reason = f"content of type {short(kind)} is not supported"
        if isinstance(kind, str) and any(word in kind for word in ("image", "audio", "video")):
            reason = f"images, sound and video are not supported (content of type {kind!r})"
        raise place.error(reason, f"use rows of text only; {shape}", field)
    if not isinstance(part.get("text"), str):
        raise place.error(f"its text is {type_name(part.get('text'))}", shape, f"{field}.text")
    return str(part["text"])


def _calls(item: Mapping[str, Any], role: str, field: str, place: Place) -> Message:
    """``tool_calls``, or OpenAI's older single ``function_call``."""
    for key in ("tool_calls", "function_call"):
        value = item.get(key)
        if not value:
            continue
        if role != "assistant":
            raise place.error("only an assistant turn calls tools", "change the role, or remove it", f"{field}.{key}")
        return {"tool_calls": _tool_calls(value, f"{field}.{key}", place)}
    return {}


def _tool_calls(value: Any, field: str, place: Place) -> list[dict[str, Any]]:
    value = read_json_text(value, field, place)
    several = isinstance(value, list | tuple)
    if not several and not isinstance(value, Mapping):
        raise place.error(f"is no list of tool calls but {type_name(value)}", _CALL_SHAPE, field)
    if not value:
        raise place.error("has no tool call", _CALL_SHAPE, field)
    return [
        _tool_call(call, f"{field}[{index}]" if several else field, place)
        for index, call in enumerate(value if several else [value])
    ]


_CALL_SHAPE = 'a tool call is {"type": "function", "function": {"name": "…", "arguments": {…}}}'


def _tool_call(call: Any, field: str, place: Place) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise place.error(f"is no tool call but {type_name(call)}", _CALL_SHAPE, field)
    function = call.get("function")
    if function is None:
        function = call
    else:
        field = f"{field}.function"
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise place.error("the tool call has no function name", _CALL_SHAPE, field)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = read_json_text(arguments, f"{field}.arguments", place) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise place.error(f"are no object but {type_name(arguments)}", _CALL_SHAPE, f"{field}.arguments")
    result: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    if isinstance(call.get("id"), str) and call["id"]:
        result["id"] = call["id"]
    return result


def _reasoning(item: Mapping[str, Any], role: str, field: str, place: Place) -> Message:
    found = {key: item[key] for key in ("reasoning_content", "thinking") if item.get(key) not in (None, "")}
    if not found:
        return {}
    key, value = next(iter(found.items()))
    if not isinstance(value, str):
        raise place.error(f"is no text but {type_name(value)}", "write it as text", f"{field}.{key}")
    if len(found) > 1 and found["thinking"] != value:
        raise place.error("differs from reasoning_content", "keep one of the two", f"{field}.thinking")
    if role != "assistant":
        raise place.error("only an assistant turn has reasoning", "move it to the assistant turn", f"{field}.{key}")
    return {"reasoning_content": value}


def _weight(item: Mapping[str, Any], role: str, field: str, place: Place) -> Message:
    weights: dict[str, int] = {}
    if "weight" in item:
        value = item["weight"]
        if isinstance(value, bool) or not isinstance(value, int | float) or value not in (0, 1):
            raise place.error(f"the weight is {short(value)}", "write 0 or 1", f"{field}.weight")
        weights["weight"] = int(value)
    if "train" in item:
        if not isinstance(item["train"], bool):
            raise place.error(f"is {short(item['train'])}", "write true or false", f"{field}.train")
        weights["train"] = int(item["train"])
    if not weights:
        return {}
    key, weight = next(iter(weights.items()))
    if len(set(weights.values())) > 1:
        raise place.error("contradicts weight", "keep one of the two", f"{field}.train")
    if role == "assistant":
        return {"weight": weight}
    if weight:
        cure = (
            f"only assistant turns can be trained: remove {key}; or train on every token with assistant_only_loss=false"
        )
        raise place.error(f"a {role} turn is marked to be trained", cure, f"{field}.{key}")
    return {}


def unused_keys(messages: Iterable[Any]) -> set[str]:
    """Keys of messages that nothing reads."""
    return {
        str(key)
        for item in messages
        if isinstance(item, Mapping)
        for key, value in item.items()
        if value is not None and key not in KNOWN_KEYS
    }
