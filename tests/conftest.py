"""Prints, after a run, how near the worst error came to the bound that the tests hold it to."""

from __future__ import annotations

import bounds
import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not bounds.WORST:
        return
    terminalreporter.section("worst error / bound")
    width = max(map(len, bounds.WORST))
    for label, ratio in sorted(bounds.WORST.items()):
        terminalreporter.write_line(f"{label:<{width}}  {ratio:.3f}")
