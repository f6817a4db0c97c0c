"""Models that are measured: the demo model with its weights, and known shapes with random weights."""

from __future__ import annotations

from typing import Any

import torch

DEMO = "smollm2-demo"
QWEN3: dict[str, Any] = {
    "vocab_size": 151_936,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-0.6b": ("qwen3", {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072}),
    "qwen3-1.7b": ("qwen3", {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144}),
    "qwen3-4b": (
        "qwen3",
        {
            **QWEN3,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
        },
    ),
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "max_position_embeddings": 8192,
        },
    ),
    "tiny": (
        "llama",
        {
            "vocab_size": 500,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
        },
    ),
}


def build_model(name: str, device: str, seed: int = 0) -> Any:
    """Make a model in float32 on a device; the same weights each time."""
    import transformers

    if name == DEMO:
        from postgrad.model.demo import demo_model_folder

        demo: Any = transformers.AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=torch.float32)
        return demo.to(device)
    kind, shape = SHAPES[name]
    special: dict[str, Any] = {"eos_token_id": 1, "pad_token_id": 2, "bos_token_id": None, "tie_word_embeddings": True}
    torch.manual_seed(seed)
    with torch.device(device):
        if kind == "qwen3":
            return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape, **special))
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **special))


def build_tokenizer(name: str) -> Any:
    """The demo model's own tokenizer; for a shape, one whose tokens are numbers: trainers want one, the rows do not."""
    if name == DEMO:
        from transformers import AutoTokenizer

        from postgrad.model.demo import demo_model_folder

        return AutoTokenizer.from_pretrained(demo_model_folder())
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(SHAPES[name][1]["vocab_size"])}
    core = Tokenizer(models.WordLevel(words, unk_token="0"))
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="1", pad_token="2")
    made.chat_template = (
        "{% for m in messages %}{{ m['content'] + ' ' + (eos_token if m['role'] == 'assistant' else '') }}{% endfor %}"
    )
    return made
