"""The values that pass between the stages of a run.

Shape legend, used as suffixes of tensor names all over the code:

    T   tokens of one packed batch (all its documents, end to end, no padding)
    N   trained tokens of one batch
    D   hidden size
    V   vocabulary size
    H   attention heads
    S   documents (Samples) in one batch
    P   rows of prompts that several documents share
    K   keys that queries attend to, a shared prompt's once for each document

Nothing here imports torch at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row came from: a file (or data set) and its line or row number, counted from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat in normalised form.

    Args:
        messages: dictionaries with ``role`` (system, user, assistant, tool) and ``content``, and where the row
            had them ``tool_calls``, ``reasoning_content``, ``name``, ``tool_call_id`` and ``weight`` (0 or 1).
        source: file and row.
        tools: JSON schemas of the tools offered to the assistant.
        answer: the exact answer of the last assistant turn, where the row carries one.
        template_kwargs: the row's own chat-template variables.
        given: how many leading messages are prompt and never trained (rows of ``prompt`` + ``completion`` messages).
    """

    messages: list[Message]
    source: Source
    tools: list[dict[str, Any]] | None = None
    answer: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    given: int = 0


@dataclass(frozen=True, slots=True)
class TextRow:
    """Text without a chat template: ``completion`` is trained, ``prompt`` (may be empty) is not."""

    prompt: str
    completion: str
    source: Source
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row tokenised by the user. ``labels[i]`` is ``input_ids[i]`` where trained and -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]
    source: Source


Example = Conversation | TextRow | TokenRow


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, of which one is preferred (DPO).

    Args:
        chosen, rejected: both chats, with the prompt as the first ``given`` messages of each, or both texts with the
            same ``prompt``.
        source: file and row.
    """

    chosen: Conversation | TextRow
    rejected: Conversation | TextRow
    source: Source


@dataclass(frozen=True, slots=True)
class Task:
    """Something to be answered and rewarded (online RL).

    Args:
        question: a chat that ends before the answer, or a text whose completion is empty.
        columns: everything else that the row has, for reward functions.
        source: file and row.
    """

    question: Conversation | TextRow
    columns: dict[str, Any]
    source: Source


@dataclass(frozen=True, slots=True)
class Sample:
    """One document as the model sees it.

    Args:
        ids_T: token ids, int64, shape (T,).
        weights_T: how much each token counts as a *target*, float32, shape (T,): 0 for tokens that are only read.
        source: file and row.
        example: index of the example (row) it belongs to; several Samples may share one.
    """

    ids_T: np.ndarray
    weights_T: np.ndarray
    source: Source
    example: int

    def __len__(self) -> int:
        return len(self.ids_T)

    @property
    def trained(self) -> int:
        """Number of tokens that count as targets. The first token of a document has nothing before it."""
        return int((self.weights_T[1:] > 0).sum())


@dataclass(frozen=True, slots=True)
class Scored(Sample):
    """A document with what the reference model thinks of it.

    Args:
        reference_N: the reference's log p of each trained token, in order, float32; None where it is not needed.
    """

    reference_N: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Rollout(Scored):
    """An answer that the model itself wrote, and what it was worth.

    Args:
        advantage: of the whole answer.
        old_N: log p of each trained token under the weights that wrote it, float32; None where it is the current ones.
    """

    advantage: float = 0.0
    old_N: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """What a batch is padded to, where fixed shapes are needed.

    Args:
        tokens: T, the padding's document included.
        trained: N.
        documents: S.
        tiles: entries of the attention's work list, with ``tile_rows`` tokens each.
    """

    tokens: int
    trained: int
    documents: int
    tiles: int
    tile_rows: int


@dataclass(slots=True)
class SharedPrompts:
    """How documents with the same beginning attend to it, where a batch holds it once.

    The batch is cut into segments: a shared prompt is one, and so is the rest of each of its documents, and a document
    that shares nothing. The last query of a segment sees all of the segment's keys, the one before all but one, and so
    on: causal, aligned at the end.

    Args:
        cu_seqlens_q: int32, shape (segments + 1,): where each segment starts among the tokens.
        cu_seqlens_k: int32, shape (segments + 1,): where its keys start among the K.
        max_length_q, max_length_k: of the longest segment.
        kv_index_K: int64, shape (K,): the token that each key comes from.
        own_T: int64, shape (T,): the key that each token is in its own segment.
        prompt_P: int64, shape (P,): tokens that are keys of several segments.
        again_PM: int64, shape (P, most segments of a prompt): all keys that each of those is; filled up with -1.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_length_q: int
    max_length_k: int
    kv_index_K: torch.Tensor
    own_T: torch.Tensor
    prompt_P: torch.Tensor
    again_PM: torch.Tensor


@dataclass(slots=True)
class Batch:
    """Documents end to end in one dense row, without padding.

    Args:
        ids_T: int64, shape (T,).
        positions_T: int64, shape (T,), counted from 0 in each document.
        trained_N: int64, shape (N,): rows of the hidden states that predict a trained token. With shared prompts a row
            may come several times.
        targets_N: int64, shape (N,): the token each of those rows must predict (already shifted).
        weights_N: float32, shape (N,).
        cu_seqlens: int32, shape (S + 1,): where each document starts; the last entry is T. With shared prompts, where
            each segment starts.
        lengths: the documents' lengths, as Python integers (no device synchronisation to read them).
        sample_ids: for each document the index of its Sample in the list that was packed.
        document_N: int64, shape (N,): which document of this batch a trained token belongs to.
        tiles: the work list of the GPU's attention kernel, where that is used.
        size: what the tensors were padded to: with a last document that is not in ``lengths``, and with trained rows
            of weight 0.
        shared: how prompts are attended to that several documents share; None where none is shared.
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    trained_N: torch.Tensor
    targets_N: torch.Tensor
    weights_N: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: list[int]
    sample_ids: list[int]
    document_N: torch.Tensor
    tiles: torch.Tensor | None = None
    size: Size | None = None
    shared: SharedPrompts | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one question.

    Args:
        text: the decoded answer without special tokens, stripped.
        token_ids: the generated ids, the stop token included where there is one.
        stop_reason: ``stop`` (a stop token was written), or ``length`` (cut at ``max_new_tokens``).
        stop_token: the text of the stop token, or None.
        prompt_tokens: length of the prompt in tokens.
    """

    text: str
    token_ids: list[int]
    stop_reason: str
    stop_token: str | None
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step, as it is logged.

    Args:
        step: the number of optimizer steps done, counted from 1.
        epoch: epochs done, fractional.
        loss: mean loss per trained token of the step, natural logarithm.
        grad_norm: L2 norm of the gradient before clipping.
        learning_rate: the rate this step used.
        tokens: tokens read in the step.
        trained_tokens: of those, the ones that count as targets.
        seconds: wall-clock time of the step.
        measured: what the method measured besides.
    """

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    trained_tokens: int
    seconds: float
    measured: dict[str, float] = field(default_factory=dict)
