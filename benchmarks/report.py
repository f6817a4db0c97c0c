"""Tables and charts from the measured JSON: ``python -m benchmarks.report [--check]``.

Writes the part of ``docs/performance.md`` between its two markers and ``docs/images/performance-*.svg``, from
``benchmarks/baselines/*.json``, ``benchmarks/agreement/*.json`` and ``benchmarks/methods/*.json``. Each file is of one
machine and gets a section of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import agreement_report, methods_report
from benchmarks.charts import chart
from benchmarks.tables import Record, introduction, section

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def main(arguments: list[str] | None = None) -> int:
    """Write, or with ``--check`` compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something would change")
    options = parser.parse_args(arguments)
    try:
        files = generate(ROOT)
    except ModuleNotFoundError as error:
        print(f"{error.name} is missing: pip install -e '.[dev]'", file=sys.stderr)
        return 2
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    stale += [path for path in (ROOT / "docs" / "images").glob("performance-*.svg") if path not in files]
    for path in stale:
        print(f"{'differs' if options.check else 'written'}: {path.relative_to(ROOT)}")
        if options.check:
            continue
        if path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path])
        else:
            path.unlink()
    return 1 if options.check and stale else 0


def generate(root: Path) -> dict[Path, str]:
    """Every generated file with its content.

    Args:
        root: of the repository.
    """
    sources = sorted((root / "benchmarks" / "baselines").glob("*.json"))
    records: dict[str, Record] = {source.stem: json.loads(source.read_text()) for source in sources}
    files, parts = {}, [introduction(list(records.values()))]
    for stem, record in records.items():
        image = f"images/performance-{stem}.svg"
        files[root / "docs" / image] = chart(record)
        parts.append(section(stem, record, image))
    for source in sorted((root / "benchmarks" / "agreement").glob("*.json")):
        record, image = json.loads(source.read_text()), f"images/performance-agreement-{source.stem}.svg"
        files[root / "docs" / image] = agreement_report.chart(record)
        parts.append(agreement_report.section(record, image))
    for source in sorted((root / "benchmarks" / "methods").glob("*.json")):
        parts.append(methods_report.section(json.loads(source.read_text())))
    page = root / "docs" / "performance.md"
    files[page] = fill(page.read_text(), "\n\n".join(parts))
    return files


def fill(page: str, generated: str) -> str:
    """The page with the part between its markers replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs/performance.md has lost its markers, {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
