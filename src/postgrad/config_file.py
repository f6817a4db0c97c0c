"""A YAML file and ``key=value`` overrides → a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from postgrad.config import RunConfig, kinds
from postgrad.errors import ConfigError
from postgrad.method_config import RUN_CONFIGS


class _Loader(yaml.SafeLoader):
    """YAML that refuses an option given twice, of which the standard loader would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping's values by name."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen and key.value != "<<":
                raise yaml.YAMLError(f"'{key.value}' is given twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options of a YAML file.

    Raises:
        ConfigError: for a file that cannot be read, or holds no options.
    """
    try:
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: holds no options", "write one 'name: value' per line")
    return {str(key): value for key, value in loaded.items()}


def load_config(path: str | Path | None, overrides: dict[str, Any], method: str = "sft") -> RunConfig:
    """Read a YAML file, apply overrides, validate.

    Args:
        path: YAML file of flat options, or None.
        overrides: options that win over the file's.
        method: whose configuration it is; a file that names another is refused.

    Raises:
        ConfigError: for an unreadable file or an invalid option; the message names file and option.
    """
    if method not in RUN_CONFIGS:
        raise ConfigError(f"there is no method '{method}'", f"there are {', '.join(RUN_CONFIGS)}")
    values = read_yaml(path) if path is not None else {}
    values.update(overrides)
    named = values.pop("method", method)
    if named != method:
        where = f"{path}: " if path else ""
        cure = (
            f"use 'postgrad {named}', or --method {named}"
            if named in RUN_CONFIGS
            else f"leave it out, or give {method}"
        )
        raise ConfigError(f"{where}'method' is {named}, not {method}", cure)
    for needed, flag in (("model_name_or_path", "-m MODEL"), ("dataset_name", "-d DATA")):
        if values.get(needed) is None:
            raise ConfigError(f"'{needed}' is missing", f"give {flag}, or {needed} in the config file")
    try:
        return RUN_CONFIGS[method](**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}" if path else error.message, error.cure) from None


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """Turn ``["learning_rate=1e-5", "eval_steps=10"]`` into options.

    Values are read as YAML, except those of options that are words: these are taken as they stand.

    Raises:
        ConfigError: for an item without ``=`` or a value that is not YAML.
    """
    values: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"'{item}' is not an option", "write options as name=value")
        field = next((kind.model_fields[name] for kind in RUN_CONFIGS.values() if name in kind.model_fields), None)
        if field is not None and kinds(field.annotation) <= {str, type(None)} and text not in ("", "null"):
            values[name] = text
            continue
        try:
            values[name] = yaml.safe_load(text) if text else None
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ConfigError(f"the value of '{name}' cannot be read: {text:.80}", "write it as in YAML") from None
    return values
