"""The work that is timed: rows of token ids with realistic lengths, and models with random or real weights."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of a benchmark table.

    Args:
        name: for people.
        model: ``smollm2-demo`` (real weights) or ``qwen3-0.6b`` (that shape, random weights).
        rows: number of documents.
        per_device_train_batch_size, gradient_accumulation_steps: examples of one optimizer step.
        gradient_checkpointing: as the peer's tutorial settings have it; postgrad's own run leaves it off.
        token_budget: postgrad's tokens a pass; None: its own choice.
    """

    name: str
    model: str
    rows: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool = False
    token_budget: int | None = None


SUITES: dict[str, list[Workload]] = {
    "cpu": [Workload("SmolLM2-135M, tutorial settings", "smollm2-demo", 40, 1, 8)],
    "h100": [
        Workload("Qwen3-0.6B shape, tutorial settings", "qwen3-0.6b", 160, 1, 8),
        Workload("Qwen3-0.6B shape, 64 documents a step", "qwen3-0.6b", 1600, 64, 1, token_budget=16_384),
    ],
}


def rows(count: int, vocabulary: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Documents with log-normal prompt and answer lengths (about 400 tokens on average), ids at random.

    Args:
        count: number of documents.
        vocabulary: ids are below it.
        seed: of lengths and ids.

    Returns:
        ``input_ids`` and ``labels`` (the answer only).
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        prompt = int(min(800, max(10, rng.lognormvariate(4.0, 0.8))))
        answer = int(min(2000, max(12, rng.lognormvariate(5.5, 0.7))))
        ids = torch.randint(0, vocabulary, (prompt + answer,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def build_model(name: str, device: str, dtype: torch.dtype) -> Any:
    """Make the model of a workload on a device."""
    if name == "smollm2-demo":
        from transformers import AutoModelForCausalLM

        from postgrad.model.demo import demo_model_folder

        return AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=dtype).to(device)
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=40_960,
        eos_token_id=1,
        pad_token_id=2,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            return Qwen3ForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)


def number_tokenizer(vocabulary: int) -> Any:
    """A tokenizer whose tokens are the numbers below ``vocabulary``: the trainers want one, the rows do not."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="0"))
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="1", pad_token="2")
    made.chat_template = (
        "{% for m in messages %}{{ m['content'] + ' ' + (eos_token if m['role'] == 'assistant' else '') }}{% endfor %}"
    )
    return made


def flops(documents: list[dict[str, list[int]]], model: Any) -> float:
    """Floating-point operations of forward and backward.

    Matrix products of the layers on all tokens, of the head on trained tokens, and causal attention inside
    documents, times three for the backward pass.
    """
    config = model.config
    head = config.vocab_size * config.hidden_size
    body = sum(p.numel() for p in model.parameters() if p.ndim == 2) - head * (1 if config.tie_word_embeddings else 2)
    per_pair = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * 2
    total = 0.0
    for row in documents:
        length, trained = len(row["input_ids"]), sum(label != -100 for label in row["labels"])
        total += 6 * body * length + 6 * head * trained + 3 * per_pair * length * length / 2
    return total
