"""The language of each row's answers, and rows in one that hardly any other row has.

Most scripts name their language, or a small group of them. Latin script is told apart by py3langid, a small offline
model (Lui & Baldwin 2012). Short texts, mathematics and code have no language here, and are never named.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from postgrad.checks.prepare import Check
from postgrad.checks.texts import parts, verdict
from postgrad.types import Example

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

# A language of fewer rows than one in 50 is a stray; one of more is part of the mixture.
STRAY_SHARE = 0.02
# Where strays together are more than this, the data is meant to have many languages.
MANY_SHARE = 0.05
# Fewer letters do not tell a Latin language: names and terms look alike in all of them.
LEAST_LETTERS, LEAST_SIGNS = 60, 12
SURE = 0.99
MOST_LETTERS = 1000
# No other language has so many of the commonest English words. Most texts need no more than this, and no model loaded.
ENGLISH_SHARE = 0.08
# Some seconds of work. With more rows a part is looked at, and the message says so.
LOOKED_AT = 20_000

_CODE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]|https?://\S+|<[^<>\n]+>", re.DOTALL
)
# A line with these is code, whatever words it has.
_CODE_LINE = re.compile(r"[{};=<>|\\]|\w\(|_\w|^\s*(?:(?:import|from|def|class|return)\b|#|//|\$)", re.MULTILINE)
_NO_LETTER = re.compile(r"[\W\d_]+")
_ENGLISH = re.compile(
    r"\b(?:the|of|and|or|that|which|with|this|from|are|its|what|while|when|their|into)\b", re.IGNORECASE
)
_NAMES = {
    "CJK": "Chinese", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean", "CYRILLIC": "Cyrillic script",
    "ARABIC": "Arabic script", "GREEK": "Greek", "HEBREW": "Hebrew", "THAI": "Thai", "DEVANAGARI": "Devanagari script",
}  # fmt: skip
_LATIN = {
    "en": "English", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese",
    "nl": "Dutch", "sv": "Swedish", "da": "Danish", "no": "Norwegian", "fi": "Finnish", "pl": "Polish", "cs": "Czech",
    "sk": "Slovak", "hu": "Hungarian", "ro": "Romanian", "tr": "Turkish", "vi": "Vietnamese", "id": "Indonesian",
    "et": "Estonian", "lv": "Latvian", "lt": "Lithuanian", "sl": "Slovenian", "hr": "Croatian", "ca": "Catalan",
}  # fmt: skip


def language_check(examples: Sequence[Example]) -> Check:
    """Rows whose answers are in a language that hardly any other row has.

    Args:
        examples: training rows.
    """
    step = math.ceil(len(examples) / LOOKED_AT) or 1
    looked = examples[::step]
    known = [(example, name) for example in looked if (name := language(example)) is not None]
    counts = Counter(name for _, name in known)
    strays = {name for name, count in counts.items() if count < STRAY_SHARE * len(known)}
    found = [(example, f"its answer is in {name}") for example, name in known if name in strays]
    evidence: dict[str, Any] = {"languages": dict(counts.most_common()), "unknown": len(looked) - len(known)}
    sampled = f" (looking at one row in {step})" if step > 1 else ""
    passing = "no row has enough words to tell its language"
    if known:
        main = [f"{name} {count / len(known):.0%}" for name, count in counts.most_common() if name not in strays]
        passing = ", ".join(main[:5]) or f"{len(counts)} languages, each of few rows"
        passing += f", of {len(known):,} rows long enough to tell{sampled}"
    if len(found) > MANY_SHARE * len(known):
        message = f"{passing}; {len(found):,} rows in {len(strays)} languages of under {STRAY_SHARE:.0%} each"
        return Check("language", "pass", message, evidence={"rows": len(found), **evidence})
    return verdict(
        "language",
        found,
        passing=passing,
        warning=f"{len(found):,} of {len(known):,} rows{sampled} are in a language that hardly any other row has: "
        + ", ".join(f"{name} {counts[name]}" for name in sorted(strays, key=lambda name: (-counts[name], name))[:5]),
        cure="look whether they are meant; remove them, or add more rows of that language",
        evidence=evidence,
    )


def language(example: Example) -> str | None:
    """The language or script of a row's answers, or None where it cannot be told."""
    texts = [part.text for part in parts(example) if part.role in ("assistant", "text") and not part.called]
    return _language(_CODE.sub(" ", "\n".join(texts)[: 8 * MOST_LETTERS]))


def _language(text: str) -> str | None:
    lines = [line for line in text.splitlines() if not _CODE_LINE.search(line)]
    text = "\n".join(lines)
    letters = _NO_LETTER.sub("", text)[:MOST_LETTERS]
    scripts = Counter({"LATIN": len(letters)} if letters.isascii() else map(_script, letters))
    if not letters:
        return None
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.1 * len(letters):
        scripts["HIRAGANA"] += scripts.pop("CJK", 0) + scripts.pop("KATAKANA", 0)
    script, count = scripts.most_common(1)[0]
    if script != "LATIN":
        # Terms in Latin script are common in other languages, and take many letters.
        return _NAMES.get(script, script.capitalize()) if count >= LEAST_SIGNS else None
    others = len(letters) - count
    if count < LEAST_LETTERS or others > 0.2 * count:
        return None
    if len(_ENGLISH.findall(text)) > ENGLISH_SHARE * len(text.split()):
        return "English"
    name, sure = _identifier().classify(text[: 2 * MOST_LETTERS].casefold())
    return _LATIN[name] if sure >= SURE else None


@cache
def _script(letter: str) -> str:
    """The script of a letter: the first word of its Unicode name."""
    if letter.isascii():
        return "LATIN"
    return unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]


@cache
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    made = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    made.set_languages(list(_LATIN))
    return made
