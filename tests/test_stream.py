"""examples/stream.py: bounded memory, and a run that was killed goes on to the same bits."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ema_ext

SCRIPT = Path(__file__).parent.parent / "examples" / "stream.py"
ALPHA = 1e-4
MIB = 2**20

pytest.importorskip("tqdm", reason="the example's own dependency")


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def run(*arguments: object) -> str:
    """Standard output and error."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 MiB of samples."""
    path = tmp_path_factory.mktemp("stream") / "series.f32"
    run("--make", 24 * MIB / 1e6, path)
    assert path.stat().st_size == 96 * MIB
    return path


def in_one_go(series: Path) -> np.ndarray:
    return ema_ext.ema(torch.from_numpy(np.fromfile(series, np.float32)), ALPHA).numpy()


def test_memory_is_bounded_and_the_result_that_of_one_go(series: Path, tmp_path: Path) -> None:
    """Catches a file that is read as a whole, pages that stay mapped, and a state that is lost."""
    target = tmp_path / "smooth.f32"
    said = run(series, target, "--alpha", ALPHA, "--memory", 16)
    peak, before = (int(text) for text in re.findall(r"(\d+) (?:MiB, of|were)", said))
    # 16 and what torch and numpy bring in at their first call; series and average are 192
    assert peak - before < 16 + 48
    y, whole = np.fromfile(target, np.float32), in_one_go(series)
    # a state handed on is rounded to float32 once a chunk, and chunks are longer than 1 / alpha
    assert np.abs(y - whole).max() <= 4 * np.spacing(np.abs(whole).max())
    assert "24.0M/25.2M" in said or "100%" in said
    assert not target.with_name("smooth.f32.progress").exists()


def test_killed_runs_go_on_to_the_same_bits(series: Path, tmp_path: Path) -> None:
    """Catches progress that is written before the samples, or not at all, or half."""
    target, straight = tmp_path / "smooth.f32", tmp_path / "straight.f32"
    progress = target.with_name("smooth.f32.progress")
    arguments = (series, target, "--alpha", ALPHA, "--memory", 16)
    for _ in range(2):
        before = progress.read_text() if progress.exists() else ""
        process = subprocess.Popen(command(*arguments, "--pause", 0.3), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not progress.exists() or progress.read_text() == before:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert re.search(r"went on at sample [1-9]", run(*arguments))
    run(series, straight, *arguments[2:])
    assert target.read_bytes() == straight.read_bytes()


def test_progress_of_another_task(series: Path, tmp_path: Path) -> None:
    """Catches the rest of a series smoothed with another alpha than its beginning."""
    target = tmp_path / "smooth.f32"
    target.with_name("smooth.f32.progress").write_text('{"alpha": 0.5, "position": 8, "state": 1}')
    done = subprocess.run(
        command(series, target), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "remove it to begin anew" in done.stderr
