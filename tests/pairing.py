"""Pairs of answers for tests of preference training."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import tiny
from program import write_jsonl


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Chats whose chosen answer is a right sum and whose rejected one is wrong, of differing lengths."""
    rng = random.Random(seed)
    words = tiny.WORDS.split()
    rows = []
    for number in range(count):
        a, b = rng.randint(1, 19), rng.randint(1, 19)
        filler = [" ".join(rng.choices(words, k=rng.randint(0, 9))) for _ in range(3)]
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"{filler[0]} {a}+{b} ({number})".strip()}],
                "chosen": [{"role": "assistant", "content": f"{a}+{b}={a + b}. {filler[1]}".strip()}],
                "rejected": [{"role": "assistant", "content": f"no {filler[2]} {a}+{b}={a + b + 1}"}],
            }
        )
    return rows


def pair_file(path: Path, count: int, seed: int = 0) -> str:
    """A JSONL file of so many pairs."""
    return write_jsonl(path, pairs(count, seed))


def lfm2_folder(path: Path) -> str:
    """A model whose convolutions know nothing of documents, so that it cannot be packed."""
    import torch
    from transformers import AutoModelForCausalLM, Lfm2Config

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=608,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)
