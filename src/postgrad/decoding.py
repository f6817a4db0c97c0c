"""Token by token: a batch of prompts in, generated ids out, with the tokens that ``model.generate`` gives.

One call of the model makes one token for each row, and rows that have ended leave the batch. A model that this is not
for is refused with :class:`UnsupportedModel`; ``postgrad.graph_decoding`` does the same faster on a GPU.

Shapes: B rows of a batch, R rows still in it, T tokens, W tokens of the widest prompt, S steps (tokens to generate at
most), L = W + S or more (length of the cache), V vocabulary entries. A trailing 1 is a dimension of one entry.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from postgrad.sampling import Chooser

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DROP_SHARE = 0.125  # rows leave once this share of the batch has ended; dropping copies the cache of those that stay
GUARDED_STEPS = 2  # a model that cannot be decoded this way says so by then; later errors are the caller's


class UnsupportedModel(Exception):
    """This way of decoding is not for this model; the message says why."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts padded on the left, and what ends their answers.

    Args:
        ids_BW, mask_BW: int64, on the model's device; the mask is 0 on padding.
        uniform_BS: the rows' random numbers, on the CPU; its width is the number of steps.
        stops: ids that end a row.
        pad: the id of padding.
    """

    ids_BW: torch.Tensor
    mask_BW: torch.Tensor
    uniform_BS: torch.Tensor
    stops: Sequence[int]
    pad: int

    @property
    def steps(self) -> int:
        """Tokens to generate at most."""
        return self.uniform_BS.shape[1]


class RoomyLayer(DynamicLayer):
    """Keys and values in a buffer that has room for all tokens, where ``DynamicLayer`` copies everything each step.

    It grows like a ``DynamicLayer`` until it is given ``slot_1``. From then on each update writes at that position,
    which lives on the device, and answers with the whole buffer: nothing on the host changes from step to step, as a
    captured graph needs. A model that asks for the length then would bake in a stale number: it is refused.

    Args:
        room: the most tokens it can hold.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.slot_1: torch.Tensor | None = None
        self._stores: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values, and return all: (B, heads, length so far or L, head size) each."""
        if self._stores is None:
            self.lazy_initialization(key_states, value_states)
            # Zeros: what was never written is masked, but a weight of zero times a stray NaN would still be NaN.
            self._stores = tuple(  # type: ignore[assignment]
                states.new_zeros(*states.shape[:2], self.room, states.shape[3]) for states in (key_states, value_states)
            )
        assert self._stores is not None
        if self.slot_1 is not None:
            for store, states in zip(self._stores, (key_states, value_states), strict=True):
                store.index_copy_(2, self.slot_1, states)
            return self._stores
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, start:end] = states
        self.keys, self.values = (store[:, :, :end] for store in self._stores)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens written so far; refused once nothing on the host may change."""
        if self.slot_1 is not None:
            raise UnsupportedModel("the model asks for the length of the cache in every step")
        return int(super().get_seq_length())

    def reserve(self, room: int) -> None:
        """Make room for so many tokens in all; those written so far stay."""
        if room <= self.room:
            return
        self.room = room
        if self._stores is not None:
            length = self.get_seq_length()
            grown = [store.new_zeros(*store.shape[:2], room, store.shape[3]) for store in self._stores]
            for store, states in zip(grown, self._stores, strict=True):
                store[:, :, :length] = states[:, :, :length]
            self._stores = (grown[0], grown[1])
            self.keys, self.values = (store[:, :, :length] for store in grown)

    def rewind(self) -> None:
        """Forget all tokens and grow again; the buffers stay where they are."""
        self.slot_1 = None
        if self._stores is not None:
            self.keys, self.values = (store[:, :, :0] for store in self._stores)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        length = self.get_seq_length()
        if self._stores is None or length == 0:
            return
        kept = []
        for store in self._stores:
            fresh = store.new_zeros(len(indices), *store.shape[1:])
            torch.index_select(store[:, :, :length], 0, indices.to(store.device), out=fresh[:, :, :length])
            kept.append(fresh)
        self._stores = (kept[0], kept[1])
        self.keys, self.values = (store[:, :, :length] for store in self._stores)


class Forward:
    """Calls a model for the logits of the last position.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        accepts = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in accepts
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}

    def __call__(
        self, ids_BT: torch.Tensor, mask: torch.Tensor | dict[str, torch.Tensor], position_BT: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        """Logits of the last position: logits_BV.

        Raises:
            UnsupportedModel: when the model takes no positions, or keeps its past elsewhere than in ``cache``.
        """
        if not self.takes_positions:
            raise UnsupportedModel("the model takes no position_ids")
        out = self.model(
            input_ids=ids_BT,
            attention_mask=mask,
            position_ids=position_BT,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **self.options,
        )
        if out.past_key_values is not cache:
            raise UnsupportedModel("the model does not use the cache that it is given")
        logits_BV: torch.Tensor = out.logits[:, -1]
        return logits_BV


def cache_layers(model: PreTrainedModel) -> list[Any]:
    """The cache layers that transformers gives a model.

    Raises:
        UnsupportedModel: when one keeps something else than the keys and values of tokens.
    """
    layers = DynamicCache(config=model.config).layers
    strange = {type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    if strange or not layers:
        raise UnsupportedModel(f"its cache is of another kind ({', '.join(sorted(strange)) or 'no layers'})")
    return layers


def guarded(call: Callable[..., Any], *args: Any) -> Any:
    """Call, and turn a failure into :class:`UnsupportedModel`; running out of GPU memory stays what it is."""
    try:
        return call(*args)
    except (UnsupportedModel, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise UnsupportedModel(f"{type(error).__name__}: {lines[0] if lines else ''}") from error


def is_stop(next_B: torch.Tensor, stops_1S: torch.Tensor) -> torch.Tensor:
    """Which rows end with this token."""
    return (next_B[:, None] == stops_1S).any(-1)


@torch.no_grad()
def decode(forward: Forward, batch: Batch, choose: Chooser) -> torch.Tensor:
    """Decode a batch with one call of the model a token; rows that have ended leave the batch.

    Args:
        forward: the model, in evaluation mode.
        batch: prompts; ``batch.steps`` tokens are generated at most.
        choose: chooses the next tokens.

    Returns:
        Generated ids_BT, T ≤ S. What follows a row's first stop token has no meaning.

    Raises:
        UnsupportedModel: when the model's cache is of another kind, or the first two calls fail.
    """
    device, (rows, width), steps = batch.ids_BW.device, batch.ids_BW.shape, batch.steps
    layers = guarded(cache_layers, forward.model)
    cache = Cache(layers=[RoomyLayer(width + steps) if type(layer) is DynamicLayer else layer for layer in layers])
    ids_BL = torch.nn.functional.pad(batch.ids_BW, (0, steps), value=batch.pad)
    mask_RL = torch.nn.functional.pad(batch.mask_BW, (0, steps), value=1)
    stops_1S = torch.tensor([list(batch.stops)], dtype=torch.int64, device=device)
    uniform_RS = batch.uniform_BS.to(device)
    row_R = torch.arange(rows, device=device)  # where the rows that are left stood in the batch
    done_R = torch.zeros_like(row_R, dtype=torch.bool)
    position_RT = (batch.mask_BW.cumsum(-1) - 1).clamp(min=0)
    input_RT = batch.ids_BW
    for step in range(steps):
        column = width + step
        call = partial(guarded, forward) if step < GUARDED_STEPS else forward
        logits_RV = call(input_RT, mask_RL[:, :column], position_RT, cache)
        next_R = choose(ids_BL[row_R, :column], logits_RV, uniform_RS[:, step])
        ids_BL[row_R, column] = next_R
        done_R = done_R | is_stop(next_R, stops_1S)
        left = len(row_R) - int(done_R.sum())
        if not left:
            break
        input_RT, position_RT = next_R[:, None], position_RT[:, -1:] + 1
        if len(row_R) - left >= DROP_SHARE * len(row_R):
            keep_R = (~done_R).nonzero()[:, 0]
            cache.batch_select_indices(keep_R)
            row_R, done_R, mask_RL, uniform_RS = row_R[keep_R], done_R[keep_R], mask_RL[keep_R], uniform_RS[keep_R]
            input_RT, position_RT = input_RT[keep_R], position_RT[keep_R]
    return ids_BL[:, width : column + 1]
