"""Every instruction set level that this machine has, forced: each other one in its own process.

The levels round alike only within the bounds, so each is held to the oracle and not to another.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import _ema_ext

TESTS = Path(__file__).parent

#: What GCC's x86-64-v3 and -v4 need and the kernels use, as /proc/cpuinfo names it.
NEEDED = {
    "x86-64": set(),
    "x86-64-v3": {"avx2", "fma", "f16c", "bmi2"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}

#: Forward and backward, dtypes, layouts, every alpha at the edges of tiles, non-finite samples.
SELECTION = [
    "test_accuracy.py::test_every_alpha_in_every_layout",
    "test_accuracy.py::test_every_alpha_at_every_edge",
    "test_accuracy.py::test_gradients_at_every_edge",
    "test_accuracy.py::test_tail_after_a_large_start",
    "test_accuracy.py::test_gradient_to_alpha[1000-walk-torch.float32-in place]",
    "test_ema.py::test_every_dim",
    "test_laws.py",
    "test_ema.py::test_first_sample_is_copied",
    "test_ema.py::test_alpha_one_is_the_identity_and_alpha_zero_holds",
    "test_long_rows.py::test_cut_rows_for_any_number_of_threads[False-3-torch.float32]",
    "test_long_rows.py::test_cut_rows_for_any_number_of_threads[True-1-torch.bfloat16]",
    "test_long_rows.py::test_streamed_outputs[1-torch.float32]",
    "test_long_rows.py::test_streamed_outputs[1-torch.float64]",
    "test_short_rows.py::test_every_length[torch.float32-47]",
    "test_short_rows.py::test_every_length[torch.float64-9]",
    "test_short_rows.py::test_every_length[torch.bfloat16-33]",
    "test_long_rows.py::test_bad_sample_at_the_edge_of_a_segment[2-inf-torch.float32]",
    "test_nonfinite.py::test_strided_rows",
    "test_range.py",
    "test_nonfinite.py::test_opposite_infinities_meet",
    "test_strides.py::test_layouts",
]


def has(level: str) -> bool:
    """By the kernel's list of the CPU's features, not by the package's own detection."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return NEEDED[level] <= set(next(line for line in lines if line.startswith("flags")).split())


@pytest.mark.parametrize("level", NEEDED)
def test_level(level: str) -> None:
    """Catches a kernel that is wrong, or crashes, only with vectors of another length."""
    if level == _ema_ext.cpu_level():
        return  # this very process: the whole suite runs at it
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SELECTION]
    command += ["-k", "not 5.0 and not 10000.0"]  # one mean is enough here
    if not has(level):
        command = [sys.executable, "-c", "import ema_ext"]
    result = subprocess.run(
        command,
        cwd=TESTS,
        env={**os.environ, "EMA_EXT_CPU_LEVEL": level, "EMA_EXT_PROFILE": "few"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if has(level):
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    else:
        assert result.returncode == 1
        assert f"ImportError: EMA_EXT_CPU_LEVEL is {level}" in result.stderr, result.stderr
