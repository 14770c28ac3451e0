"""tools/gpu.py takes every step and hides no failure: with commands that only pretend to run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))

import gpu  # noqa: E402

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="one"/>
<testcase classname="tests.test_a" name="two">{}</testcase>
<testcase classname="tests.test_a" name="three"><skipped/></testcase>
</testsuite></testsuites>"""

Pretend = Callable[..., dict[str, Any]]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pretend:
    """Runs the program where commands with one of these words fail, and gives its JSON."""

    def go(*broken: str, arguments: Sequence[str] = ()) -> dict[str, Any]:
        def run(command: Sequence[str], **_: Any) -> Any:
            fails = any(word in " ".join(command) for word in broken)
            planted = any(code in command for code in gpu.PLANTED.values())
            for word in command:
                if word.startswith("--junitxml="):
                    inner = "<failure/>" if fails else ""
                    Path(word.partition("=")[2]).write_text(REPORT.format(inner))
                if word.endswith("bench.json"):
                    Path(word).write_text('{"times": []}')
            caught = gpu.CAUGHT if planted and not fails else int(fails)
            return SimpleNamespace(returncode=caught, stdout="out", stderr="")

        monkeypatch.setattr(gpu.subprocess, "run", run)
        monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
        monkeypatch.setattr(gpu, "machine", lambda: {"GPUs": ["none"]})
        path = tmp_path / "gpu.json"
        with pytest.raises(SystemExit) as end:
            gpu.main(["--json", str(path), *arguments])
        result: dict[str, Any] = json.loads(path.read_text())
        assert end.value.code == (0 if result["ok"] else 1)
        return result

    return go


def test_everything_in_one_file(pretend: Pretend) -> None:
    """Catches a step that is not taken, or that leaves no trace."""
    result = pretend()
    assert result["ok"]
    steps = result["steps"]
    assert {"tests/test_cuda.py", "suite on the GPU", "bench", *gpu.SANITIZERS} <= set(steps)
    assert {f"{name} catches what is planted" for name in gpu.PLANTED} <= set(steps)
    suite = steps["suite on the GPU"]
    assert (suite["tests"], suite["skipped"], suite["failed"]) == (3, 1, [])
    assert suite["variables"] == {"EMA_EXT_BACKEND": "cuda"}
    assert steps["bench"]["figures"] == {"times": []}


@pytest.mark.parametrize(
    ("broken", "step"),
    [
        ("tests/test_smoke.py", "suite on the GPU"),
        ("--tool racecheck", "racecheck"),
        ("Beyond", "memcheck catches what is planted"),
        ("torch.empty", "initcheck catches what is planted"),
        ("bench.py", "bench"),
    ],
)
def test_failures_show(pretend: Pretend, broken: str, step: str) -> None:
    """Catches a failure that ends in success, and a sanitizer that sees nothing taken for a clean
    one."""
    result = pretend(broken)
    assert not result["ok"]
    assert [name for name, taken in result["steps"].items() if not taken["ok"]] == [step]
    if "tests" in result["steps"][step]:
        assert result["steps"][step]["failed"] == ["tests.test_a::two"]


def test_missing_sanitizer_is_a_failure(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a step that is left out in silence."""
    taken = pretend(arguments=["--steps", "tests"])
    assert taken["ok"]
    assert len(taken["steps"]) == 2
    monkeypatch.setattr(gpu.shutil, "which", lambda _: None)
    assert not next(gpu.sanitizer(quick=False))[1]["ok"]


def test_named_files_are_there() -> None:
    """Catches a test file that was renamed: pytest would fail on the GPU only."""
    assert [name for name in (*gpu.SUITE, gpu.SANITIZED[0]) if not (ROOT / name).exists()] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says is not so here")
def test_no_gpu_is_one_sentence() -> None:
    """Catches a traceback, or a run of the CPU's tests, where there is no GPU."""
    command = [sys.executable, str(ROOT / "tools" / "gpu.py")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "torch sees no CUDA device on this machine\n"
