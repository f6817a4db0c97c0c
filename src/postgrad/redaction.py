"""Tokens, keys and passwords are never printed or written: known kinds by form, those of the environment by value."""

from __future__ import annotations

import os
import re
from typing import Any

MARK = "…"
LEAST_LENGTH = 8  # of a value in the environment: a shorter one is hardly a secret, and would be found everywhere
FORMS = re.compile(
    r"(?<=://)[^/\s@]+(?=@)"  # user and password in a URL
    r"|\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|ms-|xox[abp]-)[A-Za-z0-9_-]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+"  # a JSON web token
    r"|(?i:(?<=[?&]token=)|(?<=[?&]api_key=)|(?<=[?&]access_token=)|(?<=bearer ))[^\s&\"']+"
)
NAMES = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)


def redact(value: Any) -> Any:
    """The same value with every secret replaced by "…".

    Args:
        value: a string, or lists and dictionaries of anything; other values are returned as they are.
    """
    return _redact(value, _environment())


def holds_secret(value: Any) -> bool:
    """Whether a string somewhere in ``value`` has the form of a password in a URL, a token or a key."""
    if isinstance(value, dict):
        return any(holds_secret(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(holds_secret(item) for item in value)
    return isinstance(value, str) and FORMS.search(value) is not None


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _redact(item, known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(item, known) for item in value]
    if not isinstance(value, str):
        return value
    for secret in known:
        value = value.replace(secret, MARK)
    return FORMS.sub(MARK, value)


def _environment() -> list[str]:
    """Values of variables such as HF_TOKEN; the longest first, since one may contain another."""
    found = {value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= LEAST_LENGTH}
    return sorted(found, key=len, reverse=True)
