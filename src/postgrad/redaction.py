"""What looks like a password or an access token, so that it can be found, named and hidden.

A pattern asks for the shape that a service gives its tokens, or for a value that no example would have. So a name in
code such as ``hf_model_name`` or ``password=os.environ[…]`` is none.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

_MIXED = r"(?=[\w-]*\d)(?=[\w-]*[A-Z])"  # a random token has both; words joined with hyphens have not
KINDS: dict[str, re.Pattern[str]] = {
    "private key": re.compile(
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]*-----|\Z)", re.DOTALL
    ),
    "JSON web token": re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    "AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})"),
    "Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "ModelScope token": re.compile(r"\bms-[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b"),
    "OpenAI or Anthropic key": re.compile(rf"\bsk-{_MIXED}[\w-]{{20,}}"),
    "Slack token": re.compile(r"\bxox[abeoprs]-(?=[\w-]*\d)[\w-]{10,}"),
    "Google key": re.compile(r"\bAIza[\w-]{35}"),
    "Stripe key": re.compile(r"\b[sr]k_live_[A-Za-z0-9]{16,}"),
    "password in a URL": re.compile(r"(?<=://)[^/\s:@<>{}$*]{1,64}:[^/\s:@<>{}$*]{1,128}(?=@)"),
    "password": re.compile(
        r"(?<![A-Za-z])(?:password|passwd|pwd|secret|api_?key|access_?token|auth_?token|密码|口令|密钥)[\"']?\s*[:=：]\s*[\"']?"
        r"(?=[^\s\"',;]*\d)(?=[^\s\"',;]*[A-Za-z])(?P<value>[^\s\"',;()<>{}\[\]$/][^\s\"',;()<>{}\[\]$]{7,})(?![\w(\[])",
        re.IGNORECASE,
    ),
}
_BROAD = re.compile(
    r"(?<=://)[^/\s@]+(?=@)|\b(?:hf_|sk-|ghp_|ms-)[A-Za-z0-9_-]{16,}"
    r"|(?i:(?<=[?&]token=)|(?<=[?&]api_key=)|(?<=[?&]access_token=)|(?<=bearer ))[^\s&\"']+"
)
# Variables whose values are hidden wherever they appear; a shorter value would be found everywhere.
_VARIABLES = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
_LEAST_LENGTH = 8
# Every match has one of these, in lower case. To look for them first is many times faster.
_HINTS = {
    "private key": ("private key",),
    "JSON web token": ("eyj",),
    "AWS key": ("akia", "asia"),
    "GitHub token": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    "Hugging Face token": ("hf_",),
    "ModelScope token": ("ms-",),
    "OpenAI or Anthropic key": ("sk-",),
    "Slack token": ("xox",),
    "Google key": ("aiza",),
    "Stripe key": ("k_live_",),
    "password in a URL": ("://",),
    "password": ("passw", "pwd", "secret", "key", "token", "密", "口令"),
}
# A value with one of these words is an example, or is read from elsewhere.
_EXAMPLE = re.compile(r"x{4}|\*{3}|\.{3}|example|your|change|placeholder|dummy|1234|env|:pass(?:word)?$", re.IGNORECASE)


def secret_kinds(text: str) -> Counter[str]:
    """Count what looks like a secret.

    Args:
        text: any text.

    Returns:
        How many of each kind; the secrets themselves are not in it.
    """
    found: Counter[str] = Counter()
    for kind in _possible(text):
        found[kind] += sum(_is_secret(match) for match in KINDS[kind].finditer(text))
    return +found


def hide(value: Any) -> Any:
    """Put "…" in place of what :func:`secret_kinds` counts, in every text of a value.

    Args:
        value: text, or lists and dictionaries of it; anything else is returned as it is.
    """
    if isinstance(value, dict):
        return {key: hide(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hide(item) for item in value]
    if isinstance(value, str):
        for kind in _possible(value):
            value = KINDS[kind].sub(_hidden, value)
    return value


def redact(value: Any) -> Any:
    """As :func:`hide`, on weaker grounds: what starts like a token, a user name in a URL, values of the environment.

    For settings and log lines of the program itself, where nobody misses what is hidden in vain.
    """
    return _redact(value, _environment())


def holds_secret(value: Any) -> bool:
    """Whether some text in ``value`` has what :func:`secret_kinds` counts."""
    return bool(hide(value) != value)


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _redact(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [_redact(item, known) for item in value]
    if not isinstance(value, str):
        return value
    for secret in known:
        value = value.replace(secret, "…")
    return _BROAD.sub("…", hide(value))


def _environment() -> list[str]:
    """Values of variables such as HF_TOKEN; the longest first, since one may contain another."""
    found = {v for name, v in os.environ.items() if _VARIABLES.search(name) and len(v) >= _LEAST_LENGTH}
    return sorted(found, key=len, reverse=True)


def _possible(text: str) -> list[str]:
    lower = text.lower()
    return [kind for kind, hints in _HINTS.items() if any(hint in lower for hint in hints)]


def _is_secret(match: re.Match[str]) -> bool:
    groups = match.groupdict()
    value = groups["value"] if groups else match[0]
    named = bool(groups) or ":" in match[0]  # whatever has a service's own shape is taken at its word
    return not (named and "BEGIN" not in value and _EXAMPLE.search(value))


def _hidden(match: re.Match[str]) -> str:
    if not _is_secret(match):
        return match[0]
    value = match.groupdict().get("value") or match[0]
    return match[0].replace(value, "…")
