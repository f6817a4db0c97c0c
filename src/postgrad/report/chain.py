"""``report.html`` of a pipeline: each stage's verdict, and below it the stage's whole page."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from postgrad.report.text import duration
from postgrad.runs import Run, write_atomic

TITLES = {"sft": "Supervised fine-tuning", "dpo": "Preference training (DPO)", "grpo": "Online RL (GRPO)"}


def write_chain_report(folder: Path, stages: dict[str, Path]) -> Path:
    """Write the page of a pipeline.

    Args:
        folder: the pipeline's directory.
        stages: each stage's name and run directory, in order; their ``report.html`` become part of the page.

    Returns:
        The page's path.
    """
    style = resources.files("postgrad.report").joinpath("style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; frame-src 'self'"
    name = escape(folder.resolve().name)
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{name}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>",
        f"<h1>{name}</h1>\n<p>{len(stages)} stages, each from the model that the one before it made.</p>",
        *(_stage(number, stage, Run(path)) for number, (stage, path) in enumerate(stages.items(), 1)),
        "</main>\n</body>\n</html>\n",
    ]
    path = folder / "report.html"
    write_atomic(path, "\n".join(parts))
    return path


def _stage(number: int, name: str, run: Run) -> str:
    method = str(run.read_yaml("config.yaml").get("method", "sft"))
    environment: dict[str, Any] = run.read_json("environment.json", {})
    comparison: dict[str, Any] = run.read_json("comparison.json") or {}
    verdict = (comparison.get("verdict") or {}).get("text") or "Nothing was asked before and after."
    seconds = sum(value for value in (environment.get("seconds") or {}).values() if isinstance(value, int | float))
    page = run.path / "report.html"
    whole = page.read_text(encoding="utf-8") if page.exists() else "<p>This stage has no page.</p>"
    return (
        f"<section>\n<h2>{number}. {escape(name)}: {escape(TITLES.get(method, method))}</h2>\n"
        f"<p><strong>{escape(str(verdict))}</strong></p>\n"
        f'<p class="soft"><bdi>{escape(str(run.path))}</bdi> · {escape(str(environment.get("status")))}'
        f" · {escape(duration(seconds) or '')}</p>\n"
        f"<details><summary>The whole page of this stage</summary>"
        f'<iframe class="stage" title="{escape(name)}" sandbox srcdoc="{escape(whole)}"></iframe></details>\n</section>'
    )
