"""``docs/reliability.md``, made by the test run: what was done, what happened, how often.

``pytest --reliability=write`` writes the table from the tests that are marked and have passed; ``check`` fails where the
page says something else. Both want the whole suite.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- faults:begin -->", "<!-- faults:end -->"
FAULTS = {
    1: "wrong options and configurations",
    2: "broken data files",
    3: "strange rows and forms of files",
    4: "nothing, or next to nothing, to train",
    5: "rows that are too long",
    6: "a stop token that is never learned",
    7: "killed while saving",
    8: "damaged checkpoints",
    9: "a full disk",
    10: "signals",
    11: "resumes",
    12: "resumes that would be another run",
    13: "losses that are no number, or leap",
    14: "out of memory",
    15: "a run directory in use",
    16: "pickled weights",
    17: "code that comes with a model",
    18: "hostile templates",
    20: "secrets",
}

Proof = dict[str, Any]
passed: list[Proof] = []
wrong: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", choices=["write", "check"], help="write or check docs/reliability.md")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    mark = item.get_closest_marker("reliability")
    if mark is not None and report.when == "call":
        name = getattr(item, "originalname", item.name)
        report.user_properties.append(("proof", {"test": f"{item.location[0]}::{name}", **mark.kwargs}))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.outcome == "failed":
        wrong.append(report.nodeid)
    found = dict(report.user_properties)
    if report.when == "call" and report.passed and "proof" in found:
        passed.append({**found["proof"], "counted": found.get("trials")})


def pytest_sessionfinish(session: pytest.Session) -> None:
    wanted = session.config.getoption("--reliability", None)
    if wanted is None or wrong or hasattr(session.config, "workerinput"):
        return
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    made = f"{before}{BEGIN}\n\n{table(passed)}\n\n{END}{rest.partition(END)[2]}"
    if wanted == "write":
        PAGE.write_text(made, encoding="utf-8")
    elif made != page:
        print(f"\n{PAGE.name} is not what this run has shown: run pytest --reliability=write")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def table(proofs: list[Proof]) -> str:
    """The rows of the page: one for each marked test, its parameters counted as trials unless it says how many."""
    tests: dict[str, list[Proof]] = {}
    for proof in proofs:
        tests.setdefault(proof["test"], []).append(proof)
    lines = ["| | fault | what was done | what happened | trials | test |", "|---|---|---|---|---|---|"]
    for name, group in sorted(tests.items(), key=lambda pair: (pair[1][0]["case"], pair[0])):
        first = group[0]
        counted = [proof["counted"] for proof in group if proof["counted"] is not None]
        trials = sum(counted) if counted else first["trials"] or len(group)
        place, _, test = name.partition("::")
        cells = [
            str(first["case"]),
            FAULTS[first["case"]],
            first["done"],
            first["happened"],
            f"{trials:,}",
            f"`{test}`, {place}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
