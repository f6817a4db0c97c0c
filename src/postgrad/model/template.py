"""The chat template and the tokens around it: fallback, BOS, stop tokens, padding, frozen variables.

A template is settled once, when the model is loaded, and then used unchanged for training, asking and serving;
it is saved with the model. Templates are untrusted: transformers renders them in a sandbox, and
:mod:`postgrad.data.chat` within limits of time and size.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postgrad.data.chat import render_text
from postgrad.data.encoding import adds_bos
from postgrad.errors import CheckError, ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

FROZEN = re.compile(r"^\{#- frozen by postgrad -#\}.*?\{#- end -#\}", re.DOTALL)
SENTINEL = "postgradsentinel"

# The tutorial's form, with the model's own end token and a generation prompt. The prompt ends without a space,
# so that the space and the answer's first word can be one token, as in the full text.
FALLBACK = (
    "{%- if tools %}{{ raise_exception('the fallback chat template has no form for tools') }}{% endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ 'System: ' + message['content'] + '\\n' }}"
    "{%- elif message['role'] == 'user' -%}{{ 'User: ' + message['content'] + '\\n' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}"
    "{%- else -%}{{ raise_exception('the fallback chat template has no form for role ' + message['role']) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"
)


@dataclass(slots=True)
class Chat:
    """How a tokenizer speaks: what was found and what was settled.

    Args:
        source: where the template came from, for people.
        stop_ids: ids that end an answer, the template's own first.
        stop_tokens: their texts, in the same order.
        notes: what was changed on the tokenizer, and why.
    """

    source: str
    stop_ids: list[int]
    stop_tokens: list[str]
    notes: list[str] = field(default_factory=list)


def prepare_chat(
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    *,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
) -> Chat:
    """Settle template, BOS, stop tokens and padding on ``tokenizer``, in place. Doing it twice changes nothing.

    Args:
        tokenizer: changed in place: ``chat_template``, ``eos_token``, ``pad_token``.
        generation_config: changed in place: ``eos_token_id`` becomes the list of stop tokens, ``pad_token_id`` set.
        chat_template_path: a Jinja file, or a folder or model name to take the template from.
        eos_token: replaces the tokenizer's end-of-sequence token; must be in the vocabulary.
        pad_token: replaces the tokenizer's padding token; must be in the vocabulary.

    Raises:
        ModelError: when there is no end token, or the template cannot be rendered.
        CheckError: when the template writes BOS twice or never writes a stop token.
    """
    notes: list[str] = []
    for name, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is not None:
            _require_token(tokenizer, token, name)
            setattr(tokenizer, name, token)
    source = _settle_template(tokenizer, chat_template_path)
    if not tokenizer.eos_token:
        raise ModelError("the tokenizer has no end-of-sequence token", "name one with eos_token=TOKEN")
    _settle_bos(tokenizer, notes)
    stop_ids = _stop_ids(tokenizer, generation_config)
    _settle_pad(tokenizer, stop_ids, notes)
    if generation_config is not None:
        generation_config.eos_token_id = list(stop_ids)
        generation_config.pad_token_id = tokenizer.pad_token_id
    return Chat(source, stop_ids, [str(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids], notes)


def freeze_variables(
    tokenizer: PreTrainedTokenizerBase, *, today: date, enable_thinking: bool, variables: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write the run's template variables into the template as defaults, in place.

    Training, asking and any server that uses the saved template then agree on them. Variables the template does
    not mention are left out.

    Args:
        tokenizer: its ``chat_template`` is changed.
        today: the date that a template which prints the date will print.
        enable_thinking: default of that variable.
        variables: further variables with JSON values.

    Returns:
        The variables that were frozen.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        frozen: dict[str, Any] = {}
        changed = {}
        for name, text in template.items():
            changed[name], found = _freeze(text, today, enable_thinking, variables or {})
            frozen.update(found)
        tokenizer.chat_template = changed
        return frozen
    tokenizer.chat_template, frozen = _freeze(str(template), today, enable_thinking, variables or {})
    return frozen


def is_frozen(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template carries a run's variables as defaults."""
    return isinstance(tokenizer.chat_template, str) and FROZEN.match(tokenizer.chat_template) is not None


def _freeze(template: str, today: date, enable_thinking: bool, variables: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    body = FROZEN.sub("", template)
    values: dict[str, Any] = {}
    if re.search(r"\benable_thinking\b", body):
        values["enable_thinking"] = enable_thinking
    if re.search(r"\bdate_string\b", body):
        values["date_string"] = today.strftime("%d %b %Y")
    values.update({name: value for name, value in variables.items() if re.search(rf"\b{re.escape(name)}\b", body)})
    body = re.sub(
        r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda match: json.dumps(today.strftime(match.group(2))), body
    )
    if not values:
        return body, {}
    sets = "".join(f"{{%- set {name} = {name} | default({_literal(value)}) -%}}" for name, value in values.items())
    return f"{{#- frozen by postgrad -#}}{sets}{{#- end -#}}{body}", values


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it: as in JSON, but null is none."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _settle_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> str:
    if path is not None:
        tokenizer.chat_template = _read_template(path)
        return path
    if tokenizer.chat_template == FALLBACK:
        return "fallback (System/User/Assistant)"
    if tokenizer.chat_template:
        return "the model's own"
    tokenizer.chat_template = FALLBACK
    return "fallback (System/User/Assistant)"


def _read_template(path: str) -> str:
    file = Path(path).expanduser()
    if file.is_dir() and (file / "chat_template.jinja").exists():
        file = file / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"chat_template_path: {path} cannot be read: {error}", "save it as UTF-8 text") from None
    from transformers import AutoTokenizer

    try:
        template = AutoTokenizer.from_pretrained(path, trust_remote_code=False).chat_template
    except Exception as error:
        raise ConfigError(f"chat_template_path: {path} is no file, and loading it as a model failed: {error}") from None
    if not template:
        raise ConfigError(f"chat_template_path: the tokenizer of {path} has no chat template")
    return str(template)


def _exchange(tokenizer: PreTrainedTokenizerBase) -> str:
    """A question and an answer, rendered."""
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": SENTINEL}]
    return render_text(tokenizer, messages, add_generation_prompt=False)


def _settle_bos(tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> None:
    bos = tokenizer.bos_token
    if not bos:
        return
    text = _exchange(tokenizer).lstrip()
    if text.startswith(bos + bos):
        raise CheckError("the chat template writes BOS twice", "remove one bos_token from the template")
    if adds_bos(tokenizer) and not text.startswith(bos) and isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = "{{- bos_token -}}" + tokenizer.chat_template
        notes.append(f"the model expects {bos} at the start and the chat template did not write it: added")


def _stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> list[int]:
    text = _exchange(tokenizer)
    if SENTINEL not in text:
        raise CheckError("the chat template does not write the assistant's answer", "give another: chat_template_path")
    before, _, after = text.rpartition(SENTINEL)
    special = sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}, key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(token) for token in special if token)) if special else None
    found = pattern.search(after) if pattern else None
    known = getattr(generation_config, "eos_token_id", None)
    known = [*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id]
    header = pattern.findall(before)[-1:] if pattern else []
    # A template that always writes a generation prompt: what follows the answer may be the next answer's header.
    if found is None or (found.group() in header and tokenizer.convert_tokens_to_ids(found.group()) not in known):
        raise CheckError(
            f"the chat template ends an answer without a stop token (after the answer comes {after[:40]!r}), "
            "so the model would never learn to stop",
            "give a template that ends assistant turns with the eos token: chat_template_path=FILE",
        )
    ids = [_require_token(tokenizer, found.group(), "stop token")]
    for token_id in known:
        if token_id is not None and token_id not in ids:
            ids.append(int(token_id))
    return ids


def _settle_pad(tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], notes: list[str]) -> None:
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in stop_ids:
        return
    vocabulary = tokenizer.get_added_vocab()
    known = ("<|endoftext|>", "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", tokenizer.unk_token)
    free = [token for token in known if token in vocabulary and vocabulary[token] not in stop_ids]
    if free:
        notes.append(f"pad token is {free[0]} (was {tokenizer.pad_token}), so that it is no stop token")
        tokenizer.pad_token = free[0]
    elif tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"pad token is {tokenizer.eos_token}; masks come from the rendering, so it stays trained")


def _require_token(tokenizer: PreTrainedTokenizerBase, token: str, name: str) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(token_id, int) or (token_id == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise ConfigError(f"{name}: {token!r} is not a token of this model", "choose one from its vocabulary")
    return token_id
