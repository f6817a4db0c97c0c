"""Whether documents that share a pass keep out of each other's way, on this very model."""

from __future__ import annotations

from postgrad.checks.prepare import Check
from postgrad.model.packed import PackedModel


def isolation_check(packed: PackedModel) -> Check:
    """What trying the model has shown: see :func:`postgrad.model.packed.choose`.

    Args:
        packed: the model and how it is computed. A model whose state leaks from one document into the next (linear
            attention, convolutions) reads them one by one.
    """
    choices = packed.choices
    evidence = {"packing": choices.packing, "own_attention_kernel": choices.tiles, "reason": choices.reason}
    if choices.packing:
        message = "documents that share a pass give what each gives alone, tried on this model"
        return Check("isolation", "pass", message, evidence=evidence)
    message = choices.reason or "documents go one by one"
    cure = "nothing to do: it is right this way, only slower"
    return Check("isolation", "warn", message, cure, [], evidence)
