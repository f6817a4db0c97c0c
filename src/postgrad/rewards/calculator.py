"""A worked example of an environment: the model may ask a calculator before it answers."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from postgrad.evaluate import is_exact
from postgrad.rewards.contract import text_of
from postgrad.rewards.environment import EnvStep
from postgrad.types import Message

LONGEST = 200
MOST_BITS = 4096
MOST_DIGITS = 50
_CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class Calculator:
    """Answers ``<calc>12*7</calc>`` with the result, as a user message; an answer without a call ends the episode.

    The reward of that last answer is 1 where it gives the row's exact ``answer``, else 0; None where the row has none.
    """

    def __init__(self) -> None:
        self._answer: Any = None

    def reset(self, row: dict[str, Any]) -> list[Message] | None:
        """Remember the row's answer."""
        self._answer = row.get("answer")
        return None

    def step(self, message: Message) -> EnvStep:
        """Compute every call of the message, or judge the answer."""
        text = text_of([message])
        calls = _CALL.findall(text)
        if not calls:
            reward = None if self._answer is None else float(is_exact(text, str(self._answer)))
            return EnvStep(done=True, reward=reward)
        results = "\n".join(f"<result>{self._said(call)}</result>" for call in calls)
        return EnvStep([{"role": "user", "content": results}])

    def _said(self, call: str) -> str:
        try:
            return written(calculate(call))
        except ValueError as error:
            return f"error: {error}"


def calculate(expression: str) -> Fraction:
    """The exact value of an arithmetic expression of numbers, ``+ - * / // % **`` and brackets.

    It is read as a tree and never evaluated as Python; its length and the size of every number in it are bounded.

    Args:
        expression: at most 200 characters.

    Raises:
        ValueError: for anything else, a division by zero, or a number of more than 4096 bits.
    """
    expression = expression.strip()
    if len(expression) > LONGEST:
        raise ValueError(f"longer than {LONGEST} characters")
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("no arithmetic expression") from None
    return _value(tree.body)


def written(value: Fraction) -> str:
    """A number as text: whole, a finite decimal fraction, or a quotient; shortened to about 50 digits."""
    if value.denominator == 1:
        text = str(value.numerator)
        return text if len(text) <= MOST_DIGITS else f"about {_rounded(value)}"
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    quotient = f"{value.numerator}/{value.denominator}"
    if rest == 1:
        return _rounded(value)
    return quotient if len(quotient) <= MOST_DIGITS else f"about {_rounded(value)}"


def _rounded(value: Fraction) -> str:
    from decimal import Context, Decimal

    context = Context(prec=MOST_DIGITS)
    result = context.divide(Decimal(value.numerator), Decimal(value.denominator)).normalize(context)
    return f"{result:f}" if -MOST_DIGITS < result.adjusted() < MOST_DIGITS else str(result)


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(Fraction(str(node.value)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _OPERATORS:
            try:
                return _bounded(Fraction(_OPERATORS[type(node.op)](left, right)))
            except ZeroDivisionError:
                raise ValueError("division by zero") from None
    raise ValueError("only numbers, + - * / // % ** and brackets")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """A whole power, refused before it is computed where it would be too large."""
    if exponent.denominator != 1:
        raise ValueError("only whole exponents")
    if base == 0 and exponent < 0:
        raise ValueError("division by zero")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base not in (0, 1, -1) and bits * abs(exponent.numerator) > 2 * MOST_BITS:
        raise ValueError("the number is too large")
    return _bounded(Fraction(base**exponent.numerator))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MOST_BITS:
        raise ValueError("the number is too large")
    return value
