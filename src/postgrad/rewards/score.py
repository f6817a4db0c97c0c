"""Call reward functions so that none of them can stop, stall or quietly spoil training.

What cannot be prevented: a call that hangs goes on in its thread until the program ends, and a hang inside one C call
that keeps Python's global lock (a giant power, some regular expressions) stalls the program with it.
"""

from __future__ import annotations

import copy
import math
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from postgrad.errors import ConfigError, DataError
from postgrad.rewards.contract import MOST_HANGS, Completion, Reward, accepted

RESERVED = ("prompts", "completions", "completion_ids", "stop_token_ids", "trainer_state")
MOST_MESSAGES = 3
LONGEST_MESSAGE = 300


@dataclass(slots=True)
class Account:
    """How the calls of one reward went in one step. All counts but ``calls`` are of completions.

    Args:
        calls: calls of the function.
        raised: it raised an exception, also when called for this completion alone.
        timed_out: it did not return in time, or was disabled because of that.
        not_a_number: its value was NaN, infinite or no number.
        not_applicable: it returned None.
        wrong_length: it returned no list of one value for each completion.
        disabled: it hung too often and is not called again in this run.
        messages: what went wrong, at most three different messages.
    """

    calls: int = 0
    raised: int = 0
    timed_out: int = 0
    not_a_number: int = 0
    not_applicable: int = 0
    wrong_length: int = 0
    disabled: bool = False
    messages: list[str] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Completions without a value although the reward did not say that it does not apply."""
        return self.raised + self.timed_out + self.not_a_number + self.wrong_length

    def note(self, message: str) -> None:
        """Keep a message, unless it is known or there are enough."""
        message = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}…"
        if message not in self.messages and len(self.messages) < MOST_MESSAGES:
            self.messages.append(message)


@dataclass(frozen=True, slots=True)
class Scores:
    """What completions were worth.

    Args:
        rewards_RF: float64, shape (R completions, F functions); NaN where a reward is excluded.
        accounts: for each reward, by name, how its calls went.
    """

    rewards_RF: np.ndarray
    accounts: dict[str, Account]


@dataclass(slots=True)
class _Call:
    """One call in a thread of its own."""

    value: Any = None
    error: BaseException | None = None


class _Hung(Exception):
    """A call did not return in time."""


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    columns: Mapping[str, Sequence[Any]],
    timeout: float,
    *,
    completion_ids: Sequence[Sequence[int]] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    trainer_state: Any = None,
) -> Scores:
    """Ask every reward function about every completion.

    A function that raises is called again for each completion alone, so that only the bad ones are excluded. One that
    hangs is not; after two hangs it is disabled. Every exclusion is counted.

    Args:
        rewards: their ``answered`` and ``hangs`` are kept up to date.
        prompts: of each completion: texts, or lists of messages.
        completions: R texts, or lists of messages.
        columns: the rows' other columns, R values each.
        timeout: seconds a call may take; a reward's own timeout wins.
        completion_ids: token ids of each completion.
        stop_token_ids: ids that end a completion.
        trainer_state: passed on.

    Raises:
        ConfigError: for a reward that needs a column there is none of; that failed for every completion and never
            gave a value before; or when all rewards were disabled before.
        DataError: for a column whose name is taken, or of another length than ``completions``.
    """
    if rewards and all(reward.disabled for reward in rewards):
        names = ", ".join(reward.name for reward in rewards)
        raise ConfigError(
            f"no reward function is left: {names} did not return in time {MOST_HANGS} times",
            "make it faster, or give it more time (reward_timeout)",
        )
    _check_columns(prompts, completions, columns, completion_ids)
    inputs: dict[str, list[Any]] = {name: list(values) for name, values in columns.items()}
    inputs |= {"prompts": list(prompts), "completions": list(completions)}
    if completion_ids is not None:
        inputs["completion_ids"] = [list(ids) for ids in completion_ids]
    shared: dict[str, Any] = {"trainer_state": trainer_state}
    if stop_token_ids is not None:
        shared["stop_token_ids"] = list(stop_token_ids)
    rewards_RF = np.full((len(completions), len(rewards)), np.nan)
    accounts: dict[str, Account] = {}
    for index, reward in enumerate(rewards):
        _check_needs(reward, inputs, shared, columns)
        accounts[reward.name] = account = Account()
        if len(completions):
            rewards_RF[:, index] = _ask(reward, inputs, shared, reward.timeout or timeout, account)
    return Scores(rewards_RF, accounts)


def weighted_sum(rewards: Sequence[Reward], scores: Scores) -> np.ndarray:
    """The sum of weight times reward of each completion, as TRL has it.

    An excluded reward adds nothing, which is not the same as a reward that is excluded for the whole group: see
    docs/rewards.md.

    Returns:
        Float64, shape (R,); NaN where every reward is excluded.
    """
    weighted_RF = scores.rewards_RF * np.array([reward.weight for reward in rewards])
    none_R = np.isnan(weighted_RF).all(axis=1)
    return np.where(none_R, np.nan, np.nansum(weighted_RF, axis=1))


def _ask(
    reward: Reward, inputs: dict[str, list[Any]], shared: dict[str, Any], timeout: float, account: Account
) -> list[float]:
    """One reward's values, NaN where it is excluded."""
    total = len(inputs["completions"])
    if reward.disabled:
        account.disabled, account.timed_out = True, total
        account.note(f"{reward.name} is disabled: it did not return in time {reward.hangs} times")
        return [math.nan] * total
    try:
        values = _values(_called(reward, inputs, shared, timeout, account), total, account)
    except _Hung as hung:
        account.timed_out = total
        account.note(str(hung))
        values = [math.nan] * total
    except Exception as error:
        values = _one_by_one(reward, inputs, shared, timeout, account, error)
    if account.failed < total:
        reward.answered = True
    if not reward.answered:
        raise _broken(reward, account, total)
    account.disabled = reward.disabled
    if reward.disabled:
        account.note(f"{reward.name} did not return in time {reward.hangs} times: disabled for the rest of the run")
    return values


def _one_by_one(
    reward: Reward,
    inputs: dict[str, list[Any]],
    shared: dict[str, Any],
    timeout: float,
    account: Account,
    error: Exception,
) -> list[float]:
    """The values where a call for all raised: each completion alone."""
    total = len(inputs["completions"])
    account.note(last_line(error))
    if total == 1:
        account.raised = 1
        return [math.nan]
    values: list[float] = []
    for row in range(total):
        if reward.disabled:
            account.timed_out += total - row
            break
        try:
            alone = {name: column[row : row + 1] for name, column in inputs.items()}
            values += _values(_called(reward, alone, shared, timeout, account), 1, account)
        except _Hung as hung:
            account.timed_out += 1
            account.note(str(hung))
            values.append(math.nan)
        except Exception as again:
            account.raised += 1
            account.note(last_line(again))
            values.append(math.nan)
    return values + [math.nan] * (total - len(values))


def _called(
    reward: Reward, inputs: dict[str, list[Any]], shared: dict[str, Any], timeout: float, account: Account
) -> Any:
    """What the function returned.

    Raises:
        _Hung: when it did not return in time.
        RuntimeError: when it tried to end the program.
        Exception: what it raised.
    """
    # Copies, because a function may change its arguments, and a hung one may do so later. The trainer's state is one
    # object on purpose: functions read its step.
    arguments, _ = accepted(reward.call, {**copy.deepcopy(inputs), **shared})
    call = _Call()

    def work() -> None:
        try:
            call.value = reward.call(**arguments)
        except BaseException as error:  # one that leaves a thread would be printed and lost
            call.error = error

    account.calls += 1
    thread = threading.Thread(target=work, name=f"reward-{reward.name}", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        reward.hangs += 1
        raise _Hung(f"{reward.name} did not return within {timeout:g} s{_stuck(thread)}")
    if call.error is not None and not isinstance(call.error, Exception):
        raise RuntimeError(f"{reward.name} tried to end the program") from call.error
    if call.error is not None:
        raise call.error
    return call.value


def _values(returned: Any, total: int, account: Account) -> list[float]:
    """The values of a call, NaN for those that cannot be used."""
    listed = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(listed, list | tuple) or len(listed) != total:
        what = f"{len(listed)} values" if isinstance(listed, list | tuple) else f"a {type(listed).__name__}"
        account.wrong_length += total
        account.note(f"returned {what} for {total} completions")
        return [math.nan] * total
    values: list[float] = []
    for value in listed:
        if value is None:
            account.not_applicable += 1
            values.append(math.nan)
            continue
        number = _number(value)
        if not math.isfinite(number):
            account.not_a_number += 1
            account.note(f"returned {value!r:.80}, which is no finite number")
            number = math.nan
        values.append(number)
    return values


def _number(value: Any) -> float:
    """A value as a float; NaN for what is no number. Numbers of numpy and torch have ``item``."""
    if isinstance(value, str | bytes):
        return math.nan
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def _broken(reward: Reward, account: Account, total: int) -> ConfigError:
    said = account.messages[-1]
    return ConfigError(
        f"the reward {reward.name} is broken: it failed for all {total} completions of its first step: {said}",
        "mend the function: it gets lists, and returns a list with one number or None for each completion",
    )


def last_line(error: BaseException) -> str:
    """The last line of a traceback, with the place of the last call."""
    said = traceback.format_exception_only(error)[-1].strip()
    frames = traceback.extract_tb(error.__traceback__)
    return f"{said} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else said


def _stuck(thread: threading.Thread) -> str:
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
    return f": it is at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else ""


def _check_columns(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    columns: Mapping[str, Sequence[Any]],
    completion_ids: Sequence[Sequence[int]] | None,
) -> None:
    for name in columns:
        if name in RESERVED:
            raise DataError("this name is taken by an argument of reward functions", "rename the column", field=name)
    lists: dict[str, Sequence[Any]] = {**columns, "prompts": prompts}
    if completion_ids is not None:
        lists["completion_ids"] = completion_ids
    for name, values in lists.items():
        if len(values) != len(completions):
            reason = f"has {len(values)} values for {len(completions)} completions"
            raise DataError(reason, "give one value for each completion", field=name)


def _check_needs(
    reward: Reward, inputs: dict[str, list[Any]], shared: dict[str, Any], columns: Mapping[str, Sequence[Any]]
) -> None:
    _, missing = accepted(reward.call, {**inputs, **shared})
    if missing:
        raise ConfigError(
            f"the reward {reward.name} needs the column '{missing[0]}', which the rows do not have",
            f"the rows' columns: {', '.join(columns) or 'none'}; map one with columns='{{{missing[0]}: …}}'",
        )
