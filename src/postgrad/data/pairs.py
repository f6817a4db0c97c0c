"""Rows of two answers to one prompt, of which one is preferred → pairs (DPO). Each row is judged by itself.

    prompt + chosen + rejected                  texts, or lists of messages
    chosen + rejected                           whole chats or whole texts: what both begin with is the prompt
    conversations + chosen + rejected           ShareGPT
    instruction (+ input) + chosen + rejected   Alpaca; also with ``output: [better, worse]``

The implicit prompt is the one that TRL's ``extract_prompt`` finds, with two differences: a text is never cut inside a
word, since no model sees half a word as a prompt; and answers that would begin with a user turn are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from postgrad.data.columns import no_answers, no_prompt, renamed
from postgrad.data.fields import conversation, instruction_turns, opened, refuse_chat_columns, turns_of, with_system
from postgrad.data.formats import detect
from postgrad.data.messages import Place, Turn, check_turns, parse_turns, text_message, type_name
from postgrad.data.rows import RawRow, Reader
from postgrad.types import Conversation, Message, Pair, TextRow

_SIDES = ("chosen", "rejected")
_PROMPTS = {"prompt", "messages", "conversations", "instruction", "input", "history"}
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
Sides = tuple[list[Turn], list[Turn]]
"""The chosen and the rejected chat, or their answers."""


def normalise_pair(row: RawRow, columns: dict[str, str] | None = None, text_field: str = "text") -> tuple[Pair, str]:
    """Bring a row of two answers into one form and check it.

    Args:
        row: the row as read.
        columns: explicit mapping, such as ``{"chosen": "better", "rejected": "worse"}``; mapped texts become turns of a
            chat where the row has a prompt.
        text_field: column of plain-text rows, which are refused.

    Returns:
        The pair, and its format: ``prompt+chosen+rejected``, ``chosen+rejected``, ``sharegpt pairs``,
        ``alpaca pairs`` or ``hh`` (texts of "Human:" and "Assistant:", which become chats).

    Raises:
        DataError: with file, row, field and cure, for a row that holds no pair, or whose two prompts differ.
    """
    columns, place = columns or {}, Place(row.source)
    values = renamed(opened(row, place), columns, {"prompt", *_SIDES}, _PROMPTS, place)
    values = _listed_answers(values, place)
    _refuse_other_rows(values, text_field, place)
    chosen, rejected = (_answer(values[side], columns.get(side, side), place) for side in _SIDES)
    prompt, kind = _prompt(values, columns, place)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _whole_texts(chosen, rejected, values, place)
        if isinstance(prompt, str) and not {"prompt", *_SIDES} & set(columns):
            return _texts(prompt, chosen, rejected, values, place), kind
        answers = _turn("chosen", chosen, place), _turn("rejected", rejected, place)
    elif isinstance(chosen, str) or isinstance(rejected, str):
        reason = "one of chosen and rejected is text, the other a list of messages"
        raise place.error(reason, "write both in the same way", "chosen" if isinstance(chosen, str) else "rejected")
    else:
        answers = chosen, rejected
    if _is_whole(answers, place):
        given = _agreed(answers, values.get("prompt"), columns.get("prompt", "prompt"), place)
        return _chats(answers, given, values, place), "chosen+rejected"
    if prompt is None:
        raise no_prompt(values, place)
    turns = turns_of(columns.get("prompt", "prompt"), prompt, "user", place) if isinstance(prompt, str) else prompt
    return _chats(([*turns, *answers[0]], [*turns, *answers[1]]), len(turns), values, place), kind


PAIRS: Reader[Pair] = Reader(normalise_pair, ("prompt", "chosen", "rejected", "system", "tools"))
"""Reads rows to compare (DPO)."""


def pair_texts(pair: Pair) -> tuple[str, str, str]:
    """Prompt, chosen and rejected answer as text for people; system messages are left out."""
    prompt, chosen = _side_texts(pair.chosen)
    return prompt, chosen, _side_texts(pair.rejected)[1]


def _side_texts(side: Conversation | TextRow) -> tuple[str, str]:
    if isinstance(side, TextRow):
        return side.prompt, side.completion
    prompt = [turn for turn in side.messages[: side.given] if turn["role"] != "system"]
    return _lines(prompt), _lines(side.messages[side.given :])


def _lines(messages: Sequence[Message]) -> str:
    lines = []
    for message in messages:
        name = f"{message['role']}: " if len(messages) > 1 else ""
        calls = "".join(f"\n{call}" for call in message.get("tool_calls") or [])
        lines.append(f"{name}{message.get('content') or ''}{calls}".strip())
    return "\n".join(lines)


# -- what the row holds ---------------------------------------------------------------------------------------------


def _listed_answers(values: dict[str, Any], place: Place) -> dict[str, Any]:
    """Alpaca's ``output`` of two answers, the better one first, as chosen and rejected."""
    answers = values.get("output")
    if "instruction" not in values or set(_SIDES) & set(values) or not isinstance(answers, list | tuple):
        return values
    if len(answers) != 2:
        raise place.error(f"holds {len(answers)} answers", "write two: [better, worse]", "output")
    for index, answer in enumerate(answers):
        text_message("assistant", answer, f"output[{index}]", place)
    others = {key: value for key, value in values.items() if key != "output"}
    return others | dict(zip(_SIDES, answers, strict=True))


def _refuse_other_rows(values: dict[str, Any], text_field: str, place: Place) -> None:
    missing = [side for side in _SIDES if side not in values]
    if not missing:
        return
    if len(missing) == 1:
        raise place.error("is missing or null", "fill it in, or remove the row", missing[0])
    kind = detect(values, text_field)
    if kind == "preference":
        reason = "this row labels one answer as good or bad (for KTO); DPO compares two answers to one prompt"
        cure = (
            "write an answer labelled true and one labelled false to the same prompt as one row of prompt, chosen and "
            "rejected; or imitate the rows labelled true, without the column 'label', with 'postgrad sft'"
        )
        raise place.error(reason, cure, "label")
    if kind == "unknown":
        raise no_answers(values, place)
    reason = f"this row holds one answer to imitate (format {kind}), and no chosen and rejected one"
    raise place.error(reason, "use 'postgrad sft', or add the column 'rejected'", None)


def _prompt(values: dict[str, Any], columns: dict[str, str], place: Place) -> tuple[str | list[Turn] | None, str]:
    """The prompt that stands apart from the answers, and the format's name."""
    if "prompt" in values:
        field, value = columns.get("prompt", "prompt"), values["prompt"]
        if isinstance(value, str):
            return text_message("user", value, field, place)["content"], "prompt+chosen+rejected"
        return turns_of(field, value, "user", place), "prompt+chosen+rejected"
    for name, kind in (("conversations", "sharegpt pairs"), ("messages", "prompt+chosen+rejected")):
        if name in values:
            return parse_turns(values[name], name, place), kind
    if "instruction" in values:
        return instruction_turns(values, place), "alpaca pairs"
    return None, "chosen+rejected"


def _answer(value: Any, field: str, place: Place) -> str | list[Turn]:
    if isinstance(value, str):
        return str(text_message("assistant", value, field, place)["content"])
    if isinstance(value, Mapping):
        return [(field, turn) for _, turn in parse_turns([value], field, place)]
    if not isinstance(value, list | tuple):
        reason = f"is neither text nor a list of messages but {type_name(value)}"
        raise place.error(reason, "write text, or a list of messages", field)
    return parse_turns(value, field, place)


def _turn(field: str, text: str, place: Place) -> list[Turn]:
    return [(field, text_message("assistant", text, field, place))]


# -- chats ----------------------------------------------------------------------------------------------------------


def _is_whole(answers: Sides, place: Place) -> bool:
    """Whether both answers are whole chats, which begin with the prompt."""
    starts = [turns[0][1]["role"] in ("system", "user") for turns in answers]
    if starts[0] != starts[1]:
        reason = "one of chosen and rejected begins with the prompt, the other with the answer"
        raise place.error(reason, "write both in the same way", answers[starts.index(False)][0][0])
    return starts[0]


def shared_turns(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How many leading turns (or characters) two answers share; at least the last of the shorter one is its answer."""
    least = min(len(chosen), len(rejected))
    return next((index for index in range(least) if chosen[index] != rejected[index]), least - 1)


def _agreed(chats: Sides, prompt: Any, field: str, place: Place) -> int:
    """How many leading turns of both chats are the prompt; an explicit prompt must say the same."""
    messages = [[message for _, message in turns] for turns in chats]
    if isinstance(prompt, list | tuple):
        wanted = [message for _, message in parse_turns(prompt, field, place)]
        for side, found in zip(_SIDES, messages, strict=True):
            if found[: len(wanted)] != wanted:
                raise place.error(f"differs from what {side} begins with", "write the same prompt in both", field)
        given = len(wanted)
    else:
        given = shared_turns(*messages)
        while given and "tool" in (messages[0][given]["role"], messages[1][given]["role"]):
            given -= 1
    for turns in chats:
        if len(turns) <= given or turns[given][1]["role"] != "assistant":
            where = turns[min(given, len(turns) - 1)][0]
            reason = "the prompts of chosen and rejected differ here: an answer must begin with an assistant turn"
            raise place.error(reason, "write the same prompt in both, and change the answers only", where)
    users = [message["content"].strip() for message in messages[0][:given] if message["role"] == "user"]
    if isinstance(prompt, str) and prompt.strip() not in users:
        reason = "differs from the user's turns in chosen and rejected"
        raise place.error(reason, "write the same prompt in both, or remove this column", field)
    return given


def _chats(chats: Sides, given: int, values: dict[str, Any], place: Place) -> Pair:
    chosen, rejected = (_chat(turns, given, values, place) for turns in chats)
    return Pair(chosen, rejected, place.source)


def _chat(turns: list[Turn], given: int, values: dict[str, Any], place: Place) -> Conversation:
    whole = with_system(turns, values, place)
    given += len(whole) - len(turns)
    for field, turn in whole[given:]:
        if turn.get("weight") == 0:
            cure = "remove the weight, or make the turn part of the prompt"
            raise place.error("DPO compares whole answers: weight 0 has no place in one", cure, f"{field}.weight")
    check_turns(whole, place, given)
    return conversation(whole, values, place, given)


# -- texts ----------------------------------------------------------------------------------------------------------


def _texts(prompt: str, chosen: str, rejected: str, values: dict[str, Any], place: Place) -> Pair:
    refuse_chat_columns(values, "{prompt: prompt, chosen: chosen, rejected: rejected}", place)
    return Pair(TextRow(prompt, chosen, place.source), TextRow(prompt, rejected, place.source), place.source)


def _whole_texts(chosen: str, rejected: str, values: dict[str, Any], place: Place) -> tuple[Pair, str]:
    spoken = _spoken(chosen, "chosen", place), _spoken(rejected, "rejected", place)
    if spoken[0] is not None and spoken[1] is not None:
        chats = spoken[0], spoken[1]
        return _chats(chats, _agreed(chats, None, "prompt", place), values, place), "hh"
    cut = shared_text(chosen, rejected)
    if not chosen[:cut].strip():
        raise no_prompt(values, place)
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        text_message("assistant", text[cut:], side, place)
    return _texts(chosen[:cut], chosen[cut:], rejected[cut:], values, place), "chosen+rejected"


def shared_text(chosen: str, rejected: str) -> int:
    """Where the prompt that two whole texts begin with ends.

    At their first difference, or at the start of the word that it is in; a space before it belongs to the answers.
    """
    cut = shared_turns(chosen, rejected)
    if _in_word(chosen, cut) or _in_word(rejected, cut):
        while cut and _is_letter(chosen[cut - 1]):
            cut -= 1
    return cut - 1 if cut and chosen[cut - 1] == " " else cut


def _in_word(text: str, position: int) -> bool:
    return position > 0 and _is_letter(text[position - 1]) and _is_letter(text[position])


def _is_letter(character: str) -> bool:
    """Whether it is a digit or has a case; scripts without case, such as Chinese, may be cut anywhere."""
    return character.isdecimal() or character.lower() != character.upper()


def _spoken(text: str, field: str, place: Place) -> list[Turn] | None:
    """The turns of a text in Anthropic's HH form; None for any other text."""
    parts = _SPEAKER.split("\n\n" + text.lstrip())
    if len(parts) < 5 or parts[0] or parts[1] != "Human":
        return None
    spoken = [
        {"role": speaker.lower(), "content": said.strip()}
        for speaker, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return parse_turns(spoken, field, place)
