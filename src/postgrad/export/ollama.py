"""The Modelfile beside a GGUF file: Ollama's template in Go's language, stop words and a default system message.

Ollama guesses a template from the GGUF file only where it resembles one it ships, and otherwise sends the bare prompt
without a word. So a format is written only when its rendering was compared with the model's own template.
"""

from __future__ import annotations

from dataclasses import dataclass

from postgrad.data.chat import render_text
from postgrad.data.encoding import adds_bos
from postgrad.errors import ModelError
from postgrad.model.load import LoadedModel


@dataclass(frozen=True, slots=True)
class Format:
    """How one family of models writes a conversation.

    Args:
        name: for people.
        turn: a user's or system's turn, with ROLE and CONTENT.
        answer: an assistant's turn, with CONTENT.
        prompt: what comes before a new answer.
        joined: the system message has no turn: it stands before the first question, with an empty line between.
    """

    name: str
    turn: str
    answer: str
    prompt: str
    joined: bool = False

    def render(self, messages: list[dict[str, str]]) -> str:
        """The conversation as text, up to the next answer."""
        text, system = "", ""
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "system" and self.joined:
                system = content + "\n\n"
                continue
            form = self.answer if role == "assistant" else self.turn
            text += form.replace("ROLE", role).replace("CONTENT", system + content)
            system = ""
        return text + self.prompt

    def template(self) -> str:
        """The same in the language of Ollama's templates."""
        answer = self.answer.replace("CONTENT", "{{ .Content }}")
        if not self.joined:
            turn = self.turn.replace("ROLE", "{{ .Role }}").replace("CONTENT", "{{ .Content }}")
            body = f'{{{{ if eq .Role "assistant" }}}}{answer}{{{{ else }}}}{turn}{{{{ end }}}}'
            return f"{{{{- range .Messages }}}}{body}{{{{ end }}}}{self.prompt}"
        system = "{{ if and (eq $i 1) $.System }}{{ $.System }}\n\n{{ end }}"
        turn = self.turn.replace("CONTENT", system + "{{ .Content }}")
        body = f'{{{{ if eq .Role "user" }}}}{turn}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
        return f"{{{{- range $i, $_ := .Messages }}}}{body}{{{{ end }}}}{self.prompt}"


LLAMA3_HEADER = "<|start_header_id|>ROLE<|end_header_id|>\n\n"
FORMATS = [
    Format(
        "ChatML",
        "<|im_start|>ROLE\nCONTENT<|im_end|>\n",
        "<|im_start|>assistant\nCONTENT<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    Format(
        "Llama 3",
        LLAMA3_HEADER + "CONTENT<|eot_id|>",
        LLAMA3_HEADER.replace("ROLE", "assistant") + "CONTENT<|eot_id|>",
        LLAMA3_HEADER.replace("ROLE", "assistant"),
    ),
    Format(
        "Gemma",
        "<start_of_turn>user\nCONTENT<end_of_turn>\n",
        "<start_of_turn>model\nCONTENT<end_of_turn>\n",
        "<start_of_turn>model\n",
        joined=True,
    ),
    Format("Mistral", "[INST] CONTENT[/INST]", " CONTENT</s>", "", joined=True),
    Format("Mistral v1", "[INST] CONTENT [/INST]", " CONTENT</s>", "", joined=True),
]


def modelfile(loaded: LoadedModel, gguf_name: str) -> str:
    """Text of the Modelfile.

    Args:
        loaded: the model with its settled template and stop tokens.
        gguf_name: the GGUF file beside the Modelfile.

    Raises:
        ModelError: when the model's template is none of the known formats.
    """
    found, bos, system = recognise(loaded)
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{bos}{found.template()}"""']
    if system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{token}"' for token in loaded.chat.stop_tokens]
    return "\n".join(lines) + "\n"


def recognise(loaded: LoadedModel) -> tuple[Format, str, str]:
    """Find the format whose rendering is the template's own.

    Returns:
        The format, the BOS text the template must write itself, and the template's default system message.

    Raises:
        ModelError: when there is none.
    """
    tokenizer = loaded.tokenizer
    talk = [
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "an answer"},
        {"role": "user", "content": "second question"},
    ]
    own = render_text(tokenizer, talk, add_generation_prompt=True)
    bos = tokenizer.bos_token if tokenizer.bos_token and own.startswith(str(tokenizer.bos_token)) else ""
    written = "" if adds_bos(tokenizer) else str(bos)  # llama.cpp adds it where the GGUF file says so
    # ChatML's BOS is the opening of a turn, not a token before it.
    for form in FORMATS:
        for start, kept in ((str(bos), written), ("", "")):
            system = _default_system(own, form, talk, start)
            if system is not None:
                return form, kept, system
    raise ModelError(
        f"the chat template is none that Ollama's template language was written for here "
        f"({', '.join(form.name for form in FORMATS)}): it begins {own[:60]!r}",
        "use --to gguf: llama.cpp's own server renders the template that is in the file",
    )


def _default_system(own: str, form: Format, talk: list[dict[str, str]], start: str) -> str | None:
    """The system message the template puts in by itself, "" for none, or None when the format does not fit."""
    if own == start + form.render(talk):
        return ""
    mark = "\0"
    before, _, after = (start + form.render([{"role": "system", "content": mark}, *talk])).partition(mark)
    if own.startswith(before) and own.endswith(after) and len(own) > len(before) + len(after):
        system = own[len(before) : len(own) - len(after)]
        if "<|" not in system and '"""' not in system:
            return system
    return None
