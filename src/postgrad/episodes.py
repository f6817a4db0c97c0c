"""Episodes of online RL: the model acts in environments, and every token is kept as it was written or seen.

All running episodes answer together, one call a turn. What an environment says is appended as the tokens that continue
the conversation; nothing that was seen is rendered again.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from postgrad.data.chat import render_text
from postgrad.data.render import Renderer
from postgrad.errors import ConfigError, DataError, PostgradError
from postgrad.generate import to_answer
from postgrad.rewards.environment import Environment, checked
from postgrad.types import Answer, Conversation, Message, Task

# Gets prompts, the most tokens of an answer, and the number of the turn from 0.
Write = Callable[[list[list[int]], int, int], list[Answer]]
STAND_IN = "x"  # an answer in whose place the environment's messages are rendered


@dataclass(frozen=True, slots=True)
class Played(Answer):
    """An episode as one answer: ``text`` is the model's last, ``token_ids`` are all tokens after the prompt.

    ``stop_reason`` is ``length`` where the tokens ran out before the episode ended.

    Args:
        prompt_ids: the prompt, with what the environment put after the row's messages.
        own: for each of ``token_ids`` whether the model wrote it.
        messages: those after the prompt.
        reward: the sum of the steps' rewards; None where no step gave one; a text, saying why, where the environment
            failed.
        turns: how often the model answered.
    """

    prompt_ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    reward: float | str | None = None
    turns: int = 0


@dataclass(slots=True)
class _Episode:
    """An episode while it is played; ``room``: tokens left."""

    task: Task
    environment: Environment
    prompt_ids: list[int]
    room: int
    opening: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    failure: str | None = None
    turns: int = 0
    running: bool = True
    last: Answer = field(default_factory=lambda: Answer("", [], "length", None, 0))
    cut: bool = False

    def played(self) -> Played:
        reward = self.failure or (sum(self.rewards) if self.rewards else None)
        reason, token = ("length", None) if self.cut else (self.last.stop_reason, self.last.stop_token)
        settled = (self.prompt_ids, self.own, self.messages, reward, self.turns)
        return Played(self.last.text, self.ids, reason, token, len(self.prompt_ids), *settled)


@dataclass(frozen=True, slots=True)
class Player:
    """Plays episodes.

    Args:
        make: gives a new environment; each episode has its own.
        renderer: renders what environments say.
        max_turns: most answers of the model in an episode.
        max_completion_length: most tokens after the prompt, the environment's included.
    """

    make: Callable[[], Environment]
    renderer: Renderer
    max_turns: int
    max_completion_length: int

    def play(self, tasks: Sequence[Task], prompts: Sequence[Sequence[int]], write: Write) -> list[Played]:
        """Play an episode of each task.

        Args:
            tasks: chats.
            prompts: token ids of each.
            write: answers prompts.

        Raises:
            ConfigError: for a text instead of a chat, a chat template that cannot be continued, or an environment that
                says what is no message.
            DataError: where an opening leaves no room for an answer.
        """
        episodes = [self._start(task, prompt) for task, prompt in zip(tasks, prompts, strict=True)]
        for turn in range(self.max_turns):
            running = [episode for episode in episodes if episode.running]
            if not running:
                break
            seen = [[*episode.prompt_ids, *episode.ids] for episode in running]
            answers = write(seen, max(episode.room for episode in running), turn)
            for episode, answer in zip(running, answers, strict=True):
                self._turn(episode, answer, last=turn + 1 == self.max_turns)
        return [episode.played() for episode in episodes]

    def _start(self, task: Task, prompt: Sequence[int]) -> _Episode:
        question = task.question
        if not isinstance(question, Conversation):
            raise ConfigError(
                f"{task.source}: an environment needs chats, and this prompt is a text",
                "give prompt as messages, or columns='{prompt: prompt}'",
            )
        episode = _Episode(task, self.make(), list(prompt), self.max_completion_length)
        row = {**task.columns, "messages": [dict(message) for message in question.messages]}
        try:
            episode.opening = checked(episode.environment.reset(row) or [], type(episode.environment).__name__)
        except PostgradError:
            raise
        except Exception as error:
            _fail(episode, error)
        if episode.opening:
            messages = [*question.messages, *episode.opening]
            episode.prompt_ids = self.renderer.question_ids(messages, question.tools, question.template_kwargs)
            episode.room -= max(0, len(episode.prompt_ids) - len(prompt))
        if episode.room < 1:
            raise DataError(
                "the environment's opening leaves no room for an answer",
                "raise max_completion_length",
                file=task.source.file,
                row=task.source.row,
                field="prompt",
            )
        return episode

    def _turn(self, episode: _Episode, answer: Answer, last: bool) -> None:
        """Take an answer, and what the environment says to it."""
        if len(answer.token_ids) > episode.room:  # others had room for more
            ids, stops = answer.token_ids[: episode.room], self.renderer.stop_ids
            answer = to_answer(self.renderer.tokenizer, ids, stops, answer.prompt_tokens)
        self._append(episode, answer.token_ids, own=True)
        message = {"role": "assistant", "content": answer.text}
        episode.messages.append(message)
        episode.last, episode.cut = answer, answer.stop_reason == "length"
        episode.turns += 1
        try:
            step = episode.environment.step(dict(message))
            replies = checked(step.messages, type(episode.environment).__name__)
            episode.rewards += [] if step.reward is None else [float(step.reward)]
        except PostgradError:
            raise
        except Exception as error:
            _fail(episode, error)
            return
        episode.messages += replies
        if step.done or last or episode.cut:
            episode.running = False
            return
        ids = self._continuation(episode, replies)
        if len(ids) < episode.room:
            self._append(episode, ids, own=False)
        else:
            episode.running, episode.cut = False, True

    @staticmethod
    def _append(episode: _Episode, ids: list[int], own: bool) -> None:
        episode.ids += ids
        episode.own += [own] * len(ids)
        episode.room -= len(ids)

    def _continuation(self, episode: _Episode, replies: list[Message]) -> list[int]:
        question = episode.task.question
        assert isinstance(question, Conversation)
        return continuation(self.renderer, question, episode.opening, replies)


def continuation(
    renderer: Renderer, question: Conversation, opening: Sequence[Message], replies: Sequence[Message]
) -> list[int]:
    """The tokens between the stop token of an answer and the beginning of the next.

    They are the template's, taken behind a short answer that stands in for the real one, whose own tokens stay.

    Args:
        renderer: with the template.
        question: the task's.
        opening: the environment's messages before the first answer.
        replies: its messages after the answer.

    Raises:
        ConfigError: where the template rewrites, or leaves unfinished, what came before.
    """
    variables = {**renderer.options.template_kwargs, **question.template_kwargs}

    def text(messages: list[Message], prompt: bool) -> str:
        options = {"tools": question.tools, **variables}
        return render_text(renderer.tokenizer, messages, add_generation_prompt=prompt, **options)

    asked = [*question.messages, *opening]
    answered = [*asked, {"role": "assistant", "content": STAND_IN}]
    before, said, after = text(asked, True), text(answered, False), text([*answered, *replies], True)
    stop = renderer.stop_pattern.search(said, len(before))
    if stop is None or not said.startswith(before + STAND_IN) or not after.startswith(said):
        raise ConfigError(
            "the chat template cannot be continued: once an environment has answered, it writes what came before in "
            "another way, so that the model would not learn from what it saw",
            "give a template that only appends, with chat_template_path; see docs/rewards.md",
        )
    ids = renderer.encoder.ids(after[stop.start() :])
    return ids[1:] if ids[0] in renderer.stop_ids else renderer.encoder.ids_after(after[stop.end() :])


def _fail(episode: _Episode, error: Exception) -> None:
    """End an episode in which the environment raised; the reward ``environment`` then raises the same."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    episode.failure = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
    episode.running, episode.cut = False, episode.cut or not episode.turns
