"""Samples → Batches in which documents with the same beginning have it once: prompts of pairs, and of several answers.

A group [prompt a] [prompt b] is laid out as [prompt] [a] [b]. Positions of a and b go on from the prompt's, and each
attends to the prompt and to itself. What every token sees is what it sees in a document alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from postgrad.data.pack import build_batch, build_fitted, mover, pack, split_balanced
from postgrad.types import Batch, Sample, SharedPrompts, Size

# Keys and values are copied once for each document. Estimated, not measured: that costs a twentieth of computing them.
LEAST_SAVED = 1 / 16


def by_neighbours(samples: Sequence[Sample]) -> list[list[int]]:
    """Indices of consecutive samples of the same example, in groups."""
    groups: list[list[int]] = []
    for index, sample in enumerate(samples):
        if groups and samples[groups[-1][-1]].example == sample.example:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def shared_tokens(members: Sequence[Sample]) -> int:
    """How many first tokens of some documents are computed once.

    Args:
        members: documents of one group.

    Returns:
        Their longest common beginning, without any token that is trained in one of them, and shorter than each; 0 where
        that would save less than a sixteenth of the group's tokens.
    """
    if len(members) < 2:
        return 0
    first = members[0].ids_T
    common = min(_first_trained(sample) for sample in members)
    for sample in members[1:]:
        differing = np.flatnonzero(first[:common] != sample.ids_T[:common])
        common = int(differing[0]) if len(differing) else common
    saved = common * (len(members) - 1)
    return common if saved > 0 and saved >= LEAST_SAVED * sum(len(sample) for sample in members) else 0


def _first_trained(sample: Sample) -> int:
    """Index of the first trained token, or of the last token where none is trained."""
    trained = np.flatnonzero(sample.weights_T[1:] > 0)
    return int(trained[0]) + 1 if len(trained) else len(sample) - 1


def shared_size(members: Sequence[Sample]) -> int:
    """Tokens of a group in a batch."""
    return sum(len(sample) for sample in members) - shared_tokens(members) * (len(members) - 1)


@dataclass(slots=True)
class _Layout:
    """What becomes a batch, piece by piece."""

    tokens: int = 0
    keys: int = 0
    ids: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)  # of each segment
    key_counts: list[int] = field(default_factory=list)
    kv_index: list[np.ndarray] = field(default_factory=list)
    own: list[np.ndarray] = field(default_factory=list)
    prompts: list[np.ndarray] = field(default_factory=list)
    again: list[np.ndarray] = field(default_factory=list)
    trained: list[np.ndarray] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    document: list[np.ndarray] = field(default_factory=list)

    def segment(self, ids: np.ndarray, before: np.ndarray) -> int:
        """Add a segment that also attends to the tokens ``before`` it; returns the row of its first token."""
        start, count = self.tokens, len(ids)
        rows = np.arange(start, start + count)
        self.ids.append(ids)
        self.positions.append(np.arange(len(before), len(before) + count))
        self.kv_index += [before, rows]
        self.own.append(self.keys + len(before) + rows - start)
        self.queries.append(count)
        self.key_counts.append(len(before) + count)
        self.tokens, self.keys = start + count, self.keys + len(before) + count
        return start

    def targets_of(self, sample: Sample, number: int, prompt: np.ndarray, start: int) -> None:
        """Add the trained tokens of a document whose first rows are ``prompt`` and whose others begin at ``start``."""
        chosen = np.flatnonzero(sample.weights_T[1:] > 0)  # each predicts the token after it
        inside = chosen - len(prompt)
        rows = start + inside
        rows[inside < 0] = prompt[chosen[inside < 0]]
        self.trained.append(rows)
        self.targets.append(sample.ids_T[chosen + 1])
        self.weights.append(sample.weights_T[chosen + 1])
        self.document.append(np.full(len(chosen), number))

    def group(self, members: Sequence[Sample], first_number: int) -> None:
        """Add the documents of a group, with their common beginning once."""
        common, nothing = shared_tokens(members), np.arange(0)
        prompt = nothing
        first_keys = [self.keys]
        if common:
            start = self.segment(members[0].ids_T[:common], nothing)
            prompt = np.arange(start, start + common)
        for number, sample in enumerate(members, first_number):
            first_keys.append(self.keys)
            start = self.segment(sample.ids_T[common:], prompt)
            self.targets_of(sample, number, prompt, start)
        if common:
            self.prompts.append(prompt)
            self.again.append(np.asarray(first_keys)[None, :] + np.arange(common)[:, None])


def build_shared_batch(
    samples: Sequence[Sample],
    groups: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    tile_rows: int | None = None,
) -> Batch:
    """Put groups end to end, each with its documents' common beginning once.

    Args:
        samples: the list the indices refer to.
        groups: which samples, in order; those of one group may share a prompt.
        device: where the tensors go. To a GPU they are copied without waiting.
        tile_rows: as in :func:`postgrad.data.pack.build_batch`, for a batch in which nothing is shared.

    Returns:
        A batch whose documents, in the order of the groups, are numbered as in an unshared one.
    """
    layout, indices = _Layout(), [index for group in groups for index in group]
    number = 0
    for group in groups:
        layout.group([samples[index] for index in group], number)
        number += len(group)
    if not layout.prompts:
        return build_batch(samples, indices, device, tile_rows)
    put = mover(device)
    shared = _shared_prompts(layout, device)
    return Batch(
        ids_T=put(np.concatenate(layout.ids)),
        positions_T=put(np.concatenate(layout.positions)),
        trained_N=put(np.concatenate(layout.trained)),
        targets_N=put(np.concatenate(layout.targets)),
        weights_N=put(np.concatenate(layout.weights)),
        cu_seqlens=shared.cu_seqlens_q,
        lengths=[len(samples[index]) for index in indices],
        sample_ids=indices,
        document_N=put(np.concatenate(layout.document)),
        shared=shared,
    )


def _shared_prompts(layout: _Layout, device: torch.device | str) -> SharedPrompts:
    put = mover(device)
    most = max(part.shape[1] for part in layout.again)
    again = [np.pad(part, ((0, 0), (0, most - part.shape[1])), constant_values=-1) for part in layout.again]
    return SharedPrompts(
        cu_seqlens_q=put(np.concatenate([[0], np.cumsum(layout.queries)]).astype(np.int32)),
        cu_seqlens_k=put(np.concatenate([[0], np.cumsum(layout.key_counts)]).astype(np.int32)),
        max_length_q=max(layout.queries),
        max_length_k=max(layout.key_counts),
        kv_index_K=put(np.concatenate(layout.kv_index)),
        own_T=put(np.concatenate(layout.own)),
        prompt_P=put(np.concatenate(layout.prompts)),
        again_PM=put(np.concatenate(again)),
    )


def pack_groups(
    samples: Sequence[Sample],
    groups: Sequence[Sequence[int]],
    token_budget: int,
    *,
    share: bool = False,
    cut: bool = False,
    packing: bool = True,
    device: torch.device | str = "cpu",
    tile_rows: int | None = None,
    sizes: Sequence[Size] = (),
) -> Iterator[Batch]:
    """Cut samples into batches that leave groups whole, and build them one at a time.

    Args:
        samples: documents of one optimizer step, or of an evaluation.
        groups: indices of samples; every sample is in one.
        token_budget: most tokens of one batch. A larger group gets a batch of its own.
        share: compute the common beginning of a group's documents once; it then counts once in the budget.
        cut: divide a group that is larger than the budget after all.
        packing: False puts every document into a batch of its own: groups are not whole then.
        device, tile_rows, sizes: as in :func:`postgrad.data.pack.pack`; batches with shared prompts are not padded.
    """
    if not packing:
        yield from pack(samples, token_budget, packing=False, device=device)
        return
    measure = shared_size if share else _plain_size
    units = [part for group in groups for part in (_parts(samples, group, token_budget, share) if cut else [group])]
    lengths = [measure([samples[index] for index in unit]) for unit in units]
    for chosen in split_balanced(lengths, token_budget):
        together = [units[number] for number in chosen]
        indices = [index for unit in together for index in unit]
        if sum(lengths[number] for number in chosen) < sum(len(samples[index]) for index in indices):
            yield build_shared_batch(samples, together, device)
        else:
            yield build_fitted(samples, indices, device, tile_rows, sizes)


def _plain_size(members: Sequence[Sample]) -> int:
    return sum(len(sample) for sample in members)


def _parts(samples: Sequence[Sample], group: Sequence[int], token_budget: int, share: bool) -> list[list[int]]:
    """The group, or where it is larger than the budget as few parts of it, in order, as fit."""
    measure = shared_size if share else _plain_size
    if measure([samples[index] for index in group]) <= token_budget:
        return [list(group)]
    parts: list[list[int]] = []
    for index in group:
        if parts and measure([samples[member] for member in [*parts[-1], index]]) <= token_budget:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts
