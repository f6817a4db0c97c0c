"""Rows that the user tokenised."""

from __future__ import annotations

from typing import Any

from postgrad.data.messages import Place, type_name
from postgrad.data.rows import short
from postgrad.types import TokenRow

IGNORED = -100
TOKEN_COLUMNS = {"input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks"}
_MASKS = ("completion_mask", "assistant_masks")


def token_row(values: dict[str, Any], place: Place) -> TokenRow:
    """``input_ids`` with ``labels``, a mask of 0 and 1, or neither (then every token is trained).

    Raises:
        DataError: for ids that are no ids, lengths that differ, or labels that are neither the id nor -100.
    """
    ids = _integers(values["input_ids"], "input_ids", place)
    if any(token < 0 for token in ids):
        index = next(index for index, token in enumerate(ids) if token < 0)
        raise place.error(f"is {ids[index]}", "token ids are 0 or more", f"input_ids[{index}]")
    if "attention_mask" in values and 0 in _same_length(values["attention_mask"], "attention_mask", ids, place):
        raise place.error("the row is padded", "remove the padding: postgrad packs rows", "attention_mask")
    labels = _labels(values, ids, place)
    # The first token has nothing before it that could predict it.
    if all(label == IGNORED for label in labels[1:]):
        raise place.error("nothing to train on: no token is trained", "remove the row, or mend its labels", "labels")
    return TokenRow(ids, labels, place.source)


def _labels(values: dict[str, Any], ids: list[int], place: Place) -> list[int]:
    if "labels" in values:
        labels = _same_length(values["labels"], "labels", ids, place)
        for index, (label, token) in enumerate(zip(labels, ids, strict=True)):
            if label not in (token, IGNORED):
                cure = "labels are not shifted: write the token's own id, or -100"
                raise place.error(f"is {label} where input_ids has {token}", cure, f"labels[{index}]")
        return labels
    for name in _MASKS:
        if name in values:
            mask = _same_length(values[name], name, ids, place)
            for index, flag in enumerate(mask):
                if flag not in (0, 1):
                    raise place.error(f"is {flag}", "write 0 or 1", f"{name}[{index}]")
            return [token if flag else IGNORED for token, flag in zip(ids, mask, strict=True)]
    return list(ids)


def _integers(value: Any, field: str, place: Place) -> list[int]:
    if not isinstance(value, list | tuple):
        raise place.error(f"is no list of integers but {type_name(value)}", "write [1, 2, 3]", field)
    for index, item in enumerate(value):
        if not isinstance(item, int) or isinstance(item, bool) or abs(item) >= 2**31:
            raise place.error(f"is no token id: {short(item)}", "write integers", f"{field}[{index}]")
    if not value:
        raise place.error("is empty", "remove the row", field)
    return list(value)


def _same_length(value: Any, field: str, ids: list[int], place: Place) -> list[int]:
    items = _integers(value, field, place)
    if len(items) != len(ids):
        reason = f"has {len(items)} entries, input_ids has {len(ids)}"
        raise place.error(reason, "give one for each token", field)
    return items
