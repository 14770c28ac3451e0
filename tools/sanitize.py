"""The tests under AddressSanitizer and UndefinedBehaviorSanitizer.

    python tools/sanitize.py                       # the tests of TESTS
    python tools/sanitize.py tests/test_long_rows.py

The extension is built with both in a copy of the checkout. torch itself is not instrumented, but
its allocations are intercepted, so that tensors stand between red zones. Before the tests run, each
sanitizer must catch a mistake planted in the copy: a job that cannot fail proves nothing. Needs
what an editable install needs: ninja, pybind11 and setuptools beside torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import STDOUT

ROOT = Path(__file__).resolve().parent.parent

#: Every test that runs kernels, the longest first, but for those in which a sanitizer would see
#: nothing new or something else: test_accuracy (the edges of the others at twenty alphas, minutes
#: of oracle; a part of it runs in test_levels), test_memory (red zones are memory too),
#: test_compile (inductor's own code), test_distributed and test_stream (the same operators in
#: processes of their own), what the build, the documents, the benchmarks and the reference in
#: Python are held to, and CUDA.
TESTS = [
    "tests/test_levels.py",
    "tests/test_long_rows.py",
    "tests/test_gradients.py",
    "tests/test_time_varying.py",
    "tests/test_determinism.py",
    "tests/test_fuzz.py",
    "tests/test_hostile.py",
    "tests/test_linear_recurrence.py",
    "tests/test_four_witnesses.py",
    "tests/test_laws.py",
    "tests/test_transforms.py",
    "tests/test_state.py",
    "tests/test_ema.py",
    "tests/test_nn.py",
    "tests/test_strides.py",
    "tests/test_short_rows.py",
    "tests/test_nonfinite.py",
    "tests/test_range.py",
    "tests/test_errors.py",
    "tests/test_smoke.py",
]

#: -fno-wrapv because Python's own flags define signed overflow, and it would not be looked for.
FLAGS = "-O1 -g1 -fno-wrapv -fno-omit-frame-pointer -fsanitize=address,undefined"
FLAGS += " -fno-sanitize-recover=all"
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so.6")

#: What is planted at the head of make_plan, and what is then said of it.
PLACE = ("csrc/cpu/strategy.cpp", "Plan make_plan(Problem& problem, int threads) {\n")
PLANTED = {
    "heap-buffer-overflow": "static_cast<volatile char*>(problem.y.data)"
    "[problem.rows * problem.length * bytes_of(problem.y.dtype)] = 0;\n",
    "signed integer overflow": "volatile int64_t most = problem.rows << 40; most = most * most;\n",
}
PROBE = "import torch, ema_ext; ema_ext.ema(torch.zeros(3, 1000), 0.1)"


def sanitized() -> dict[str, str]:
    """The environment of a process that loads the copy's library."""
    paths = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in LIBRARIES
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "EMA_EXT_PROFILE": "few",  # the calls of the fuzzer, which are among the tests, are many
    }


def build(root: Path) -> None:
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=root,
        env={**os.environ, "CXXFLAGS": FLAGS, "EMA_EXT_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    if run.returncode != 0:
        sys.exit(run.stdout + run.stderr)


def check_that_it_can_fail(root: Path, environment: dict[str, str]) -> None:
    """Ends the run where a planted mistake is not caught at its line; leaves the copy clean."""
    name, place = PLACE
    source = (root / name).read_text()
    assert source.count(place) == 1, f"{name} has no single place for a planted mistake"
    for says, mistake in PLANTED.items():
        (root / name).write_text(source.replace(place, place + mistake))
        build(root)
        run = subprocess.run(
            [sys.executable, "-c", PROBE], cwd=root, env=environment, capture_output=True, text=True
        )
        if run.returncode == 0 or says not in run.stderr or Path(name).name not in run.stderr:
            sys.exit(f"a planted {says} was not caught:\n{run.stderr[-4000:]}")
        print(f"caught what was planted in {name}: {says}", flush=True)
    (root / name).write_text(source)
    build(root)


def run_tests(tests: list[str], root: Path, environment: dict[str, str]) -> bool:
    """Whether all pass: a process for each core, up to four, each with its share of them."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    count = min(os.cpu_count() or 1, 4, len(tests))
    shares = [tests[i::count] for i in range(count)]
    logs = [root / f"share{i}.log" for i in range(count)]
    running = [
        subprocess.Popen(
            [*command, *share], cwd=root, env=environment, stdout=log.open("w"), stderr=STDOUT
        )
        for share, log in zip(shares, logs, strict=True)
    ]
    codes = [process.wait() for process in running]
    for log in logs:
        print(log.read_text(), flush=True)
    return not any(codes)


def main() -> None:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    ignored = shutil.ignore_patterns(".git", "build", "*.so", "*.egg-info", ".*cache", "*.pyc")
    with tempfile.TemporaryDirectory(prefix="sanitized-") as folder:
        root = Path(folder)
        shutil.copytree(ROOT, root, ignore=ignored, dirs_exist_ok=True)
        environment = {**sanitized(), "PYTHONPATH": folder}
        check_that_it_can_fail(root, environment)
        succeeded = run_tests(sys.argv[1:] or TESTS, root, environment)
    sys.exit(0 if succeeded else 1)


if __name__ == "__main__":
    main()
