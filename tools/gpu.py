"""Everything that a machine with a GPU can tell of the CUDA kernels, in one JSON file.

    pip install '.[test,bench]' && python tools/gpu.py --json gpu.json

* tests: the suite with its tensors on the GPU, and tests/test_cuda.py;
* sanitizer: some tests under compute-sanitizer (memcheck, racecheck, synccheck, initcheck), after
  it has caught a stray read and an unset input, each by one of our kernels: a check that cannot
  fail proves nothing;
* bench: benchmarks/bench.py --device cuda.

`--quick` takes minutes, all of it under an hour. Ends with 1 if anything failed; a step that this
machine cannot take is left out by naming the others (`--steps tests bench`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]

#: What holds on every backend: values and gradients, dtypes, layouts, edges of tiles, states.
SUITE = [
    "tests/test_smoke.py",
    "tests/test_ema.py",
    "tests/test_state.py",
    "tests/test_strides.py",
    "tests/test_nonfinite.py",
    "tests/test_range.py",
    "tests/test_gradients.py",
    "tests/test_linear_recurrence.py",
    "tests/test_time_varying.py",
]
#: A sanitizer slows kernels a hundredfold: every kernel once, and every layout.
SANITIZED = ["tests/test_cuda.py", "-k", "(test_values and float32) or test_layouts"]
SANITIZERS = ["memcheck", "racecheck", "synccheck", "initcheck"]
CAUGHT = 86  # the exit status of a sanitizer that found something

#: The sanitizer -> what it must catch: a tensor that claims more memory than it has, and one that
#: nobody filled.
PLANTED = {
    "memcheck": """
import torch, ema_ext
class Beyond:
    own = torch.zeros(1000, device="cuda")
    __cuda_array_interface__ = {
        "shape": (1 << 20,), "typestr": "<f4", "data": (own.data_ptr(), False), "version": 2
    }
ema_ext.ema(torch.as_tensor(Beyond(), device="cuda"), 0.5)
torch.cuda.synchronize()
""",
    "initcheck": """
import torch, ema_ext
ema_ext.ema(torch.empty(100_000, device="cuda"), 0.5)
torch.cuda.synchronize()
""",
}

Step = dict[str, Any]


def run(command: Sequence[str], **variables: str) -> Step:
    """What a command printed at its end, how it ended, and how long it took."""
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )
    return {
        "command": list(command),
        "variables": variables,
        "seconds": round(time.perf_counter() - began, 1),
        "status": done.returncode,
        "ok": done.returncode == 0,
        "tail": (done.stdout + done.stderr)[-4000:],
    }


def run_tests(arguments: Sequence[str], before: Sequence[str] = (), **variables: str) -> Step:
    """The same for pytest, with how many tests there were and which failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        step = run([*before, *PYTEST, f"--junitxml={report}", *arguments], **variables)
        step["ok"] = step["ok"] and report.exists()
        if report.exists():
            cases = list(ElementTree.parse(report).iter("testcase"))
            outcome = {
                kind: [
                    f"{c.get('classname')}::{c.get('name')}" for c in cases if list(c.iter(kind))
                ]
                for kind in ("failure", "error", "skipped")
            }
            step |= {"tests": len(cases), "skipped": len(outcome["skipped"])}
            step["failed"] = outcome["failure"] + outcome["error"]
    return step


def tests(quick: bool) -> Iterator[tuple[str, Step]]:
    yield "tests/test_cuda.py", run_tests(["tests/test_cuda.py"])
    suite = SUITE[:3] if quick else SUITE
    yield "suite on the GPU", run_tests(suite, EMA_EXT_BACKEND="cuda")


def sanitizer(quick: bool) -> Iterator[tuple[str, Step]]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield "compute-sanitizer", {"ok": False, "tail": "it is not on the PATH"}
        return
    for name in SANITIZERS[:2] if quick else SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", str(CAUGHT)]
        command += ["--target-processes", "all", "--kernel-regex", "kns=ema_ext"]
        each_its_own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else all lies in one allocation
        if name in PLANTED:
            step = run([*command, sys.executable, "-c", PLANTED[name]], **each_its_own)
            step["ok"] = step["status"] == CAUGHT
            yield f"{name} catches what is planted", step
        yield name, run_tests(SANITIZED, command, **each_its_own)


def bench(quick: bool) -> Iterator[tuple[str, Step]]:
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "bench.json"
        command = [sys.executable, "benchmarks/bench.py", "--device", "cuda"]
        command += ["--json", str(figures), "--plot", str(Path(folder) / "bench.png")]
        step = run([*command, *["--quick"] * quick])
        if step["ok"]:
            step["figures"] = json.loads(figures.read_text())
        yield "bench", step


STEPS: dict[str, Callable[[bool], Iterator[tuple[str, Step]]]] = {
    "tests": tests,
    "sanitizer": sanitizer,
    "bench": bench,
}


def machine() -> dict[str, Any]:
    """The GPUs, and what `python -m ema_ext.info` tells. Ends the program where there are none."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device on this machine")
    from ema_ext import info

    described: dict[str, Any] = dict(info.describe())
    described["GPUs"] = [
        torch.cuda.get_device_properties(i).name for i in range(torch.cuda.device_count())
    ]
    return described


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--quick", action="store_true", help="some minutes")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {"machine": machine(), "ok": True, "steps": {}}
    for name in options.steps:
        for title, step in STEPS[name](options.quick):
            result["steps"][title] = step
            result["ok"] = result["ok"] and step["ok"]
            options.json.write_text(json.dumps(result, indent=1) + "\n")  # so far
            counts = (
                f", {step['tests']} tests, {step['skipped']} skipped" if "tests" in step else ""
            )
            print(f"{title}: {'ok' if step['ok'] else 'FAILED'}{counts}", flush=True)
            if not step["ok"]:
                print(step["tail"], file=sys.stderr)
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
