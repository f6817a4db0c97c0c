"""What the user gave as ``reward_funcs`` → rewards."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from postgrad.errors import ConfigError
from postgrad.rewards import builtin
from postgrad.rewards.calculator import Calculator
from postgrad.rewards.code import code_reward
from postgrad.rewards.contract import Reward, RewardFunction, Value
from postgrad.rewards.environment import Environment
from postgrad.rewards.gym import gym_reward
from postgrad.rewards.math import math_verify

BUILTINS: dict[str, Callable[..., RewardFunction]] = {
    "exact_answer": builtin.exact_answer,
    "math_verify": math_verify,
    "regex_match": builtin.regex_match,
    "think_format": builtin.think_format,
    "length": builtin.length,
    "json_schema": builtin.json_schema,
    "stops": builtin.stops,
    "repetition": builtin.repetition,
    "code": code_reward,
    "reasoning_gym": gym_reward,
}
ENVIRONMENTS: dict[str, Callable[[], Environment]] = {"calculator": Calculator}
SHAPES = "give a built-in's name, module:function, or a mapping with 'name'; in Python also a function"

Spec = str | Mapping[str, Any] | RewardFunction


def load_rewards(specs: Spec | Sequence[Spec], root: str | Path = ".") -> list[Reward]:
    """Understand reward functions.

    Args:
        specs: one or several of: a function; a built-in's name (``exact_answer``); ``module:function``, importable
            from ``root`` or installed; a mapping with ``name`` (one of these), and optionally ``weight`` (default 1),
            ``as`` (its name in the log), ``reward_timeout`` (seconds) and the reward's own options.
        root: the folder that modules are also looked for in.

    Raises:
        ConfigError: for anything that is none of these, cannot be imported or has an unknown option, and for two
            rewards of one name.
    """
    if isinstance(specs, str | Mapping) or not isinstance(specs, Sequence):
        specs = [specs]
    if not specs:
        raise ConfigError("there is no reward function", SHAPES)
    rewards = [_load(spec, Path(root)) for spec in specs]
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two rewards are called '{name}'", f"rename one: {{name: {name}, as: other_name}}")
    return rewards


def load_environment(name: str, root: str | Path = ".") -> Callable[[], Environment]:
    """What makes environments of a name.

    Args:
        name: ``calculator``, or ``module:Class`` (or a function that gives an object), importable from ``root`` or
            installed; called without arguments for each episode.
        root: the folder that modules are also looked for in.

    Raises:
        ConfigError: for anything that is none of these, or whose objects have no ``reset`` or no ``step``.
    """
    make = ENVIRONMENTS.get(name) or _imported(name, Path(root), "environment", ENVIRONMENTS)
    if not callable(make):
        raise ConfigError(f"the environment {name} is no class but {type(make).__name__}", "give module:Class")
    try:
        made = make()
    except Exception as error:
        message = f"the environment {name} cannot be made: {type(error).__name__}: {error}"
        raise ConfigError(message, "it is called without arguments") from error
    for method in ("reset", "step"):
        if not callable(getattr(made, method, None)):
            raise ConfigError(f"the environment {name} has no {method}()", "see docs/rewards.md for what it needs")
    return make


def environment_reward() -> Reward:
    """The reward ``environment``: what the episode was worth to its environment."""

    def reward(
        prompts: list[Any], completions: list[Any], environment_reward: list[Any], **columns: Any
    ) -> list[Value]:
        for value in environment_reward:
            if isinstance(value, str):  # what went wrong; it is then asked for each episode alone
                raise RuntimeError(value)
        return environment_reward

    return Reward("environment", 1.0, reward)


def _load(spec: Spec, root: Path) -> Reward:
    if not isinstance(spec, Mapping):
        name, call = _resolve(spec, {}, root)
        return Reward(name, 1.0, call)
    options = {str(key): value for key, value in spec.items()}
    given = options.pop("name", None)
    if given is None:
        raise ConfigError(f"a reward has no name: {dict(spec)}", SHAPES)
    weight, timeout = options.pop("weight", 1.0), options.pop("reward_timeout", None)
    label = options.pop("as", None)
    _check_number("weight", weight, given)
    if timeout is not None:
        _check_number("reward_timeout", timeout, given)
        if timeout <= 0:
            raise ConfigError(f"reward {given}: reward_timeout={timeout} leaves no time", "give seconds above 0")
    name, call = _resolve(given, options, root)
    return Reward(str(label or name), float(weight), call, None if timeout is None else float(timeout))


def _check_number(option: str, value: Any, name: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"reward {name}: {option} is no number but {value!r}")


def _resolve(given: Any, options: dict[str, Any], root: Path) -> tuple[str, RewardFunction]:
    """The name in the log, and the function with its options."""
    if isinstance(given, str):
        if given in BUILTINS:
            return given, _built(given, options)
        function, name = _imported(given, root), given.rpartition(":")[2]
    else:
        function, name = given, getattr(given, "__name__", type(given).__name__)
    _check_callable(function, name)
    return name, _with_options(function, options) if options else function


def _built(name: str, options: dict[str, Any]) -> RewardFunction:
    parameters = inspect.signature(BUILTINS[name]).parameters
    known = ", ".join(parameters) or "none"
    for option in options:
        if option not in parameters:
            raise ConfigError(f"the reward {name} has no option '{option}'", f"its options: {known}")
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise ConfigError(
                f"the reward {name} needs the option '{option}'",
                f"write {{name: {name}, {option}: …}}; options: {known}",
            )
    try:
        return BUILTINS[name](**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the reward {name} cannot use its options: {error}", f"its options: {known}") from None


def _imported(text: str, root: Path, kind: str = "reward", known: Mapping[str, Any] = BUILTINS) -> Any:
    """The object that ``module:function`` names; ``kind`` and ``known``: what is looked for, and the built-in ones."""
    module_name, colon, function_name = text.partition(":")
    if not colon:
        near = difflib.get_close_matches(text, known, n=3, cutoff=0.6)
        shapes = SHAPES if kind == "reward" else "give a built-in's name, or module:Class"
        cure = f"did you mean {' or '.join(near)}?" if near else f"the built-ins are: {', '.join(known)}; {shapes}"
        raise ConfigError(f"there is no {kind} called '{text}'", cure)
    if module_name.endswith(".py") or "/" in module_name or not module_name or not function_name:
        shape = Path(module_name or f"my_{kind}s").with_suffix("").as_posix().strip("./").replace("/", ".")
        raise ConfigError(
            f"'{text}' is not of the form module:function", f"write {shape}:{function_name or 'function'}"
        )
    folder = str(root.resolve())
    # First on the path, as Python has the folder it is started in; and left there, for what is imported later.
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"the {kind}'s module {module_name} needs {error.name}, which is not installed"
            ) from error
        files = [path.stem for path in sorted(root.glob("*.py"))]
        near = difflib.get_close_matches(module_name, files, n=3, cutoff=0.6)
        cure = (
            f"did you mean {' or '.join(near)}?" if near else f"write it to {folder}/{module_name.replace('.', '/')}.py"
        )
        raise ConfigError(f"there is no module {module_name} for the {kind} '{text}'", cure) from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f"the {kind}'s module {module_name} fails: {type(error).__name__}: {error}") from error
    try:
        return getattr(module, function_name)
    except AttributeError:
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        near = difflib.get_close_matches(function_name, public, n=3, cutoff=0.5) or public[:5]
        raise ConfigError(
            f"the module {module_name} has no '{function_name}'", f"it has: {', '.join(near) or 'no functions'}"
        ) from None


def _check_callable(function: Any, name: str) -> None:
    if not callable(function):
        raise ConfigError(f"the reward {name} is no function but {type(function).__name__}", SHAPES)
    if inspect.isclass(function):
        raise ConfigError(f"the reward {name} is a class", f"give an object of it, which has __call__: {name}()")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        raise ConfigError(f"the reward {name} is asynchronous, which is not supported", "write it as a plain function")
    if hasattr(function, "named_parameters"):
        raise ConfigError(f"the reward {name} is a model, which is not supported", "wrap it in a function")


def _with_options(function: RewardFunction, options: dict[str, Any]) -> RewardFunction:
    """The function with fixed arguments; its signature stays readable, without them."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        signature = None

    def reward(**arguments: Any) -> Sequence[Value]:
        return function(**{**arguments, **options})

    if signature is not None:
        taken = signature.parameters.values()
        if not any(item.kind is item.VAR_KEYWORD for item in taken):
            for option in options:
                if option not in signature.parameters:
                    others = [item for item in signature.parameters if item not in ("prompts", "completions")]
                    name = getattr(function, "__name__", type(function).__name__)
                    raise ConfigError(
                        f"the reward {name} has no option '{option}'", f"its arguments: {', '.join(others) or 'none'}"
                    )
        kept = [item for item in taken if item.name not in options]
        reward.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return reward
