"""Which reader belongs to a method."""

from __future__ import annotations

from typing import Any

from postgrad.data.formats import EXAMPLES
from postgrad.data.pairs import PAIRS
from postgrad.data.rows import Reader
from postgrad.data.tasks import TASKS

READERS: dict[str, Reader[Any]] = {"sft": EXAMPLES, "dpo": PAIRS, "grpo": TASKS}
