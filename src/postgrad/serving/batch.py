"""Rows that are decoded together, one token a call of the model; a row may join or leave between any two calls.

A row's keys and values end in the newest column of the cache, whatever its length: columns to its left are masked. So
a prompt that joins is computed alone, as if nothing else ran, and then placed beside the others.

Shapes: R places (some of them free), W columns, P tokens of a prompt, V vocabulary entries. H and D are a layer's heads
and head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from postgrad.decoding import Forward, UnsupportedModel, cache_layers, guarded
from postgrad.sampling import Chooser, Sampling, uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLACK = 64  # columns: the buffers grow, and unused columns on the left are given back, by at least so many


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    Args:
        id: of the token.
        logprob: natural logarithm of its probability before temperature and cuts; None where not asked for.
        top: the most likely tokens with theirs, best first.
    """

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


class Row:
    """One answer in the making.

    Args:
        prompt: its token ids.
        max_new_tokens: most tokens of the answer.
        sampling: how tokens are chosen; with a seed, the draws are those of ``generate`` for a single prompt.
        repetition_penalty: of the model's generation settings; 1 is none.
        logprobs: whether to say how likely each token was, and how many of the likeliest to name; None: not at all.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        repetition_penalty: float = 1.0,
        logprobs: int | None = None,
    ) -> None:
        self.ids = list(prompt)
        self.max_new_tokens, self.logprobs, self.generated = max_new_tokens, logprobs, 0
        self.choose = Chooser(sampling, repetition_penalty)
        self.plain = self.choose.greedy and repetition_penalty == 1.0
        self._uniform_S = None if self.choose.greedy else uniforms(sampling.seed, [0], max_new_tokens)[0]

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and answer at most."""
        return len(self.ids) - self.generated + self.max_new_tokens

    def take(self, logits_V: torch.Tensor, best: int | None = None) -> Token:
        """Choose the next token and keep it.

        Args:
            logits_V: of the last position.
            best: the largest one's index, where the caller knows it and the row is plainly greedy.
        """
        if best is None:
            draw = torch.zeros(1, dtype=torch.float64)
            if self._uniform_S is not None:
                draw = self._uniform_S[self.generated : self.generated + 1]
            history_1T = torch.tensor([self.ids], device=logits_V.device)
            best = int(self.choose(history_1T, logits_V[None], draw.to(logits_V.device)))
        self.ids.append(best)
        self.generated += 1
        if self.logprobs is None:
            return Token(best)
        logprob_V = logits_V.float().log_softmax(-1)
        values, indices = logprob_V.topk(min(self.logprobs, len(logprob_V)))
        return Token(best, float(logprob_V[best]), list(zip(indices.tolist(), values.tolist(), strict=True)))


class PlacedLayer(DynamicLayer):
    """Keys and values of rows that end in the same column, in buffers with room for more columns."""

    def __init__(self) -> None:
        super().__init__()
        self._stores: list[torch.Tensor] = []  # keys and values, (R, H, room, D) each
        self.columns = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one column to each row, and return all: (R, H, W, D) each."""
        if self.columns == self._stores[0].shape[2]:
            rows = list(range(self._stores[0].shape[0]))
            self.rebuild(rows, self.columns, len(rows))
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, self.columns : self.columns + 1] = states
        self.columns += 1
        return self._show()

    def rebuild(self, kept: list[int], width: int, places: int) -> None:
        """Copy rows into new buffers.

        Args:
            kept: rows to keep; they become 0, 1, 2, …
            width: columns; rows lose columns on the left, or gain empty ones.
            places: rows of the new buffers.
        """
        shared = min(width, self.columns)
        fresh = []
        for store in self._stores:
            # Zeros: a weight of zero times what was never written must be zero.
            wider = store.new_zeros(places, store.shape[1], width + SLACK, store.shape[3])
            wider[: len(kept), :, width - shared : width] = store[kept, :, self.columns - shared : self.columns]
            fresh.append(wider)
        self._stores, self.columns = fresh, width
        self._show()

    def place(self, row: int, prompt: DynamicLayer) -> None:
        """Put a prompt's keys and values into a free row of buffers that are wide enough."""
        for store, states in zip(self._stores, _states(prompt), strict=True):
            store[row] = 0
            store[row, :, self.columns - states.shape[2] : self.columns] = states[0]

    def like(self, prompt: DynamicLayer) -> None:
        """Begin with buffers of no rows, made for a prompt's keys and values."""
        keys, values = _states(prompt)
        self.lazy_initialization(keys, values)
        self._stores = [states.new_zeros(0, *states.shape[1:]) for states in (keys, values)]
        self.columns = keys.shape[2]

    def _show(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (store[:, :, : self.columns] for store in self._stores)
        self.keys, self.values = keys, values
        return keys, values


def _states(layer: DynamicLayer) -> tuple[torch.Tensor, torch.Tensor]:
    keys: Any = layer.keys
    values: Any = layer.values
    if keys is None or values is None:
        raise UnsupportedModel("a layer shares the keys and values of another")
    return keys, values


class RunningBatch:
    """All rows that run.

    Args:
        model: in evaluation mode; nothing else may use it meanwhile.
        pad_id: fed to free places.
    """

    def __init__(self, model: PreTrainedModel, pad_id: int) -> None:
        self.forward, self.pad_id = Forward(model), pad_id
        self.layers = len(guarded(cache_layers, model))
        self.device = model.device
        self.clear()

    def clear(self) -> None:
        """Forget all rows and give their memory back."""
        self.places: list[Row | None] = []
        self.placed = [PlacedLayer() for _ in range(self.layers)]
        self.cache = Cache(layers=list(self.placed))
        self.mask_RW = torch.zeros(0, 0, dtype=torch.int64, device=self.device)

    @property
    def rows(self) -> list[Row]:
        """The rows that run."""
        return [row for row in self.places if row is not None]

    @torch.no_grad()
    def join(self, row: Row) -> Token:
        """Compute a prompt alone, choose its first token, and place it beside the rows that run.

        Raises:
            UnsupportedModel: when this way of decoding is not for the model.
        """
        length = len(row.ids)
        # Every layer keeps all tokens: the mask of a sliding window hides the old ones.
        own = [DynamicLayer() for _ in range(self.layers)]
        ids_1P = torch.tensor([row.ids], device=self.device)
        position_1P = torch.arange(length, device=self.device)[None]
        logits_1V = guarded(self.forward, ids_1P, torch.ones_like(ids_1P), position_1P, Cache(layers=list(own)))
        place = self._free_place(length, own)
        for layer, prompt in zip(self.placed, own, strict=True):
            layer.place(place, prompt)
        self.mask_RW[place] = 0
        self.mask_RW[place, self.mask_RW.shape[1] - length :] = 1
        self.places[place] = row
        return row.take(logits_1V[0])

    def leave(self, row: Row) -> None:
        """Free a row's place."""
        self.places[self.places.index(row)] = None
        if not self.rows:
            self.clear()

    @torch.no_grad()
    def step(self) -> list[tuple[Row, Token]]:
        """One more token for each row."""
        self._tidy()
        last = [self.pad_id if row is None else row.ids[-1] for row in self.places]
        positions = [0 if row is None else len(row.ids) - 1 for row in self.places]
        ids_R1 = torch.tensor(last, device=self.device)[:, None]
        position_R1 = torch.tensor(positions, device=self.device)[:, None]
        self.mask_RW = torch.nn.functional.pad(self.mask_RW, (0, 1), value=1)
        logits_RV = self.forward(ids_R1, self.mask_RW, position_R1, self.cache)
        best_R = logits_RV.float().argmax(-1).tolist()
        return [
            (row, row.take(logits_RV[place], best_R[place] if row.plain else None))
            for place, row in enumerate(self.places)
            if row is not None
        ]

    def _free_place(self, length: int, own: list[DynamicLayer]) -> int:
        """A place for a prompt of so many tokens."""
        if not self.places:
            for layer, prompt in zip(self.placed, own, strict=True):
                layer.like(prompt)
            self.mask_RW = self.mask_RW.new_zeros(0, length)
        if None not in self.places:
            self._rebuild(max(length, self.mask_RW.shape[1]), len(self.places) + 1)
        elif length > self.mask_RW.shape[1]:
            self._rebuild(length, len(self.places))
        return self.places.index(None)

    def _tidy(self) -> None:
        """Give back places once half are free, and columns that only rows which left needed."""
        rows, width = self.rows, self.mask_RW.shape[1]
        needed = max(len(row.ids) for row in rows) - 1  # the newest token has no column yet
        if width - needed >= max(SLACK, width // 4) or 2 * len(rows) <= len(self.places) > 1:
            self._rebuild(needed, len(rows))

    def _rebuild(self, width: int, places: int) -> None:
        kept = [place for place, row in enumerate(self.places) if row is not None]
        old = self.mask_RW
        shared = min(width, old.shape[1])
        self.mask_RW = old.new_zeros(places, width)
        self.mask_RW[: len(kept), width - shared :] = old[kept, old.shape[1] - shared :]
        self.places = [*self.rows, *[None] * (places - len(kept))]
        for layer in self.placed:
            layer.rebuild(kept, width, places)
