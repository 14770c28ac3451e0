"""Hypothesis' profiles, the backend under test, and how near the worst error came to its bound.

EMA_EXT_PROFILE=long searches at random and for long; otherwise the examples are always the same.
=few takes a third of them, where each costs more or the same kernels have seen all; =first stops at
the first that fails, without looking for a smaller one.
EMA_EXT_BACKEND=executor runs every test through the CUDA kernels, on the CPU: executor.py, and
EMA_EXT_EXECUTOR="schedule=random seed=3 resident=8" says how; =cuda runs them on a GPU.
"""

from __future__ import annotations

import os

import backends
import bounds
import pytest
from hypothesis import HealthCheck, Phase, settings

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("ci", derandomize=True, max_examples=60, database=None, **COMMON)
settings.register_profile("few", settings.get_profile("ci"), max_examples=20)
settings.register_profile(
    "first", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate)
)
settings.register_profile("long", max_examples=2000, **COMMON)
settings.load_profile(os.environ.get("EMA_EXT_PROFILE", "ci"))

backends.choose(os.environ.get("EMA_EXT_BACKEND", "cpu"))
bounds.cuda_kernels = backends.cuda_kernels


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not bounds.WORST:
        return
    terminalreporter.section(f"worst error / bound, {backends.described()}")
    width = max(map(len, bounds.WORST))
    for label, ratio in sorted(bounds.WORST.items()):
        terminalreporter.write_line(f"{label:<{width}}  {ratio:.3f}")
