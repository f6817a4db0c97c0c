"""A tokenizer as llama.cpp reads it: tokens, kinds, merges or scores, special ids, chat template."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from postgrad.data.encoding import adds_bos
from postgrad.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

    from postgrad.model.load import LoadedModel

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# Ends of text that llama.cpp knows by their name.
KNOWN_ENDS = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>"}


def backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer as ``tokenizer.json`` holds it."""
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    return found


def is_byte_level(core: dict[str, Any]) -> bool:
    """Whether it is a byte-level BPE; the other kind llama.cpp has for these models is SentencePiece's.

    Raises:
        ModelError: for neither.
    """
    if core["model"]["type"] != "BPE":
        raise ModelError(f"GGUF export of a {core['model']['type']} tokenizer is not supported", "use --to hf")
    return not core["model"].get("byte_fallback")


def split_name(core: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text before merging.

    Raises:
        ModelError: for a way of splitting that it has no name for.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS

    parts = core.get("pre_tokenizer") or {}
    parts = parts["pretokenizers"] if parts.get("type") == "Sequence" else [parts]
    kinds = [part.get("type") for part in parts]
    last = parts[-1]
    plain = kinds[-1] == "ByteLevel" and not last["add_prefix_space"]
    if plain and last["use_regex"] and kinds == ["ByteLevel"]:
        return "gpt-2"
    if plain and last["use_regex"] and kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
        return "smollm"
    if plain and not last["use_regex"] and kinds == ["Split", "ByteLevel"] and parts[0]["behavior"] == "Isolated":
        pattern = parts[0]["pattern"].get("Regex")
        for name in ("llama-bpe", "qwen2", "tekken"):
            if SPLITS[name] == pattern and not parts[0]["invert"]:
                return name
    raise ModelError(
        f"llama.cpp has no name for how this tokenizer splits text ({', '.join(map(str, kinds))})", "use --to hf"
    )


def write_vocabulary(writer: GGUFWriter, loaded: LoadedModel) -> list[str]:
    """Write tokens, special ids and the chat template.

    Returns:
        What people should know about it.

    Raises:
        ModelError: for a tokenizer that llama.cpp has no form for.
    """
    tokenizer, config = loaded.tokenizer, loaded.model.config
    core = backend(tokenizer)
    byte_level = is_byte_level(core)
    tokens, kinds = _tokens(core, config.vocab_size, byte_level)
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    writer.add_tokenizer_pre(split_name(core) if byte_level else "default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in core["model"]["merges"]]
    if byte_level:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_prepends(core))
    notes = _write_special(writer, loaded)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    elif isinstance(tokenizer.chat_template, dict):
        writer.add_chat_template([{"name": n, "template": t} for n, t in tokenizer.chat_template.items()])
    return notes


def _tokens(core: dict[str, Any], size: int, byte_level: bool) -> tuple[list[str], list[int]]:
    """Texts and kinds, by id; ids that the tokenizer does not use get names of their own."""
    tokens, kinds = [f"[PAD{index}]" for index in range(size)], [UNUSED] * size
    unknown = core["model"].get("unk_token")
    for token, index in core["model"]["vocab"].items():
        kind = BYTE if not byte_level and BYTE_PIECE.fullmatch(token) else NORMAL
        tokens[index], kinds[index] = token, UNKNOWN if token == unknown and not byte_level else kind
    for added in core["added_tokens"]:
        text, index = added["content"], added["id"]
        if kinds[index] == UNKNOWN:
            continue
        # llama.cpp looks for user-defined tokens in the text itself, where a space is still a space.
        tokens[index] = text if added["special"] or byte_level else text.replace("▁", " ")
        kinds[index] = CONTROL if added["special"] else USER_DEFINED
    return tokens, kinds


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece joins the pair with the best score: minus the rank of the first merge that makes the token."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token] + 1) if token in ranks else 0.0 for token in tokens]


def _prepends(core: dict[str, Any]) -> bool:
    metaspace = (core.get("pre_tokenizer") or {}).get("prepend_scheme") in ("first", "always")
    return metaspace or '"Prepend"' in json.dumps(core.get("normalizer"))


def _write_special(writer: GGUFWriter, loaded: LoadedModel) -> list[str]:
    tokenizer, stops = loaded.tokenizer, loaded.chat.stop_ids
    eos = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    writer.add_eos_token_id(eos)
    others = [index for index in stops if index != eos]
    if others:
        writer.add_eot_token_id(others[0])
    if len(others) > 1:
        writer.add_eom_token_id(others[1])
    texts = [str(tokenizer.convert_ids_to_tokens(index)) for index in others[2:]]
    missing = [text for text in texts if text not in KNOWN_ENDS]
    for value, write in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
    ):
        if value is not None:
            write(int(value))  # type: ignore[arg-type]
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(False)
    return [f"GGUF has no place for the stop token {text}: give it to the server as a stop word" for text in missing]
