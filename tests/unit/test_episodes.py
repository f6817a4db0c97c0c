"""Episodes in training: what the model saw and wrote, token by token, and what only the environment said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from postgrad.data.render import Renderer, RenderOptions
from postgrad.episodes import Played, Player, continuation
from postgrad.errors import ConfigError, DataError
from postgrad.generate import to_answer
from postgrad.method_config import GRPOConfig
from postgrad.rewards.calculator import Calculator
from postgrad.rewards.environment import Environment, EnvStep, play
from postgrad.rewards.load import load_environment
from postgrad.types import Answer, Conversation, Message, Source, Task, TextRow
from program import SMALL, Result, metrics, rows_of, write_jsonl

TOKENIZER = tiny.tokenizer()
STOP = TOKENIZER.eos_token_id
RENDERER = Renderer(TOKENIZER, [STOP], RenderOptions())
SOURCE = Source("a.jsonl", 1)


def task(text: str = "6*7+1?", **columns: Any) -> Task:
    return Task(Conversation([{"role": "user", "content": text}], SOURCE), columns, SOURCE)


def prompts_of(tasks: Sequence[Task]) -> list[list[int]]:
    return [RENDERER.question_ids(one.question.messages) for one in tasks]  # type: ignore[union-attr]


class Script:
    """Answers with given texts, each prompt's in turn, and remembers what was asked."""

    def __init__(self, *answers: list[str], stopped: bool = True) -> None:
        self.answers, self.stopped = [list(texts) for texts in answers], stopped
        self.calls: list[tuple[list[list[int]], int]] = []

    def __call__(self, prompts: list[list[int]], limit: int, turn: int) -> list[Answer]:
        assert turn == len(self.calls)
        self.calls.append(([list(prompt) for prompt in prompts], limit))
        left = [texts for texts in self.answers if texts]
        assert len(left) == len(prompts)
        found = []
        for texts, prompt in zip(left, prompts, strict=True):
            ids = [*TOKENIZER(texts.pop(0)).input_ids, *([STOP] if self.stopped else [])]
            found.append(to_answer(TOKENIZER, ids[:limit], {STOP}, len(prompt)))
        return found


def player(make: Callable[[], Environment] = Calculator, max_turns: int = 4, limit: int = 200) -> Player:
    return Player(make, RENDERER, max_turns, limit)


def by_model(episode: Played) -> list[int]:
    return [token for token, own in zip(episode.token_ids, episode.own, strict=True) if own]


def test_an_episode_is_the_conversation_token_by_token() -> None:
    tasks = [task(answer="43")]
    script = Script(["<calc>6*7</calc>", "<calc>42+1</calc>", "43"])
    (episode,) = player().play(tasks, prompts_of(tasks), script)
    user, assistant = "<|im_start|>user\n", "<|im_start|>assistant\n"
    written = TOKENIZER.decode([*episode.prompt_ids, *episode.token_ids])
    assert written == (
        f"{user}6*7+1?<|im_end|>\n{assistant}<calc>6*7</calc><|im_end|>\n"
        f"{user}<result>42</result><|im_end|>\n{assistant}<calc>42+1</calc><|im_end|>\n"
        f"{user}<result>43</result><|im_end|>\n{assistant}43<|im_end|>"
    )
    assert TOKENIZER.decode(by_model(episode)) == "<calc>6*7</calc><|im_end|><calc>42+1</calc><|im_end|>43<|im_end|>"
    assert (episode.text, episode.stop_reason, episode.turns, episode.reward) == ("43", "stop", 3, 1.0)
    # What the model was asked in each turn is the beginning of what is trained on.
    whole = [*episode.prompt_ids, *episode.token_ids]
    for prompts, _ in script.calls:
        assert whole[: len(prompts[0])] == prompts[0]
    assert [message["role"] for message in episode.messages] == ["assistant", "user"] * 2 + ["assistant"]


def test_the_same_episode_as_play_gives() -> None:
    texts = ["<calc>1/0</calc>", "<calc>2</calc> and <calc>3</calc>", "5"]
    said = iter(texts)
    one = play(Calculator(), {"answer": "5", "messages": [{"role": "user", "content": "?"}]}, lambda _: next(said), 4)
    (other,) = player().play([task("?", answer="5")], prompts_of([task("?")]), Script(texts))
    assert [*task("?").question.messages, *other.messages] == one.messages  # type: ignore[union-attr]
    assert (other.reward, other.turns) == (one.reward, one.turns)


def test_running_episodes_answer_together() -> None:
    tasks = [task("a", answer="1"), task("b", answer="2"), task("c", answer="3")]
    script = Script(["1"], ["<calc>1+1</calc>", "2"], ["<calc>1</calc>", "<calc>2</calc>", "4"])
    episodes = player().play(tasks, prompts_of(tasks), script)
    assert [len(prompts) for prompts, _ in script.calls] == [3, 2, 1]
    assert [episode.reward for episode in episodes] == [1.0, 1.0, 0.0]
    assert [episode.turns for episode in episodes] == [1, 2, 3]


def test_turns_and_tokens_run_out() -> None:
    calls = ["<calc>1</calc>"] * 5
    (episode,) = player(max_turns=2).play([task()], prompts_of([task()]), Script(calls))
    assert (episode.turns, episode.reward, episode.stop_reason) == (2, None, "stop")
    assert by_model(episode)[-1] == STOP == episode.token_ids[-1]
    one = len(TOKENIZER(calls[0]).input_ids) + 1
    reply = len(continuation(RENDERER, task().question, [], [{"role": "user", "content": "<result>1</result>"}]))  # type: ignore[arg-type]
    for limit in (one - 1, one, one + reply, one + reply + 1, 2 * one + reply - 1):
        (episode,) = player(limit=limit).play([task()], prompts_of([task()]), Script(calls))
        assert len(episode.token_ids) <= limit and episode.stop_reason == "length"
        assert episode.own[-1], "what nobody reads is not kept"
    (episode,) = player(limit=2 * one + reply, max_turns=2).play([task()], prompts_of([task()]), Script(calls))
    assert (len(episode.token_ids), episode.stop_reason) == (2 * one + reply, "stop")


def test_an_answer_is_cut_to_its_own_room() -> None:
    """Another episode had room for more, so the call allowed more."""

    class Late(Calculator):
        def reset(self, row: dict[str, Any]) -> list[Message] | None:
            super().reset(row)
            return [{"role": "user", "content": "one two three"}] if row["late"] else None

    tasks = [task("a", late=True), task("a", late=False)]
    text = " ".join(["seven"] * 40)
    script = Script([text], [text])
    late, early = player(Late, limit=30).play(tasks, prompts_of(tasks), script)
    assert script.calls[0][1] == 30 == len(early.token_ids)
    extra = len(late.prompt_ids) - len(early.prompt_ids)
    assert extra > 0 and len(late.token_ids) == 30 - extra
    assert late.stop_reason == early.stop_reason == "length"
    assert late.text == TOKENIZER.decode(late.token_ids).strip()
    assert TOKENIZER.decode(late.prompt_ids).count("<|im_start|>user") == 2


class Broken:
    """Fails where the row says so."""

    def reset(self, row: dict[str, Any]) -> list[Message] | None:
        self.at = row["at"]
        if self.at == "reset":
            raise OSError("no door")
        return [{"role": "user", "content": "word " * 50}] if self.at == "opening" else None

    def step(self, message: Message) -> EnvStep:
        if self.at == "step":
            raise ValueError("bad move")
        if self.at == "speaks":
            return EnvStep([{"role": "assistant", "content": "I am the model"}])
        return EnvStep(done=True, reward=0.5)


def test_an_environment_that_raises_ends_its_own_episode() -> None:
    tasks = [task(at="step"), task(at="never"), task(at="reset")]
    script = Script(["one"], ["two"])
    first, second, third = player(Broken).play(tasks, prompts_of(tasks), script)
    assert isinstance(first.reward, str) and first.reward.startswith("ValueError: bad move (")
    assert second.reward == 0.5 and second.stop_reason == "stop"
    assert isinstance(third.reward, str) and "OSError: no door" in third.reward
    assert (third.token_ids, third.turns) == ([], 0)


@pytest.mark.parametrize(
    ("given_", "limit", "error", "words"),
    [
        (task(at="speaks"), 200, ConfigError, "spoke as the assistant"),
        (task(at="opening"), 20, DataError, "leaves no room"),
        (Task(TextRow("6*7", "", SOURCE), {}, SOURCE), 200, ConfigError, "needs chats"),
    ],
)
def test_what_cannot_be_played_is_refused(given_: Task, limit: int, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        player(Broken, limit=limit).play([given_], [[1, 2]], Script(["one"]))


REWRITING = {
    "drops earlier answers": (
        "{%- for m in messages %}{%- if m['role'] != 'assistant' or loop.last %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "opens a thought that it does not write again": tiny.CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}"),
    "ends with the last message": tiny.CHATML.replace(
        "{%- if add_gen", "{%- if not add_generation_prompt %}the end{%- endif %}{%- if add_gen"
    ),
}


@pytest.mark.parametrize("name", REWRITING)
def test_a_template_that_rewrites_is_refused(name: str) -> None:
    renderer = Renderer(tiny.tokenizer(REWRITING[name]), [STOP], RenderOptions())
    question = Conversation([{"role": "user", "content": "a"}], SOURCE)
    with pytest.raises(ConfigError, match="cannot be continued"):
        continuation(renderer, question, [], [{"role": "user", "content": "b"}])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="ab <>/\n1+线é", max_size=12), min_size=1, max_size=3), st.text(max_size=10))
def test_a_continuation_is_what_the_template_writes(replies: list[str], question: str) -> None:
    asked = Conversation([{"role": "user", "content": question}], SOURCE)
    said = [{"role": "user", "content": reply} for reply in replies]
    ids = continuation(RENDERER, asked, [], said)
    whole = [*asked.messages, {"role": "assistant", "content": "7"}, *said]
    expected = TOKENIZER.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    before = TOKENIZER.apply_chat_template(asked.messages, tokenize=False, add_generation_prompt=True)
    assert before + "7<|im_end|>" + TOKENIZER.decode(ids) == expected


# -- in a run -------------------------------------------------------------------------------------------------------

HINTS = '''
from postgrad.rewards.environment import EnvStep

class Hints:
    """Answers twice; pays for answers that begin with a letter of the first half of the alphabet."""

    def reset(self, row):
        self.turn = 0

    def step(self, message):
        self.turn += 1
        reward = float(message["content"][:1].lower() in list("abcdefghijklm")) + len(message["content"]) / 100
        return EnvStep([{"role": "user", "content": f"turn {self.turn}"}], done=self.turn == 3, reward=reward)

class Nothing:
    pass

class Picky:
    def __init__(self, level):
        pass

def failing():
    return Raises()

class Raises:
    def reset(self, row):
        return None

    def step(self, message):
        raise ValueError("it is broken")
'''
RUN = ["num_generations=4", "per_device_train_batch_size=8", "max_completion_length=60", "max_steps=3", "use_cpu=true",
       "logging_steps=1", "learning_rate=1e-3", "num_samples=2", *SMALL]  # fmt: skip


@pytest.fixture
def tasks_file(tmp_path: Path) -> str:
    (tmp_path / "played_environments.py").write_text(HINTS, encoding="utf-8")
    rows = [{"prompt": [{"role": "user", "content": f"{n} + 1"}], "answer": str(n + 1)} for n in range(30)]
    return write_jsonl(tmp_path / "tasks.jsonl", rows)


def test_a_run_in_an_environment(
    cli: Callable[..., Result], model_folder: Callable[..., str], tasks_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postgrad.methods.grpo import GRPO

    seen: list[Any] = []
    begin = GRPO.begin
    monkeypatch.setattr(GRPO, "begin", lambda self, samples: (seen.append(list(samples)), begin(self, samples))[1])
    base = [
        "grpo",
        "-m",
        str(tiny.stopping_folder(Path("model"))),
        "-d",
        tasks_file,
        *RUN,
        "reward_funcs=stops",
        "num_iterations=2",
    ]
    options = ["environment=played_environments:Hints", "max_turns=3", "reward_weights=[0.5, 1]"]
    result = cli(*base, *options, "-o", "run")
    assert result.code == 0, result.text
    rows = metrics(Path("run"))
    assert rows[0]["completions/mean_turns"] > 1.5
    assert rows[0]["reward"] == pytest.approx(0.5 * rows[0]["rewards/stops/mean"] + rows[0]["rewards/environment/mean"])
    assert any(row["grad_norm"] > 0 for row in rows)
    masked = 0
    for one in (rollout for samples in seen for rollout in samples):
        text = TOKENIZER.decode(one.ids_T)
        own = TOKENIZER.decode(one.ids_T[one.weights_T > 0])
        assert "turn " not in own and "user" not in own
        masked += text.count("<|im_start|>user\nturn ")
        assert text.count("<|im_start|>assistant\n") == text.count("<|im_start|>user\n")
    assert masked > 10
    kept = rows_of(Path("run/rollouts.jsonl"))
    assert any("user: turn 1\nassistant:" in row["completion"] for row in kept)
    assert {"attempts", "right", "rewards"} <= set(rows_of(Path("run/after.jsonl"))[-1])
    assert set(rows_of(Path("run/after.jsonl"))[-1]["rewards"]) == {"stops", "environment"}
    again = cli(*base, *options, "-o", "again")
    assert again.code == 0 and metrics(Path("again")) == rows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["environment=calculater"], "did you mean calculator?"),
        (["environment=played_environments:Hint"], "has no 'Hint'"),
        (["environment=played_environments:Nothing"], "has no reset()"),
        (["environment=played_environments:Picky"], "cannot be made"),
        (["environment=played_environments:HINTS"], "has no 'HINTS'"),
        (["environment=no_module:Hints"], "there is no module no_module for the environment"),
        (["reward_funcs=stops", "max_turns=3"], "max_turns has no effect without environment"),
        (["environment=played_environments:failing"], "it is broken"),
    ],
)
def test_what_is_no_environment_is_refused(
    cli: Callable[..., Result], model_folder: Callable[..., str], tasks_file: str, options: list[str], words: str
) -> None:
    result = cli("grpo", "-m", model_folder(), "-d", tasks_file, *RUN, *options)
    assert result.code == 2 and words in result.text and "Traceback" not in result.text


def test_the_calculator_has_a_name() -> None:
    assert load_environment("calculator") is Calculator
    assert GRPOConfig(environment="calculator").max_turns == 8


def test_the_trainer_plays_too(tmp_path: Path) -> None:
    from postgrad import GRPOTrainer

    args = GRPOConfig(
        output_dir=str(tmp_path / "run"), environment="calculator", max_turns=2, max_completion_length=24, max_steps=1,
        num_generations=4, per_device_train_batch_size=8, use_cpu=True, bf16=False, max_new_tokens=4, rehearsal=False,
        reward_weights=[1, 0.5], logging_steps=1,
    )  # fmt: skip
    rows = [{"prompt": [{"role": "user", "content": f"{n}+1"}], "answer": str(n + 1)} for n in range(12)]
    trainer = GRPOTrainer(
        str(tiny.stopping_folder(tmp_path / "model")), reward_funcs="stops", args=args, train_dataset=rows
    )
    trainer.train()
    assert [(reward.name, reward.weight) for reward in trainer.rewards] == [("stops", 1), ("environment", 0.5)]
    (row,) = [one for one in trainer.state.log_history if "reward" in one]
    assert row["reward"] == pytest.approx(row["rewards/stops/mean"] + 0.5 * row["rewards/environment/mean"])
