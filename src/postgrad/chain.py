"""Several methods in a row, each from the model that the last one made: ``postgrad run PIPELINE.yaml``.

A stage that is complete is not done again, an interrupted one is resumed; ``chain.json`` remembers their runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.config import RunConfig
from postgrad.config_file import read_yaml
from postgrad.display import Display
from postgrad.errors import ConfigError
from postgrad.method_config import RUN_CONFIGS
from postgrad.pipeline import resume, start
from postgrad.report.chain import write_chain_report
from postgrad.resuming import computed
from postgrad.runs import Run

FILE = "chain.json"


@dataclass(frozen=True, slots=True)
class Stage:
    """One method of a pipeline.

    Args:
        name: of its run directory, below the pipeline's.
        config: its settings.
    """

    name: str
    config: RunConfig


def read_chain(path: str, overrides: dict[str, Any]) -> tuple[Path, list[Stage]]:
    """Understand a pipeline file.

    Args:
        path: YAML: options that all stages share, and ``stages``, a list of mappings with ``method`` (sft, dpo or
            grpo), optionally ``name``, and options of their own, which win. A stage without a model takes the one that
            the stage before it made.
        overrides: shared options that win over the file's.

    Returns:
        The pipeline's directory and its stages.

    Raises:
        ConfigError: naming the stage.
    """
    values = {**read_yaml(path), **overrides}
    folder, stages = Path(values.pop("output_dir", None) or Path("runs") / Path(path).stem), values.pop("stages", None)
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError(f"{path}: has no list of stages", "write stages:, and under it one '- method: …' for each")
    found: list[Stage] = []
    for number, own in enumerate(stages, 1):
        method, name = own.get("method"), str(own.get("name") or own.get("method"))
        if method not in RUN_CONFIGS:
            raise ConfigError(f"{path}: stage {number} has no method", f"write one of {', '.join(RUN_CONFIGS)}")
        if name in {stage.name for stage in found}:
            raise ConfigError(f"{path}: two stages are called '{name}'", "give each a name of its own")
        if "output_dir" in own:
            raise ConfigError(f"{path}: stage {number} has an output_dir", "it is the pipeline's, and the stage's name")
        shared = {key: value for key, value in values.items() if not found or key != "model_name_or_path"}
        options = {**shared, **{key: value for key, value in own.items() if key not in ("method", "name")}}
        if found:
            options.setdefault("model_name_or_path", str(folder / found[-1].name))
        found.append(Stage(name, _config(method, options, folder / name, f"{path}: stage {number} ({name})")))
    return folder, found


def _config(method: str, options: dict[str, Any], run: Path, where: str) -> RunConfig:
    for needed in ("model_name_or_path", "dataset_name"):
        if options.get(needed) is None:
            raise ConfigError(f"{where}: '{needed}' is missing", "write it in the stage, or above all stages")
    try:
        return RUN_CONFIGS[method](**options, output_dir=str(run), run_name=run.name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", error.cure) from None


def run_chain(path: str, overrides: dict[str, Any], display: Display) -> tuple[Path, dict[str, Path]]:
    """Do the stages that are not done yet.

    Args:
        path, overrides: as :func:`read_chain` takes them.
        display: for people.

    Returns:
        The page with every stage's evidence, and each stage's run directory.

    Raises:
        PostgradError: of the stage that failed; the stages before it stay.
    """
    folder, stages = read_chain(path, overrides)
    known = {str(name): Path(run) for name, run in Run(folder).read_json(FILE, {}).items()}
    done: dict[str, Path] = {}
    anew = False
    for number, stage in enumerate(stages, 1):
        display.note(f"stage {number} of {len(stages)}: {stage.name}")
        config = _onto(stage.config, folder, done)
        found = known.get(stage.name)
        run, new = _do(config, None if found is None or anew else found, display)
        anew = anew or new
        done[stage.name] = run
        folder.mkdir(parents=True, exist_ok=True)
        Run(folder).write_json(FILE, {name: str(one) for name, one in done.items()})
        write_chain_report(folder, done)
    return folder / "report.html", done


def _onto(config: RunConfig, folder: Path, done: dict[str, Path]) -> RunConfig:
    """The settings with the run of an earlier stage where they name it: it may have taken another directory."""
    named = {str(folder / name): str(run) for name, run in done.items()}
    model = named.get(config.model_name_or_path)
    return config if model is None else config.replace(model_name_or_path=model)


def _do(config: RunConfig, found: Path | None, display: Display) -> tuple[Path, bool]:
    """A stage's run, done now if need be; and whether anything was."""
    run = None if found is None or not (found / "config.yaml").exists() else Run(found)
    if run is None:
        interrupted = Run(Path(str(config.output_dir)))
        run = interrupted if (interrupted.path / "config.yaml").exists() and not interrupted.is_over() else None
    if run is not None:
        values = run.read_yaml("config.yaml")
        method = values.pop("method", "sft")
        if method != config.method or computed(RUN_CONFIGS[method](**values)) != computed(config):
            raise ConfigError(
                f"{run.path} was made with other settings than the pipeline has now",
                "choose another output_dir, or remove that directory to do the stage again",
            )
        if run.is_complete():
            display.note(f"{run.path} is complete")
            return run.path, False
        if not run.is_over():
            return resume(run.path, {}, display).run.path, True
    return start(config, display).run.path, True
