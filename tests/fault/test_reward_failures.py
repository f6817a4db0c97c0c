"""Rewards that raise, hang or return nonsense, and programs of a model that try to do harm."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from postgrad.errors import ConfigError
from postgrad.rewards.code import Limits, run_tests, unprotected
from postgrad.rewards.contract import MOST_HANGS, Reward
from postgrad.rewards.gym import COLUMN, gym_tasks
from postgrad.rewards.load import load_rewards
from postgrad.rewards.score import Scores, score

LIMITS = Limits(seconds=1, memory_mb=512)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
PROTECTED = pytest.mark.skipif(bool(unprotected()), reason="the kernel does not keep a program from everything")


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a hanging function waits for, so that no thread outlives its test."""
    event = threading.Event()
    yield event
    event.set()


def scored(function: Any, texts: list[str], timeout: float = 5.0) -> Scores:
    return score([Reward("mine", 1.0, function)], [""] * len(texts), texts, {}, timeout)


def each(value: Callable[[str], Any]) -> Callable[..., list[Any]]:
    return lambda prompts, completions: [value(text) for text in completions]


def test_only_the_rows_that_raise_are_excluded() -> None:
    scores = scored(each(lambda text: 1 / len(text)), ["a", "", "abcd", ""])
    np.testing.assert_equal(scores.rewards_RF[:, 0], [1.0, math.nan, 0.25, math.nan])
    account = scores.accounts["mine"]
    assert (account.calls, account.raised, account.failed) == (5, 2, 2)
    assert account.messages[0].startswith("ZeroDivisionError: division by zero (test_reward_failures.py:")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", [1], {}, object(), 10**400, 1j])
def test_values_that_are_no_finite_number(value: Any) -> None:
    scores = scored(each(lambda text: value if text == "bad" else 2), ["good", "bad"])
    np.testing.assert_equal(scores.rewards_RF[:, 0], [2.0, math.nan])
    assert (scores.accounts["mine"].not_a_number, scores.accounts["mine"].calls) == (1, 1)
    assert "which is no finite number" in scores.accounts["mine"].messages[0]


@pytest.mark.parametrize(
    ("returned", "said"),
    [([1.0], "1 values"), ([1.0] * 3, "3 values"), (1.0, "a float"), (None, "a NoneType"), ("ab", "a str")],
)
def test_wrong_lengths_and_types(returned: Any, said: str) -> None:
    reward = Reward("mine", 1.0, lambda prompts, completions: returned, answered=True)
    scores = score([reward], ["", ""], ["", ""], {}, 5)
    assert np.isnan(scores.rewards_RF).all()
    assert scores.accounts["mine"].wrong_length == 2
    assert scores.accounts["mine"].messages == [f"returned {said} for 2 completions"]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (each(lambda text: {}["absent"]), "KeyError: 'absent'"),
        (each(lambda text: math.nan), "no finite number"),
        (lambda prompts, completions: 1.0, "returned a float"),
        (each(lambda text: sys.exit(3)), "tried to end the program"),
    ],
)
def test_a_reward_that_never_worked_is_broken(function: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"mine is broken: it failed for all 2 completions.*{said}"):
        scored(function, ["a", "b"])


def test_a_reward_that_worked_once_may_fail_later() -> None:
    step = iter([False, True])

    def function(prompts: list[str], completions: list[str]) -> list[float]:
        if next(step, True):
            raise OSError("no server")
        return [1.0] * len(completions)

    reward = Reward("mine", 1.0, function)
    first = score([reward], ["", ""], ["", ""], {}, 5)
    second = score([reward], ["", ""], ["", ""], {}, 5)
    assert first.rewards_RF.tolist() == [[1.0], [1.0]]
    assert np.isnan(second.rewards_RF).all()
    assert second.accounts["mine"].raised == 2


def test_a_reward_that_does_not_apply_is_not_broken() -> None:
    scores = scored(each(lambda text: None), ["a", "b"])
    assert np.isnan(scores.rewards_RF).all()
    assert (scores.accounts["mine"].not_applicable, scores.accounts["mine"].failed) == (2, 0)


def test_a_reward_that_hangs_is_left_and_then_disabled(gate: threading.Event) -> None:
    def function(prompts: list[str], completions: list[str]) -> list[float]:
        if "hang" in completions:
            gate.wait()
        return [1.0] * len(completions)

    rewards = [Reward("mine", 1.0, function), Reward("other", 1.0, each(lambda text: 2.0))]
    steps = [["a", "b"], ["hang", "b"], ["a", "b"], ["a", "hang"], ["a", "b"]]
    started = time.monotonic()
    got = [score(rewards, ["", ""], texts, {}, 0.2) for texts in steps]
    assert time.monotonic() - started < 5
    for scores, value in zip(got, [1.0, math.nan, 1.0, math.nan, math.nan], strict=True):
        np.testing.assert_equal(scores.rewards_RF, [[value, 2.0]] * 2)
    accounts = [scores.accounts["mine"] for scores in got]
    assert [account.timed_out for account in accounts] == [0, 2, 0, 2, 2]
    assert [account.disabled for account in accounts] == [False, False, False, True, True]
    assert [account.calls for account in accounts] == [1, 1, 1, 1, 0]
    assert "did not return within 0.2 s: it is at threading.py:" in accounts[1].messages[0]
    assert "disabled for the rest of the run" in accounts[3].messages[-1]
    assert rewards[0].hangs == MOST_HANGS


def test_a_reward_that_hangs_at_first_is_broken(gate: threading.Event) -> None:
    with pytest.raises(ConfigError, match="mine is broken.*did not return within"):
        scored(lambda prompts, completions: gate.wait(), ["a"], timeout=0.1)


def test_hangs_while_rows_are_retried_end_the_retries(gate: threading.Event) -> None:
    def function(prompts: list[str], completions: list[str]) -> list[float]:
        if len(completions) > 1:
            raise ValueError("one at a time")
        if completions == ["hang"]:
            gate.wait()
        return [1.0]

    reward = Reward("mine", 1.0, function)
    scores = score([reward], [""] * 5, ["a", "hang", "b", "hang", "c"], {}, 0.1)
    np.testing.assert_equal(scores.rewards_RF[:, 0], [1.0, math.nan, 1.0, math.nan, math.nan])
    assert (scores.accounts["mine"].timed_out, scores.accounts["mine"].disabled) == (3, True)


def test_no_reward_is_left() -> None:
    reward = Reward("mine", 1.0, each(lambda text: 1.0), answered=True, hangs=MOST_HANGS)
    with pytest.raises(ConfigError, match="no reward function is left"):
        score([reward], [""], ["a"], {}, 5)


def test_messages_are_few_and_short() -> None:
    def fail(text: str) -> float:
        raise ValueError(text * 1000)

    reward = Reward("mine", 1.0, each(fail), answered=True)
    account = score([reward], [""] * 9, list("abcdefghi"), {}, 5).accounts["mine"]
    assert account.raised == 9
    assert len(account.messages) == 3 and max(map(len, account.messages)) <= 301


def test_modules_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    (tmp_path / "poor_rewards.py").write_text("import package_that_is_absent\n")
    (tmp_path / "wrong_rewards.py").write_text("def f(:\n")
    for module, said in (
        ("broken_rewards", "fails: ZeroDivisionError"),
        ("poor_rewards", "needs package_that_is_absent"),
        ("wrong_rewards", "fails: SyntaxError"),
        ("brokn_rewards", "did you mean broken_rewards"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_rewards(f"{module}:f", tmp_path)


def test_a_pattern_that_takes_for_ever_excludes_its_row() -> None:
    rewards = load_rewards({"name": "regex_match", "pattern": r"^(a|aa)+$"})
    texts = ["aaa", "a" * 60 + "b"]
    scores = score(rewards, ["", ""], texts, {}, 30)
    np.testing.assert_equal(scores.rewards_RF[:, 0], [1.0, math.nan])
    assert "TimeoutError" in scores.accounts["regex_match"].messages[0]


def test_answers_that_take_for_ever_to_judge_are_worth_nothing() -> None:
    pytest.importorskip("math_verify")
    reward = load_rewards({"name": "math_verify", "seconds": 1})[0]
    texts = ["7", r"$9^{9^{9^{9}}}$", "7"]
    assert list(reward.call([""] * 3, texts, answer=["7"] * 3)) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "1 / 0",
        "def f(:",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import ctypes; ctypes.string_at(0)",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os.close(3)",
        "import os\nfor fd in range(3, 10):\n  try:\n    while True: os.write(fd, b'x' * 65536)\n  except OSError: pass",
    ],
)
def test_programs_that_fail_pass_no_test(code: str) -> None:
    started = time.monotonic()
    assert run_tests(code, ["assert True"], LIMITS) == set()
    assert time.monotonic() - started < 20


def test_a_test_that_ends_the_program_is_a_failure_of_its_own() -> None:
    code = "import sys\ndef f(x):\n    return x if x else sys.exit()"
    assert run_tests(code, ["assert f(1)", "assert f(0)", "f(", "assert f(2)"], LIMITS) == {0, 3}


def test_results_so_far_count_where_a_later_test_hangs() -> None:
    code = "def f(x):\n    while x: pass\n    return True"
    assert run_tests(code, ["assert f(0)", "assert f(1)", "assert f(0)"], LIMITS) == {0}


def test_what_a_program_prints_is_no_result() -> None:
    code = (
        "import os\nprint('0 0')\nfor fd in range(1, 10):\n  try: os.write(fd, b'0 0\\nx 0\\n')\n  except OSError: pass"
    )
    assert run_tests(code, ["assert False"], LIMITS) == set()


def test_nothing_of_the_environment_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_tests("import os", ["assert 'HF_TOKEN' not in os.environ and 'PATH' not in os.environ"], LIMITS) == {0}


@LINUX
def test_too_much_memory() -> None:
    assert run_tests("x = bytearray(4 << 30)", ["assert x"], LIMITS) == set()


@LINUX
def test_too_large_a_file() -> None:
    code = "f = open('a', 'wb')\nf.write(b'x' * (8 << 20))\nf.flush()"
    assert run_tests(code, ["assert True"], LIMITS) == set()


REFUSED = """
def refused(action):
    try:
        action()
    except (OSError, RuntimeError):
        return True
import ctypes, os, socket, subprocess, threading
"""


@PROTECTED
@pytest.mark.parametrize(
    "action",
    [
        "os.fork()",
        "subprocess.run(['/bin/true'])",
        "threading.Thread(target=print).start()",
        "socket.socket()",
        "os.kill(os.getppid(), 0)",
        "os.execv('/bin/true', ['true'])",
        "open(OUTSIDE).read()",
        "open(OUTSIDE, 'w')",
        "os.remove(OUTSIDE)",
        "os.truncate(OUTSIDE, 0)",
        "os.chmod(OUTSIDE, 0o777)",
        "os.listdir(os.path.dirname(OUTSIDE))",
    ],
)
def test_what_the_kernel_refuses(action: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    code = f"{REFUSED}\nOUTSIDE = {str(outside)!r}"
    assert run_tests(code, [f"assert refused(lambda: {action})"], LIMITS) == {0}
    assert outside.read_text() == "precious"


@PROTECTED
def test_a_fork_bomb_leaves_nothing_behind() -> None:
    mark = f"bomb-{os.getpid()}"
    code = f"""
import os
name = {mark!r}
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except OSError:
        pass
"""
    assert run_tests(code, ["assert True"], LIMITS) == set()
    guests = [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"rewards/guest.py" in read(path)]
    mine = [path for path in guests if f"PPid:\t{os.getpid()}\n" in read(path.with_name("status")).decode()]
    orphans = [path for path in guests if "PPid:\t1\n" in read(path.with_name("status")).decode()]
    assert mine == orphans == []


def test_what_the_kernel_does_not_refuse_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    unprotected.cache_clear()
    monkeypatch.setattr("postgrad.rewards.code.run_tests", lambda code, tests, limits: {0, 3})
    try:
        assert unprotected() == ("using the network", "reading other files")
        with pytest.warns(UserWarning, match="'code' runs what a model wrote.*using the network, reading other files"):
            load_rewards({"name": "code", "allow_code_execution": True})
    finally:
        unprotected.cache_clear()


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_ctrl_c_reaches_the_trainer_while_a_reward_hangs(gate: threading.Event) -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    started = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        scored(lambda prompts, completions: gate.wait(), ["a"], timeout=60)
    assert time.monotonic() - started < 30


@PROTECTED
def test_an_answer_that_is_evaluated_can_change_nothing(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    (task,) = gym_tasks("countdown", 1, 1)
    target = tmp_path / "written"
    answer = f"<answer>__import__('pathlib').Path({str(target)!r}).write_text('7')</answer>"
    reward = load_rewards("reasoning_gym")[0]
    (worth,) = reward.call([""], [answer], **{COLUMN: [task.columns[COLUMN]]})
    assert worth is not None and worth < 0.5
    assert not target.exists()
