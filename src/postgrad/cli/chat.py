"""``postgrad chat``: a conversation in a terminal or through a pipe. Answers go to stdout, all else to stderr."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postgrad.errors import ConfigError, DataError, PostgradError
from postgrad.redaction import redact

if TYPE_CHECKING:
    from postgrad.conversation import Conversation, Reply, Speaker, Speech
    from postgrad.types import Message

COMMANDS = {
    "/system": ("/system TEXT", "set the system message, also for what was said; without TEXT: none"),
    "/retry": ("/retry", "answer the last message again"),
    "/undo": ("/undo", "take the last message and its answer back"),
    "/clear": ("/clear", "start anew; the system message stays"),
    "/save": ("/save FILE.jsonl", "add the conversation to a file of training rows"),
    "/compare": ("/compare", "the starting model's answer to the same messages beside the last answer"),
    "/params": ("/params name=value …", "temperature, top_p, top_k, min_p, seed, max_new_tokens; alone: show them"),
    "/help": ("/help", "this list"),
    "/quit": ("/quit", "end; so does Ctrl-D"),
}
ROWS_FILES = (".jsonl", ".ndjson")
# What a model writes must not steer the terminal: control characters other than newline and tab.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def chat(
    model: Annotated[str, typer.Argument(help="Run directory, or a model as for 'ask'.")],
    before: Annotated[
        bool, typer.Option("--before", help="Let the model that the run started from answer each message first.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer in tokens.", min=1)] = 512,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.01, max=1)] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="0 is off.", min=0)] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of sampling.", min=0)] = 0,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line for each answer.")] = False,
) -> None:
    """Talk with a model, or a run's trained model, over several turns; answers appear as they are written.

    In a terminal, /help lists the commands, Ctrl-C stops an answer and Ctrl-D ends. In a pipe each line is a turn, and
    only answers go to stdout.

    \b
      postgrad chat runs/demo
      postgrad chat runs/demo --before --temperature 0.7
      echo "What is a mutex?" | postgrad chat runs/demo
    """
    from postgrad.conversation import Conversation, Params, Speaker, starting_model
    from postgrad.model.load import load_model

    _require_model(model)
    params = Params().changed(
        [
            *(f"temperature={temperature}", f"top_p={top_p}", f"top_k={top_k}", f"seed={seed}"),
            f"max_new_tokens={max_new_tokens}",
        ]
    )
    loaded = load_model(model, revision=revision)
    conversation = Conversation(Speaker(loaded), system=system, params=params)
    talk = Talk(conversation, lambda: Speaker(starting_model(model, loaded)), before, as_json, sys.stdin.isatty())
    try:
        if talk.interactive:
            talk.by_hand(model)
        else:
            talk.by_lines(sys.stdin.buffer)
    except BrokenPipeError:  # the reader has seen enough; what is left in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Talk:
    """A conversation with someone who types.

    Args:
        conversation: with the model.
        load_base: loads the model that the run started from.
        before: whether that one answers every message first.
        as_json: answers are JSON lines.
        interactive: whether a person types, so that a mistake ends nothing.
    """

    def __init__(
        self,
        conversation: Conversation,
        load_base: Callable[[], Speaker],
        before: bool,
        as_json: bool,
        interactive: bool,
    ) -> None:
        self.conversation, self.as_json, self.interactive = conversation, as_json, interactive
        self.tty = sys.stdout.isatty()
        self._load_base, self.before = load_base, before
        self._base: Speaker | None = None
        self._saved: dict[Path, list[Message]] = {}
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.encoding.lower() not in ("utf-8", "utf8"):
            sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show ends nothing
        if before:
            self.base()

    # -- input --------------------------------------------------------------------------------------------------

    def by_hand(self, name: str) -> None:
        """Read from a terminal until Ctrl-D or /quit."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.output import create_output

        session: PromptSession[str] = PromptSession(
            completer=WordCompleter(list(COMMANDS), sentence=True),
            output=None if self.tty else create_output(stdout=sys.stderr),
        )
        note(f"{name}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
        while True:
            try:
                if not self.take(session.prompt("> ")):
                    return
            except EOFError:
                return
            except KeyboardInterrupt:
                note("nothing is running; Ctrl-D or /quit ends")
            except BrokenPipeError:
                raise
            except (PostgradError, OSError) as error:
                note(redact(f"error: {error}"))

    def by_lines(self, lines: Any) -> None:
        """Read from a pipe or a file: each line is a turn or a command.

        Raises:
            PostgradError: for the first line that cannot be answered; stderr says which.
        """
        seen = False
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"is no UTF-8 text: {error}", "save it as UTF-8", file="stdin", row=number) from None
            seen = seen or bool(text.strip())
            try:
                if not self.take(text):
                    return
            except PostgradError:
                note(f"line {number} of the input was not carried out; nothing after it was read")
                raise
        if not seen:
            note('nothing was asked: echo "What is a mutex?" | postgrad chat MODEL')

    def take(self, line: str) -> bool:
        """Carry out one line; False when it ends the conversation."""
        line = line.strip()
        if line.startswith("/") and not line.startswith("//"):
            word, _, rest = line.partition(" ")
            if word not in COMMANDS:
                raise ConfigError(f"there is no command {word}", "/help lists them; a message may begin with //")
            if word == "/quit":
                return False
            getattr(self, f"do_{word[1:]}")(rest.strip())
        elif line:
            self.ask(line[1:] if line.startswith("//") else line)
        return True

    # -- answers ------------------------------------------------------------------------------------------------

    def ask(self, text: str) -> None:
        """Send a message, to the starting model first where that is wanted."""
        special = self.conversation.speaker.special_text(text)
        if special:
            note(f"the message contains {special}, which the model reads as a special token")
        messages = [*self.conversation.messages, {"role": "user", "content": text}]
        self._answer(messages, lambda: self.conversation.send(text))

    def do_retry(self, rest: str) -> None:
        """Answer the last message again."""
        if self.conversation.params.temperature == 0:
            note("greedy answers repeat themselves: /params temperature=0.7")
        self._answer(self.conversation.asked(), self.conversation.retry)

    def _answer(self, messages: list[Message], start: Callable[[], Speech]) -> None:
        record: dict[str, Any] = {"prompt": messages[-1]["content"]}
        if self.before:
            reply = self._run(self._base_speech(messages), self.base().stop, "[base] ")
            if reply is None:
                return
            record["base"] = _facts(reply)
        reply = self._run(start(), self.conversation.stop, "[tuned] " if self.before else "")
        if reply is not None and self.as_json:
            self._write(json.dumps({**record, **_facts(reply)}, ensure_ascii=False) + "\n")

    def _base_speech(self, messages: list[Message]) -> Speech:
        return self.base().speak(messages, self.conversation.params, len(self.conversation.turns))

    def _run(self, speech: Speech, stop: Callable[[], None], label: str = "", quiet: bool = False) -> Reply | None:
        """Print an answer as it comes; None when Ctrl-C ended it before it began."""
        quiet = quiet or self.as_json
        begun = False
        try:
            with _ctrl_c(stop) if self.interactive else nullcontext():
                while True:
                    try:
                        piece = next(speech)
                    except StopIteration as ended:
                        reply: Reply = ended.value
                        break
                    if not quiet:
                        self._write(piece if begun else label + piece)
                        begun = True
        except KeyboardInterrupt:
            note("stopped; the message is not in the conversation")
            return None
        finally:
            if begun:
                self._write("\n")
        if not quiet and not begun:
            self._write(f"{label}\n")
        ending = self._ending(reply)
        if ending:
            note(ending)
        return reply

    def _ending(self, reply: Reply) -> str | None:
        if reply.ending == "length":
            return f"[did not stop within {len(reply.answer.token_ids)} tokens]"
        if reply.ending == "context":
            return f"[cut: the model's {self.conversation.speaker.context:,} tokens are full; /undo or /clear]"
        if reply.ending == "interrupted":
            kept = "stays in the conversation, and is no training example" if reply.answer.text else "nothing was said"
            return f"[interrupted: {kept}]"
        return None

    def _write(self, text: str) -> None:
        sys.stdout.write(text.translate(CONTROLS) if self.tty else text)
        sys.stdout.flush()

    # -- commands -----------------------------------------------------------------------------------------------

    def base(self) -> Speaker:
        """The starting model, loaded when it is first needed."""
        if self._base is None:
            self._base = self._load_base()
        return self._base

    def do_system(self, rest: str) -> None:
        """Set the system message."""
        self.conversation.set_system(rest)
        note("system message set" if rest else "no system message")

    def do_undo(self, rest: str) -> None:
        """Take a turn back."""
        turn = self.conversation.undo()
        note(f"taken back: {turn.question.translate(CONTROLS):.60}")

    def do_clear(self, rest: str) -> None:
        """Forget all turns."""
        self.conversation.clear()
        note("nothing has been said")

    def do_save(self, rest: str) -> None:
        """Add a training row to a file."""
        path = Path(rest).expanduser()
        if path.suffix not in ROWS_FILES:
            raise ConfigError("/save needs a .jsonl file", "/save chats.jsonl")
        path = path.resolve()
        row = self.conversation.training_row(self._saved.get(path, ()))
        with open(path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # what is there stays as it is, but a row begins on its own line
                    file.write(b"\n")
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))
        self._saved[path] = self.conversation.messages
        context = sum(message.get("weight") == 0 for message in row["messages"])
        left = f", {context} of its answers only as context (cut, or saved before)" if context else ""
        note(f"a row of {len(row['messages'])} messages was added to {rest}{left}")

    def do_compare(self, rest: str) -> None:
        """Show the starting model's answer beside the last one."""
        messages = self.conversation.asked()
        reply = self._run(self._base_speech(messages), self.base().stop, quiet=True)
        if reply is None:
            return
        last = self.conversation.turns[-1].reply
        if self.as_json:
            record = {"prompt": messages[-1]["content"], "base": _facts(reply), **_facts(last)}
            self._write(json.dumps(record, ensure_ascii=False) + "\n")
            return
        from rich.console import Console

        from postgrad.tables import side_by_side

        rows = [
            {"id": 0, "prompt": messages[-1]["content"], "response": answer.text, "stop_reason": answer.stop_reason}
            for answer in (reply.answer, last.answer)
        ]
        for row in rows:
            row["response"] = str(row["response"]).translate(CONTROLS)
        Console().print(side_by_side(rows[:1], rows[1:], "base and tuned"))

    def do_params(self, rest: str) -> None:
        """Show or change how answers are made."""
        self.conversation.params = self.conversation.params.changed(rest.split())
        note(" ".join(f"{name}={value}" for name, value in self.conversation.params.model_dump().items()))

    def do_help(self, rest: str) -> None:
        """List the commands."""
        for usage, meaning in COMMANDS.values():
            note(f"{usage:<22} {meaning}")


def note(text: str) -> None:
    """Say something about the conversation, which is not part of it."""
    print(text, file=sys.stderr, flush=True)


def _facts(reply: Reply) -> dict[str, Any]:
    answer = reply.answer
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "new_tokens": len(answer.token_ids),
        "stop_reason": reply.ending,
        "prompt_tokens": len(reply.prompt_ids),
        "reused_tokens": reply.reused,
        "first_token_seconds": round(reply.first_seconds, 4),
        "seconds": round(reply.seconds, 4),
    }


def _require_model(name: str) -> None:
    folder = Path(name).expanduser()
    if (folder / "config.yaml").exists() and not (folder / "model").is_dir():
        raise ConfigError(f"{name} has no saved model", f"finish it first: postgrad resume {name}")


@contextmanager
def _ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C ends the answer after its next token; the second ends it at once."""
    pressed = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        stop()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
