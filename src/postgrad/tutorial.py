"""The functions of the tutorial, under its names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from postgrad.data.formats import normalise
from postgrad.data.load import from_dataset
from postgrad.evaluate import shown
from postgrad.generate import ask
from postgrad.model.load import load_model
from postgrad.model.template import prepare_chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN_ROWS = 3


def load_model_and_tokenizer(
    model_name: str, use_gpu: bool = False, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, with chat template, stop tokens and padding settled.

    Args:
        model_name: hub name, folder, ``.gguf`` file or ``smollm2-demo``.
        use_gpu: put the model on the CUDA GPU.
        options: ``revision``, ``dtype``, ``trust_remote_code``, ``chat_template_path``, ``eos_token``, ``pad_token``.

    Raises:
        ModelError: when the model cannot be found or used.
        ConfigError: when there is no GPU.
    """
    loaded = load_model(model_name, device="cuda" if use_gpu else "cpu", **options)
    return loaded.model, loaded.tokenizer


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    user_message: str,
    system_message: str | None = None,
    max_new_tokens: int = 100,
) -> str:
    """Ask one question, greedily, without thinking unless the model was trained to think.

    Args:
        model, tokenizer: a pair.
        user_message: the question.
        system_message: goes before it.
        max_new_tokens: longest answer in tokens.

    Returns:
        The answer without special tokens, stripped.
    """
    chat = prepare_chat(tokenizer, model.generation_config)
    answers = ask(
        model,
        tokenizer,
        [user_message],
        stop_ids=chat.stop_ids,
        system_message=system_message,
        max_new_tokens=max_new_tokens,
    )
    return answers[0].text


def test_model_with_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    system_message: str | None = None,
    title: str = "Model Output",
) -> None:
    """Ask questions and print them with their answers.

    Args:
        model, tokenizer: a pair.
        questions: asked one by one.
        system_message: goes before each.
        title: printed first.
    """
    print(f"\n=== {title} ===")
    for number, question in enumerate(questions, 1):
        response = generate_responses(model, tokenizer, question, system_message)
        print(f"\nModel Input {number}:\n{question}\nModel Output {number}:\n{response}\n")


test_model_with_questions.__test__ = False  # type: ignore[attr-defined]  # or pytest collects it


def display_dataset(dataset: Any) -> None:
    """Show the first three rows of a data set as a table: prompt and answer.

    In a notebook a pandas table, elsewhere a plain one; long texts are shown whole.

    Args:
        dataset: a ``datasets.Dataset``, a list of rows, or a pandas DataFrame, in any format postgrad reads.

    Raises:
        DataError: when a row cannot be read.
    """
    table = from_dataset(dataset, "dataset")
    pairs = [shown(normalise(row)) for row in table.rows[:SHOWN_ROWS]]
    try:
        from IPython import get_ipython
    except ImportError:
        notebook = False
    else:
        notebook = get_ipython() is not None and get_ipython().__class__.__name__ == "ZMQInteractiveShell"
    if notebook:
        import pandas as pd
        from IPython.display import display

        with pd.option_context("display.max_colwidth", None):
            display(pd.DataFrame(pairs, columns=["User Prompt", "Assistant Response"]))
        return
    from rich.console import Console
    from rich.table import Table

    shown_table = Table("User Prompt", "Assistant Response", show_lines=True)
    for prompt, response in pairs:
        shown_table.add_row(_plain(prompt), _plain(response))
    Console().print(shown_table)


class DataCollatorForCompletionOnlyLM:
    """Exists so that the tutorial's import line works; constructing it explains what to do instead."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        from postgrad.errors import ConfigError

        raise ConfigError(
            "DataCollatorForCompletionOnlyLM is gone from TRL and not needed here: only assistant turns are trained",
            "leave it out; to train on every token set assistant_only_loss=False",
        )


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)
