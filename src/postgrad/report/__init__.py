"""Run directory → one self-contained ``report.html``."""

from __future__ import annotations

from postgrad.report.page import write_report

__all__ = ["write_report"]
