"""Messages → text with a tokenizer's own template, and the proof that the text holds what the messages hold."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from postgrad.errors import ModelError
from postgrad.limits import memory_limit, time_limit
from postgrad.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_SECONDS = 10.0
RENDER_BYTES = 4 * 2**30
MAX_RENDERED = 100_000_000


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    add_generation_prompt: bool,
    tools: list[dict[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """Render messages with the tokenizer's template, within limits of time and size.

    Args:
        tokenizer: its ``chat_template`` is used.
        messages: what is rendered; weights are left out.
        add_generation_prompt: end with what the assistant's answer continues.
        tools: JSON schemas of the tools offered.
        variables: further template variables.

    Raises:
        ModelError: when the template raises, takes longer than 10 seconds, asks for more than 4 GiB, or writes more
            than 100 MB. A template is a program of its author, so any exception may come out of it.
    """
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    try:
        with time_limit(RENDER_SECONDS, "rendering"), memory_limit(RENDER_BYTES):
            text = tokenizer.apply_chat_template(
                plain,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                tools=list(tools) if tools else None,
                **variables,
            )
    except Exception as error:
        raise ModelError(
            f"the chat template fails: {str(error) or type(error).__name__}",
            "give another with chat_template_path=FILE",
        ) from None
    if len(text) > MAX_RENDERED:
        raise ModelError(f"the chat template wrote {len(text):,} characters", "give another: chat_template_path=FILE")
    return str(text)


def reasoning_of(message: Message) -> str:
    """The reasoning of an assistant message, from its own field or from a think block in its content."""
    own = message.get("reasoning_content")
    if own:
        return str(own).strip()
    block, closed, _ = (message.get("content") or "").rpartition("</think>")
    return block.rpartition("<think>")[2].strip() if closed else ""


def has_reasoning(message: Message) -> bool:
    """Whether an assistant message carries reasoning, in its own field or as a think block."""
    return bool(message.get("reasoning_content")) or "</think>" in (message.get("content") or "")


def left_out(message: Message, text: str) -> str | None:
    """What of a message, reasoning apart, is missing from the text it was rendered into; None when nothing is."""
    content = message.get("content") or ""
    if message["role"] == "assistant":
        content = content.rpartition("</think>")[2]
    if not _contains(text, content.strip()):
        return "content"
    names = [str((call.get("function") or call).get("name", "")) for call in message.get("tool_calls") or []]
    return next((f"tool call {name}" for name in names if name not in text), None)


def tools_left_out(tools: list[dict[str, Any]] | None, text: str) -> str | None:
    """The name of the first tool that the text does not mention."""
    names = [str((tool.get("function") or tool).get("name", "")) for tool in tools or []]
    return next((name for name in names if name not in text), None)


def _contains(text: str, part: str) -> bool:
    """Whether a text holds another, as it stands or as a JSON string."""
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text
