"""Decoding on a GPU: one step over a cache of fixed length, captured as a CUDA graph and replayed.

A step of a small model is hundreds of short kernels, and launching them takes longer than running them. So nothing in
a step depends on the host: its inputs are buffers at fixed addresses, positions and masks are computed from counters
on the device, and the host looks only now and then whether all rows have ended.

Shapes as in ``postgrad.decoding``; here L is the length of the buffers, K stands for their positions.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from postgrad.decoding import Batch, Forward, RoomyLayer, UnsupportedModel, cache_layers, guarded, is_stop
from postgrad.sampling import Chooser

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECK_EVERY = 8  # steps between two looks at whether all rows have ended; a look waits for the GPU
LEAST_STEPS = 8  # with fewer steps a capture costs more than it saves
WARM_UP_STEPS = 2
ROOM_MULTIPLE = 64  # groups of nearby widths share one captured graph
ROOM_SLACK = 2  # a graph serves a shorter group too, unless its buffers are more than this many times too long

log = logging.getLogger("postgrad")


class StaticDecoder:
    """Decodes batches of one row count in buffers of one length. This class alone works on any device.

    Args:
        forward: the model, in evaluation mode.
        choose: chooses the next tokens.
        batch: the first batch; only its shapes and stop ids are used, and all later batches have the same stop ids.

    Raises:
        UnsupportedModel: when the model cannot be decoded this way.
    """

    def __init__(self, forward: Forward, choose: Chooser, batch: Batch) -> None:
        self.forward, self.choose = forward, choose
        self.windows = _windows(forward.model)
        (self.rows, width), self.steps = batch.ids_BW.shape, batch.steps
        self.room = _room(width, batch.steps)
        device = batch.ids_BW.device
        self.layers = [RoomyLayer(self.room) for _ in self.windows]
        self.cache = Cache(layers=list(self.layers))
        self.key_K = torch.arange(self.room, device=device)
        self.stops_1S = torch.tensor([list(batch.stops)], dtype=torch.int64, device=device)
        self.ids_BL = torch.zeros(self.rows, self.room, dtype=torch.int64, device=device)
        self.start_B1 = torch.zeros(self.rows, 1, dtype=torch.int64, device=device)
        self.uniform_BS = torch.zeros(self.rows, self.steps, dtype=torch.float64, device=device)
        self.done_B = torch.zeros(self.rows, dtype=torch.bool, device=device)
        self.slot_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.step_1 = torch.zeros(1, dtype=torch.int64, device=device)

    def fits(self, batch: Batch) -> bool:
        """Whether a batch can be decoded in these buffers without much waste."""
        rows, width = batch.ids_BW.shape
        room = _room(width, batch.steps)
        return rows == self.rows and batch.steps <= self.steps and room <= self.room <= room * ROOM_SLACK

    @torch.no_grad()
    def __call__(self, batch: Batch) -> torch.Tensor:
        """Decode a batch that fits.

        Returns:
            Generated ids_BT, T ≤ S. What follows a row's first stop token has no meaning.

        Raises:
            UnsupportedModel: when the model fails on the prompts or while getting ready.
        """
        first_B = guarded(self._prefill, batch)
        self._begin(batch, first_B)
        if guarded(self.prepare):
            self._begin(batch, first_B)
        width, step = batch.ids_BW.shape[1], 1
        while step < batch.steps:
            if step % CHECK_EVERY == 1 and bool(self.done_B.all()):
                break
            self.advance()
            step += 1
        return self.ids_BL[:, width : width + step].clone()

    def prepare(self) -> bool:
        """Get ready to advance; true when that has disturbed the buffers."""
        return False

    def advance(self) -> None:
        """Do one step."""
        self.step()

    def step(self) -> None:
        """Feed each row's last token and write the next one. Nothing in here waits for the device."""
        token_B1 = self.ids_BL.index_select(1, self.slot_1)
        logits_BV = self.forward(token_B1, self._masks(), self.slot_1 - self.start_B1, self.cache)
        uniform_B = self.uniform_BS.index_select(1, self.step_1)[:, 0]
        next_B = self.choose(self.ids_BL, logits_BV, uniform_B)
        self.done_B.logical_or_(is_stop(next_B, self.stops_1S))
        self.slot_1.add_(1)
        self.step_1.add_(1)
        self.ids_BL.index_copy_(1, self.slot_1, next_B[:, None])

    def _prefill(self, batch: Batch) -> torch.Tensor:
        """Read the prompts into the cache, as :func:`postgrad.decoding.decode` does: the first tokens, first_B."""
        for layer in self.layers:
            layer.rewind()
        position_BW = (batch.mask_BW.cumsum(-1) - 1).clamp(min=0)
        logits_BV = self.forward(batch.ids_BW, batch.mask_BW, position_BW, self.cache)
        for layer in self.layers:
            layer.slot_1 = self.slot_1
        return self.choose(batch.ids_BW, logits_BV, batch.uniform_BS[:, 0].to(batch.ids_BW.device))

    def _begin(self, batch: Batch, first_B: torch.Tensor) -> None:
        """Set the buffers to the state after the first token."""
        width = batch.ids_BW.shape[1]
        self.ids_BL[:, :width] = batch.ids_BW
        # The rest repeats a token that is in the row's history anyway, so that a repetition penalty sees no other.
        self.ids_BL[:, width:] = batch.ids_BW[:, :1]
        self.ids_BL[:, width] = first_B
        self.start_B1.copy_(width - batch.mask_BW.sum(-1, keepdim=True))
        self.uniform_BS[:, : batch.steps] = batch.uniform_BS.to(self.uniform_BS.device)
        self.done_B.copy_(is_stop(first_B, self.stops_1S))
        self.slot_1.fill_(width)
        self.step_1.fill_(1)

    def _masks(self) -> torch.Tensor | dict[str, torch.Tensor]:
        """What a token at ``slot_1`` may look at: additive masks (B, 1, 1, L), one for each kind of layer."""
        seen_BL = (self.key_K <= self.slot_1) & (self.key_K >= self.start_B1)
        masks = {window: self._additive(seen_BL, window) for window in dict.fromkeys(self.windows)}
        if len(masks) == 1:
            return masks[self.windows[0]]
        kinds = self.forward.model.config.get_text_config(decoder=True).layer_types
        return {kind: masks[window] for kind, window in zip(kinds, self.windows, strict=True)}

    def _additive(self, seen_BL: torch.Tensor, window: int | None) -> torch.Tensor:
        if window is not None:
            seen_BL = seen_BL & (self.key_K > self.slot_1 - window)
        dtype = self.forward.model.dtype
        mask_BL = torch.zeros_like(seen_BL, dtype=dtype).masked_fill_(~seen_BL, torch.finfo(dtype).min)
        return mask_BL[:, None, None]


class GraphDecoder(StaticDecoder):
    """The same with its step captured as a CUDA graph.

    The graph reads the model's parameters where they are now: it must not outlive a change of the weights' storage.
    """

    def __init__(self, forward: Forward, choose: Chooser, batch: Batch) -> None:
        super().__init__(forward, choose, batch)
        self.graph: torch.cuda.CUDAGraph | None = None

    def prepare(self) -> bool:
        """Capture the step, once: first a few steps on a side stream, so that libraries set themselves up outside."""
        if self.graph is not None:
            return False
        device = self.ids_BL.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                self.step()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process (loggers, data loaders) may go on using the GPU.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.step()
        self.graph = graph
        return True

    def advance(self) -> None:
        assert self.graph is not None
        self.graph.replay()


class GraphPool:
    """Decodes batches through captured graphs for as long as the model allows it.

    One graph is kept, for the row count and length last seen. Made for one call of ``generate``: the weights must
    stay where they are.
    """

    def __init__(self, forward: Forward, choose: Chooser) -> None:
        self.forward, self.choose = forward, choose
        self.refused = forward.model.device.type != "cuda"
        self.decoder: GraphDecoder | None = None

    def __call__(self, batch: Batch) -> torch.Tensor | None:
        """Generated ids_BT as :meth:`StaticDecoder.__call__` gives them; None where another way has to be taken."""
        if self.refused or batch.steps < LEAST_STEPS:
            return None
        reason = ""
        try:
            with torch.cuda.device(batch.ids_BW.device):
                if self.decoder is None or not self.decoder.fits(batch):
                    self.decoder = None  # its memory is free before the next one takes its own
                    self.decoder = guarded(GraphDecoder, self.forward, self.choose, batch)
                return self.decoder(batch)
        except UnsupportedModel as error:
            reason = str(error)
        self.refused, self.decoder = True, None
        log.warning("generation without a CUDA graph, which is slower: %s", reason)
        return None


def _room(width: int, steps: int) -> int:
    """Length of the buffers for a batch, the steps of the warm-up included."""
    return -(-(width + max(steps, WARM_UP_STEPS + 2)) // ROOM_MULTIPLE) * ROOM_MULTIPLE


def _windows(model: PreTrainedModel) -> list[int | None]:
    """Each layer's sliding window, None where it looks at everything.

    Raises:
        UnsupportedModel: when the model is not made for ready masks and a cache of fixed length.
    """
    config: Any = model.config.get_text_config(decoder=True)
    if not getattr(model, "_can_compile_fullgraph", False):
        raise UnsupportedModel("the model is not made for a cache of fixed length")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise UnsupportedModel(f"attention '{config._attn_implementation}' takes no ready mask")
    if getattr(config, "attention_chunk_size", None):
        raise UnsupportedModel("the model attends in chunks")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UnsupportedModel("the model is spread over several devices")
    if torch.is_autocast_enabled(model.device.type):
        raise UnsupportedModel("autocast is on")
    windows = [getattr(layer, "sliding_window", None) for layer in cache_layers(model)]
    kinds = getattr(config, "layer_types", None) or [""] * len(windows)
    if len(set(windows)) > 1 and len(set(zip(kinds, windows, strict=True))) != len(set(kinds)):
        raise UnsupportedModel("layers of one kind have different windows")
    return windows
