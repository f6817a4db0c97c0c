"""A GGUF file is the same model and tokenizer: by transformers' reader, and by llama.cpp where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from postgrad.errors import CheckError, ModelError
from postgrad.export import architecture, gguf_file
from postgrad.export.gguf_file import BOUNDS, write_checked
from postgrad.export.source import load_for_export
from postgrad.export.vocabulary import backend, split_name
from postgrad.generate import ask
from postgrad.model.load import LoadedModel

Make = Callable[..., str]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("gemma3", {"query_pre_attn_scalar": 16, "sliding_window": 64}),
]
QUESTION = "Calculate 1+1-1 and say why."


def scrambled(folder: str) -> LoadedModel:
    """A loaded model whose norms and biases are no longer ones and zeros, so that none can hide."""
    loaded = load_for_export(folder)
    torch.manual_seed(1)
    for parameter in loaded.model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return loaded


def llama_cpp_ids(path: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy token ids of llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, logits_all=False, verbose=False)
    found = []
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        found.append(int(token))
        if len(found) == count:
            break
    model.close()
    return found


@torch.no_grad()
def our_ids(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_every_family_reads_back(kind: str, changes: dict[str, Any], model_folder: Make, tmp_path: Path) -> None:
    loaded = scrambled(model_folder(kind, **changes))
    found = write_checked(loaded, tmp_path / "m.gguf", "f32")
    assert found.max_logit_error <= 1e-5


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_smaller_dtypes_round_and_stay_within_their_bound(dtype: str, model_folder: Make, tmp_path: Path) -> None:
    loaded = scrambled(model_folder("llama"))
    found = write_checked(loaded, tmp_path / "m.gguf", dtype)
    assert 0 < found.max_logit_error <= found.bound
    plain = write_checked(loaded, tmp_path / "plain.gguf", "f32")
    assert (tmp_path / "m.gguf").stat().st_size < (tmp_path / "plain.gguf").stat().st_size
    assert plain.bound / BOUNDS["f32"] == pytest.approx(found.bound / BOUNDS[dtype])


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_llama_cpp_answers_with_the_same_tokens(
    kind: str, changes: dict[str, Any], model_folder: Make, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    loaded = scrambled(model_folder(kind, **changes))
    write_checked(loaded, tmp_path / "m.gguf", "f32")
    prompt = loaded.tokenizer("one two three alpha beta gamma 12+7=19. red green blue one plus two minus").input_ids
    assert llama_cpp_ids(tmp_path / "m.gguf", prompt, 24) == our_ids(loaded.model, prompt, 24)


@pytest.mark.slow
def test_the_demo_models_file_answers_with_the_same_tokens(tmp_path: Path) -> None:
    try:
        loaded = load_for_export("smollm2-demo")
    except ModelError:
        pytest.skip("the demo model is not here")
    path = tmp_path / "demo.gguf"
    write_checked(loaded, path, "f32")
    wanted = ask(loaded.model, loaded.tokenizer, [QUESTION], stop_ids=loaded.chat.stop_ids, max_new_tokens=24)[0]
    read = gguf_file.read_model(loaded, path)
    tokenizer = gguf_file.read_tokenizer(loaded, path)
    found = ask(read, tokenizer, [QUESTION], stop_ids=loaded.chat.stop_ids, max_new_tokens=24)[0]
    print(f"\nours      {wanted.token_ids}\nread back {found.token_ids}")
    assert found.token_ids == wanted.token_ids
    text = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    prompt = loaded.tokenizer(text, add_special_tokens=False).input_ids
    theirs = llama_cpp_ids(path, prompt, len(wanted.token_ids))
    print(f"llama.cpp {theirs}")
    assert theirs == wanted.token_ids


def test_a_weight_in_the_wrong_order_is_caught(
    model_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture, "interleave", lambda weight, heads: weight)
    with pytest.raises(CheckError, match=r"[qk]_proj.weight is off by"):
        write_checked(scrambled(model_folder("llama")), tmp_path / "m.gguf", "q8_0")


def test_merges_in_the_wrong_order_are_caught(
    model_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postgrad.export import vocabulary

    def reversed_merges(tokenizer: Any) -> dict[str, Any]:
        core = backend(tokenizer)
        core["model"]["merges"].reverse()
        return core

    monkeypatch.setattr(vocabulary, "backend", reversed_merges)
    with pytest.raises(CheckError, match="tokenizer reads"):
        write_checked(load_for_export(model_folder("llama")), tmp_path / "m.gguf", "f32")


def test_the_file_states_every_stop_token_and_the_template(model_folder: Make, tmp_path: Path) -> None:
    from gguf import GGUFReader

    loaded = load_for_export(model_folder("llama"))
    loaded.chat.stop_ids = [2, 0, 1]
    write_checked(loaded, tmp_path / "m.gguf", "f32")
    fields = GGUFReader(tmp_path / "m.gguf").fields
    stated = {name: fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot", "eom", "padding")}
    assert stated == {"eos": 2, "eot": 0, "eom": 1, "padding": 0}
    assert fields["tokenizer.chat_template"].contents() == tiny.CHATML
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("gpt2", {}, "gpt2 model is not supported"),
        ("gemma2", {}, "gemma2 model is not supported"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type dynamic"),
        ("gemma3", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar=99"),
    ],
)
def test_what_llama_cpp_has_no_form_for_is_refused(
    kind: str, changes: dict[str, Any], reason: str, model_folder: Make, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=reason):
        write_checked(load_for_export(model_folder(kind, **changes)), tmp_path / "m.gguf", "f32")


def test_a_split_without_a_name_is_refused() -> None:
    from tokenizers import pre_tokenizers

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert split_name(backend(tokenizer)) == "smollm"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="no name for how this tokenizer splits"):
        split_name(backend(tokenizer))
