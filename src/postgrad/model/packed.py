"""A transformers model as a function of a Batch: packed attention, and the head on trained rows only.

Whether a model can be used this way is not assumed but tried on the model itself, once: if packed documents do not
give what each gives alone, they go one by one; if our head does not give the model's own logits, the model's is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F

from postgrad.data.pack import build_batch, pack
from postgrad.data.shared import by_neighbours, pack_groups
from postgrad.data.tiles import tile_rows
from postgrad.errors import ConfigError
from postgrad.kernels import has_triton
from postgrad.kernels.linear_ce import linear_cross_entropy, token_logprobs, token_logprobs_and_entropies
from postgrad.model.compiled import compiled_layers, decoder_layers, stopwatch
from postgrad.model.graphed import GraphedPasses
from postgrad.model.switches import packed_attention, recomputing, weights_in, without_dropout
from postgrad.types import Batch, Sample, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_LENGTHS = (9, 14)


@dataclass(frozen=True, slots=True)
class Choices:
    """How the model is computed; recorded with the run, reused on resume.

    Args:
        packing: several documents in one forward pass.
        head: ``fused`` (ours, on trained rows) or ``model`` (the model's own logits of those rows).
        scale, softcap: of the logits, for the fused head.
        tiles: attention by our own kernel over a work list (CUDA).
        compiled: the layers are compiled in training.
        graphed: passes are replayed as CUDA graphs in training.
        recomputed: activations are computed again in the backward pass instead of kept.
        dropout: the model's dropout is on in training.
        sharing: a prompt that several documents begin with can be computed once; see
            :func:`postgrad.model.sharing.with_sharing`.
        reason: why not the fast way, for people; empty otherwise.
    """

    packing: bool
    head: str
    scale: float = 1.0
    softcap: float | None = None
    tiles: bool = False
    compiled: bool = False
    graphed: bool = False
    recomputed: bool = False
    dropout: bool = True
    sharing: bool = False
    reason: str = ""


class PackedModel:
    """A model and how to compute it.

    Args:
        model: a transformers causal language model.
        choices: from :func:`choose`, or recorded ones.
    """

    def __init__(self, model: PreTrainedModel, choices: Choices) -> None:
        self.model, self.choices = model, choices
        self.native = model.config._attn_implementation
        self.graphs: GraphedPasses | None = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The model as :func:`postgrad.generate.generate` takes it, also inside :meth:`attention`."""
        packed = self.model.config._attn_implementation
        self.model.set_attn_implementation(self.native)
        try:
            with compiled_layers(self.model, False):
                yield
        finally:
            self.model.set_attn_implementation(packed)

    @contextmanager
    def attention(self, training: bool = False) -> Iterator[None]:
        """Use the packed attention inside the block, and the model's own after it.

        Args:
            training: what was chosen of compiled layers, recomputation and dropout; scoring is always eager.
        """
        with (
            compiled_layers(self.model, training and self.choices.compiled),
            recomputing(self.model, training and self.choices.recomputed),
            without_dropout(self.model, training and not self.choices.dropout),
            packed_attention(self.model, self.choices.packing),
        ):
            yield

    def batches(
        self, samples: Sequence[Sample], token_budget: int, together: bool = False, share: bool = False
    ) -> Iterator[Batch]:
        """Cut samples into batches as this model takes them.

        Args:
            samples: documents.
            token_budget: most tokens of one batch.
            together: consecutive samples of one example stay in one batch, even where they are larger than the budget.
                Without packing every document is alone all the same.
            share: the common beginning of consecutive samples of one example is computed once, where the model can
                (``choices.sharing``) and it pays. Without ``together`` an example larger than the budget is divided.
        """
        options: dict[str, Any] = {
            "packing": self.choices.packing,
            "device": self.model.device,
            "tile_rows": self.tile_rows,
            "sizes": list(self.graphs.graphs) if self.graphs else (),
        }
        share = share and self.choices.sharing
        if not together and not share:
            return pack(samples, token_budget, **options)
        return pack_groups(samples, by_neighbours(samples), token_budget, share=share, cut=not together, **options)

    @property
    def tile_rows(self) -> int | None:
        """Tokens of a tile of the attention kernel's work list; None where that kernel is not used."""
        return tile_rows(head_size(self.model)) if self.choices.tiles else None

    def gradient(self, batch: Batch, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward: what :meth:`loss` returns, detached, and gradients in ``parameter.grad``."""
        replayed = self.graphs.run(batch, scale) if self.graphs else None
        if replayed is not None:
            return replayed
        loss, nll_N = self.loss(batch, scale)
        loss.backward()
        return loss.detach(), nll_N

    def loss(self, batch: Batch, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum of the trained tokens' losses times ``scale``; call inside :meth:`attention`.

        Args:
            batch: documents; without packing, one.
            scale: one over the step's denominator.

        Returns:
            A differentiable float32 scalar, and each trained token's loss, float32, shape (N,), detached.
        """
        weights_N = batch.weights_N * scale
        if self.choices.head == "model":
            nll_N = F.cross_entropy(self._logits(batch), batch.targets_N, reduction="none")
            return (nll_N * weights_N).sum(), nll_N.detach()
        rows_ND, weight_VD, head = self._head(batch)
        return linear_cross_entropy(rows_ND, weight_VD, batch.targets_N, weights_N, **head)

    @overload
    def logprobs(self, batch: Batch, temperature: float = 1.0, entropies: Literal[False] = False) -> torch.Tensor: ...

    @overload
    def logprobs(
        self, batch: Batch, temperature: float = 1.0, *, entropies: Literal[True]
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def logprobs(
        self, batch: Batch, temperature: float = 1.0, entropies: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """log p of each trained token, for any loss that is a function of them; call inside :meth:`attention`.

        Args:
            batch: documents; without packing, one.
            temperature: divides the logits, as in sampling.
            entropies: give the entropy of the distribution that each token was taken from, too.

        Returns:
            Differentiable, float32, shape (N,); with ``entropies`` also those, in nats, detached, of the same shape.

        Raises:
            ConfigError: the temperature is not above 0.
        """
        if not temperature > 0:
            raise ConfigError(f"temperature is {temperature}", "set it above 0: log p is of a distribution")
        if self.choices.head == "model":
            logps_NV = torch.log_softmax(self._logits(batch) / temperature, -1)
            logps_N = logps_NV.gather(1, batch.targets_N[:, None])[:, 0]
            return (logps_N, torch.special.entr(logps_NV.detach().exp()).sum(-1)) if entropies else logps_N
        rows_ND, weight_VD, head = self._head(batch)
        function = token_logprobs_and_entropies if entropies else token_logprobs
        return function(rows_ND, weight_VD, batch.targets_N, temperature=temperature, **head)

    def _logits(self, batch: Batch) -> torch.Tensor:
        """The model's own logits of the trained rows, float32, shape (N, V)."""
        found = self.model(**self._inputs(batch), logits_to_keep=batch.trained_N, use_cache=False)
        return found.logits[0].float()

    def _head(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Trained rows, shape (N, D); output embedding, shape (V, D); and how it gives logits."""
        head, hidden_TD = self.model.get_output_embeddings(), self.hidden(batch)
        options = {
            "scale": self.choices.scale,
            "softcap": self.choices.softcap,
            "bias_V": getattr(head, "bias", None),
        }
        if batch.shared is None:
            return hidden_TD.index_select(0, batch.trained_N), head.weight, options
        return hidden_TD[batch.trained_N], head.weight, options  # rows repeat; this adds their gradients in order

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states, shape (T, D); call inside :meth:`attention`."""
        decoder = self.model.get_decoder()
        return decoder(**self._inputs(batch), use_cache=False).last_hidden_state[0]

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return model_inputs(batch, self.choices.packing)


def choose(model: PreTrainedModel, compute_dtype: torch.dtype | None = None, dropout: bool = True) -> Choices:
    """Try packing and the fused head on the model itself, on a few tokens, and keep what is right.

    Args:
        model: in any mode; its mode, attention and weights are restored.
        compute_dtype: dtype of the weights in training; default: as they are.
        dropout: whether the model's dropout, if it has any, is on in training.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), weights_in(model, compute_dtype or model.dtype):
            return replace(_probe(model, dropout), dropout=dropout)
    finally:
        model.train(training)


def _probe(model: PreTrainedModel, dropout: bool) -> Choices:
    device = model.device
    generator = torch.Generator().manual_seed(0)
    vocabulary = embedding_rows(model)
    documents = [torch.randint(0, vocabulary, (n,), generator=generator).to(device) for n in PROBE_LENGTHS]
    alone = [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in documents]
    head, scale, softcap, reason = _probe_head(model, documents[0], alone[0])
    config = model.config.get_text_config()
    if dropout and any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop")):
        problem = "documents go one by one: the model drops out attention weights"
        return Choices(packing=False, head=head, scale=scale, softcap=softcap, reason=problem)
    chosen = Choices(packing=True, head=head, scale=scale, softcap=softcap, reason=reason)
    problem = "packed documents do not give what each gives alone: one by one instead"
    for tiles in (True, False) if has_triton(device) and model.dtype != torch.float64 else (False,):
        try:
            together = _packed_logits(model, documents, tiles)
            if same_logits(together, torch.cat(alone), model.dtype) and _isolated(model, documents, together, tiles):
                return replace(chosen, tiles=tiles)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"documents go one by one: {error}"
    return replace(chosen, packing=False, reason=problem)


def _probe_head(model: PreTrainedModel, ids_T: torch.Tensor, expected_TV: torch.Tensor) -> tuple[str, float, Any, str]:
    """Find the factors between hidden states and logits; ``model`` where they cannot be found."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / float(config.logits_scaling)
    try:
        hidden_TD = model.get_decoder()(input_ids=ids_T[None], use_cache=False).last_hidden_state[0]
        head = model.get_output_embeddings()
        if type(head).__module__.startswith("peft."):  # its weight is not all that it computes
            return "model", 1.0, None, "the model's own head is used: it has an adapter"
        logits_TV = head(hidden_TD).float() * scale
        if softcap is not None:
            logits_TV = softcap * torch.tanh(logits_TV / softcap)
        if same_logits(logits_TV, expected_TV, model.dtype):
            return "fused", scale, softcap, ""
    except (AttributeError, TypeError, RuntimeError):
        pass
    return "model", 1.0, None, "the model's own head is used: its logits are not a plain projection"


def _packed_logits(model: PreTrainedModel, documents: list[torch.Tensor], tiles: bool) -> torch.Tensor:
    batch = build_batch(
        probe_samples(documents),
        range(len(documents)),
        model.device,
        tile_rows(head_size(model)) if tiles else None,
    )
    with packed_attention(model):
        return model(**model_inputs(batch, True), use_cache=False).logits[0].float()


def probe_samples(documents: Sequence[torch.Tensor]) -> list[Sample]:
    """Documents of token ids as Samples whose every token is trained."""
    return [
        Sample(ids.cpu().numpy(), np.ones(len(ids), dtype=np.float32), Source("probe", number), number)
        for number, ids in enumerate(documents, 1)
    ]


def probe_answers(vocabulary: int) -> list[Sample]:
    """Three answers to one random prompt, and a document that shares nothing."""
    generator = torch.Generator().manual_seed(2)
    prompt, *answers, other = (torch.randint(0, vocabulary, (n,), generator=generator) for n in (16, 5, 9, 3, 7))
    made = probe_samples([torch.cat([prompt, answer]) for answer in answers])
    for sample in made:
        sample.weights_T[: len(prompt)] = 0
    return [replace(sample, example=0) for sample in made] + probe_samples([other])


def _isolated(model: PreTrainedModel, documents: list[torch.Tensor], together_TV: torch.Tensor, tiles: bool) -> bool:
    """Whether the second document's logits stay when the first changes: exact, where rounding would hide a leak."""
    start = len(documents[0])
    again_TV = _packed_logits(model, [documents[0].flip(0), *documents[1:]], tiles)
    return bool((again_TV[start:] - together_TV[start:]).norm() <= 1e-5 * together_TV[start:].norm())


def model_inputs(batch: Batch, packing: bool) -> dict[str, Any]:
    """What a transformers model is called with to read a batch."""
    inputs: dict[str, Any] = {"input_ids": batch.ids_T[None], "position_ids": batch.positions_T[None]}
    if packing:
        starts, longest = batch.cu_seqlens, max(batch.lengths)
        inputs.update(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=longest, max_length_k=longest)
    shared = batch.shared
    if packing and shared is not None:
        inputs.update(cu_seq_lens_q=shared.cu_seqlens_q, cu_seq_lens_k=shared.cu_seqlens_k)
        inputs.update(max_length_q=shared.max_length_q, max_length_k=shared.max_length_k)
        inputs["attention_shared"] = (shared.kv_index_K, shared.own_T, shared.prompt_P, shared.again_PM)
    if packing and batch.tiles is not None:
        inputs["attention_tiles"] = batch.tiles
    return inputs


def head_size(model: PreTrainedModel) -> int:
    """Size of an attention head."""
    config = model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def same_logits(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations of the same logits differ by no more than rounding in ``dtype``."""
    tolerance = 1e-3 if dtype == torch.float32 else 0.08
    return bool((a - b).norm() <= tolerance * b.norm())


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model can embed."""
    weight: torch.Tensor = model.get_input_embeddings().get_parameter("weight")
    return len(weight)


def try_compiled(packed: PackedModel, dtype: torch.dtype) -> tuple[PackedModel, str]:
    """Compile the layers and compare loss and gradients of a small batch with the eager ones.

    Args:
        packed: the model; its weights and mode are restored.
        dtype: of the weights in training.

    Returns:
        The same model with compiled layers where they are right, and what was found, for people.
    """
    model, compiled = packed.model, PackedModel(packed.model, replace(packed.choices, compiled=True))
    training, seconds = model.training, list[float]()
    model.train()
    try:
        with weights_in(model, dtype):
            expected = _probe_gradient(packed)
            with stopwatch(seconds):
                found = _probe_gradient(compiled)
    except Exception as error:  # a compiler may fail in any way; eager goes on
        return packed, f"not compiled: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    finally:
        model.train(training)
        model.zero_grad()
    if not same_logits(found, expected, dtype):
        return packed, "not compiled: the compiled layers give other gradients"
    return compiled, f"layers compiled in {seconds[0]:.0f} s"


def probe_batch(packed: PackedModel) -> Batch:
    """A small batch of random documents, every token trained."""
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, embedding_rows(packed.model), (n,), generator=generator) for n in (37, 64, 11)]
    return next(packed.batches(probe_samples(documents), 1024))


def _probe_gradient(packed: PackedModel) -> torch.Tensor:
    """Loss and gradients of some weights on a small batch, in one vector."""
    packed.model.zero_grad()
    batches = [probe_batch(packed)]
    if packed.choices.sharing:
        answers = probe_answers(embedding_rows(packed.model))
        batches += packed.batches(answers, sum(len(sample) for sample in answers), share=True)
    with packed.attention(training=True):
        loss = torch.stack([packed.loss(batch, 0.01)[0] for batch in batches]).sum()
        loss.backward()
    gradients = [p.grad for layer in decoder_layers(packed.model) for p in layer.parameters() if p.grad is not None]
    some = [gradient.flatten()[:1000].float() for gradient in gradients]
    return torch.cat([loss.detach().float().reshape(1), *some])
