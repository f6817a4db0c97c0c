"""Small models with random weights and a small tokenizer, made in a moment and never the same as a real one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = (
    "alpha beta gamma delta one two three four five six seven eight nine ten red blue green sum plus minus 线程 进程"
)


def tokenizer(template: str | None = CHATML, **special: Any) -> Any:
    """A byte-level BPE tokenizer of 600 entries with ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([WORDS] * 50 + [f"{a}+{b}={a + b}." for a in range(20) for b in range(20)], trainer)
    options = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **special}
    made = PreTrainedTokenizerFast(tokenizer_object=core, **options)
    made.chat_template = template
    return made


def config(kind: str, **changes: Any) -> Any:
    """A configuration of a few thousand parameters: llama, qwen2, qwen3, gemma2, gemma3, mistral or gpt2."""
    import transformers

    shape = {
        "vocab_size": 608,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind == "gpt2":
        gpt2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
        kept = {name: shape[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
        dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        return transformers.GPT2Config(**{**kept, **gpt2, **dropout, **changes})
    classes = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "gemma2": transformers.Gemma2Config,
        "gemma3": transformers.Gemma3TextConfig,
        "mistral": transformers.MistralConfig,
        "cohere": transformers.CohereConfig,
        "granite": transformers.GraniteConfig,
        "phi3": transformers.Phi3Config,
    }
    if kind in ("gemma2", "gemma3", "mistral"):
        shape["sliding_window"] = 8
    return classes[kind](**{**shape, **changes})


def model(kind: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A model with random weights in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(kind, **changes), dtype=torch.float32)
    return made.eval()


def folder(path: Path, kind: str = "llama", template: str | None = CHATML, **changes: Any) -> Path:
    """Save a model and its tokenizer."""
    model(kind, **changes).save_pretrained(path)
    tokenizer(template).save_pretrained(path)
    return path


def stopping_folder(path: Path) -> Path:
    """Save a model that writes the stop token about every sixth time: its hidden states lean to where that row points."""
    import torch

    made = model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        made.model.embed_tokens.weight.add_(0.03)
        made.lm_head.weight[made.config.eos_token_id] = 0.1
    made.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of sums in ``messages`` form, of differing lengths."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        a, b = rng.randint(1, 19), rng.randint(1, 19)
        filler = " ".join(rng.choices(WORDS.split(), k=rng.randint(0, 12)))
        messages = [
            {"role": "user", "content": f"{filler} {a}+{b} ({number})".strip()},
            {"role": "assistant", "content": f"{a}+{b}={a + b}. {filler}".strip()},
        ]
        rows.append({"messages": messages, "answer": str(a + b)})
    return rows
