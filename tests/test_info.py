"""`python -m ema_ext.info` and the record it reads say what is true of this build."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache

import pytest
import torch

import _ema_ext
from ema_ext import info
from ema_ext._version import __version__

LEVELS = ["x86-64", "x86-64-v3", "x86-64-v4"]


def import_at_level(level: str) -> subprocess.CompletedProcess[str]:
    command = "import torch, _ema_ext; print(_ema_ext.cpu_level())"
    return subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "EMA_EXT_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_names_the_versions_that_run() -> None:
    """Catches a report that shows what was built against in place of what runs."""
    described = info.describe()
    assert described["ema_ext"] == __version__ == _ema_ext.build_info()["version"]
    assert described["torch"].startswith(torch.__version__)
    assert described["threads"] == str(torch.get_num_threads())
    assert described["CPU level"] in LEVELS


def test_prints_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a line that is computed and not printed, and an empty one."""
    info.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(info.describe())
    assert all(re.fullmatch(r"[\w ]+: +\S.*", line) for line in lines)


def test_cuda_is_explained() -> None:
    """Catches a build that forgets why it has CUDA kernels or none, or for which architectures."""
    built = _ema_ext.build_info()
    assert built["cuda_reason"]
    assert built["cuda"] == bool(built["cuda_archs"]) == bool(built["nvcc"])
    assert built["cuda_reason"] in info.describe()["CUDA architectures"]


def test_probe_kernel_runs_on_every_device() -> None:
    """Catches kernels for other architectures than those present, and a probe that needs a driver:
    without one it finds no device and does not fail."""
    if not _ema_ext.build_info()["cuda"]:
        assert _ema_ext.cuda_probe() == -1
    elif torch.version.cuda:
        assert _ema_ext.cuda_probe() == torch.cuda.device_count()
    else:
        assert _ema_ext.cuda_probe() >= 0


@cache
def highest_level() -> str:
    return import_at_level("").stdout.strip()


@pytest.mark.parametrize("level", LEVELS)
def test_level_is_forced_or_refused(level: str) -> None:
    """Catches a forced level that is ignored, and one that the CPU lacks let through to SIGILL."""
    result = import_at_level(level)
    if LEVELS.index(level) <= LEVELS.index(highest_level()):
        assert result.stdout.strip() == level
    else:
        assert result.returncode == 1
        assert re.search(f"ImportError: .*{level}.*reaches only", result.stderr)


def test_unknown_level_is_refused() -> None:
    """Catches a misspelt level that silently runs another one."""
    result = import_at_level("avx2")
    assert result.returncode == 1
    assert re.search("ImportError: .*x86-64-v3.*avx2", result.stderr)
