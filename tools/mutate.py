"""Mutation testing of csrc: which small mistakes would the tests not notice?

    python tools/mutate.py --sample 60 --seed 0          # random mutants, spread over the files
    python tools/mutate.py --only csrc/cpu/tile.h        # all mutants of one file

Each mutant is one flipped operator, off-by-one, negated condition or dropped statement in a copy of
the checkout. It is compiled for this CPU's instruction set level alone, and then a short run of
tools/fuzz.py and the quick tests look for it; of which the compiler makes the same code, that is no
mistake. Survivors are printed as they stand in the source.
Needs what an editable install needs: ninja, pybind11 and setuptools beside torch; ccache helps.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

#: What looks for a mutant, in this order until one finds it. A run past its limit, in seconds of
#: the CPU, counts as found: many a mutant never ends.
TESTS = (
    (60, "tools/fuzz.py --seconds 10"),
    (
        600,
        "-m pytest -q -x -p no:cacheprovider tests/test_laws.py tests/test_linear_recurrence.py"
        " tests/test_time_varying.py",
    ),
    (
        400,
        "-m pytest -q -x -p no:cacheprovider tests/test_hostile.py tests/test_errors.py"
        " tests/test_state.py tests/test_nonfinite.py tests/test_range.py tests/test_long_rows.py"
        " tests/test_determinism.py tests/test_ema.py tests/test_strides.py tests/test_memory.py"
        " tests/test_info.py tests/test_short_rows.py",
    ),
    (400, "-m pytest -q -x -p no:cacheprovider tests/test_accuracy.py tests/test_gradients.py"),
)

#: A process that neither ends nor computes, a deadlock, is given up after so many times its limit.
WAITING = 10

#: Of the build: compiling is most of the work.
FLAGS = "-O1"

#: Pattern, replacement. Binary operators stand between spaces, as clang-format leaves them.
FLIPS = (
    (r" < ", " <= "),
    (r" <= ", " < "),
    (r"(?<!Direction) > ", " >= "),  # a Direction is 1 or -1
    (r" >= ", " > "),
    (r" == ", " != "),
    (r" != ", " == "),
    (r" && ", " || "),
    (r" \|\| ", " && "),
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " + "),
    (r" / ", " * "),
    (r" % ", " / "),
    (r" \+= ", " -= "),
    (r" \*= ", " += "),
    (r"\btrue\b", "false"),
    (r"\bfalse\b", "true"),
    (r"\b(?<![\w.])0(?![\w.])", "1"),
    (r"\b(?<![\w.])1(?![\w.])", "2"),
    (r"\bif \((?!constexpr)(.*)\) ", r"if (!(\1)) "),
)

#: A whole statement on one line that neither declares nor returns.
STATEMENT = re.compile(r"^\s+(?:if \(.*\) )?[\w>.:\[\]()*-]+(?: [-+*/|]?= .*|\(.*\)|\+\+);$")

#: Lines that are no code, or whose mutants are checked by the compiler or by nobody.
NO_CODE = re.compile(r"^\s*(//|#|template|static_assert|namespace|using|STD_TORCH_CHECK|m\.)")


@dataclass(frozen=True)
class Mutant:
    """One changed line."""

    path: str
    line: int  # from 1
    before: str
    after: str

    def __str__(self) -> str:
        after = self.after.strip() or "(dropped)"
        return f"{self.path}:{self.line}: {self.before.strip()}\n    -> {after}"

    def apply(self, root: Path) -> None:
        lines = (ROOT / self.path).read_text().splitlines(keepends=True)
        lines[self.line - 1] = self.after + "\n"
        (root / self.path).write_text("".join(lines))


def mutants(path: str) -> Iterator[Mutant]:
    """All mutants of a file, in order."""
    for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
        if NO_CODE.match(line):
            continue
        code = line.partition("//")[0].rstrip()
        for pattern, replacement in FLIPS:
            for match in re.finditer(pattern, code):
                after = code[: match.start()] + match.expand(replacement) + code[match.end() :]
                yield Mutant(path, number, line, after)
        if STATEMENT.match(code):
            yield Mutant(path, number, line, "")


def run(command: list[str], root: Path, limit: int) -> tuple[bool, str]:
    """Whether the command succeeds in the copy in time, and what it printed."""
    # setup.py decides on the CUDA kernels, which no test here runs
    environment = {**os.environ, "EMA_EXT_CUDA": "0", "CXXFLAGS": FLAGS, "EMA_EXT_PROFILE": "first"}
    environment |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=WAITING * limit,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),
        )
    except subprocess.TimeoutExpired:
        return False, f"longer than {WAITING * limit} s"
    return done.returncode == 0, done.stdout + done.stderr


class Build:
    """A copy of the checkout, and its library, of which only what a mutant needs is compiled."""

    def __init__(self, root: Path) -> None:
        self.root = root
        kept_out = shutil.ignore_patterns(".git", "build", "*.so", "*.egg-info", ".*cache", "*.pyc")
        shutil.copytree(ROOT, root, ignore=kept_out, dirs_exist_ok=True)
        self._must([sys.executable, "setup.py", "build_ext", "--inplace"], 1200)
        self.library = next(root.glob("_ema_ext.*.so"))
        self.ninja = next(root.glob("build/temp*/build.ninja")).parent
        objects = sorted(self.root.glob("build/temp*/csrc/**/*.o"))
        level = self._must(
            [sys.executable, "-c", "import torch, _ema_ext; print(_ema_ext.cpu_level())"], 600
        )
        this = level.strip().replace("-", "_")
        self.wanted = [
            str(path) for path in objects if path.parent.name != "levels" or path.stem == this
        ]
        self.objects = [str(path) for path in objects]
        self.original = self.code()

    def code(self) -> list[bytes]:
        """A hash of each compiled unit."""
        return [hashlib.sha256(Path(path).read_bytes()).digest() for path in self.wanted]

    def _must(self, command: list[str], limit: int) -> str:
        succeeded, output = run(command, self.root, limit)
        if not succeeded:
            sys.exit(output)
        return output

    def compile(self) -> bool:
        """Brings the library up to date; the other levels' units stay as they were."""
        succeeded, _ = run(["ninja", "-C", str(self.ninja), *self.wanted], self.root, 600)
        if succeeded:
            self.library.unlink()
            torch_libraries = str(Path(torch.__file__).parent / "lib")
            link = ["g++", "-shared", *self.objects, "-L" + torch_libraries, "-ltorch_cpu"]
            link += ["-o", str(self.library)]
            succeeded, _ = run(link, self.root, 120)
        return succeeded

    def fate(self, mutant: Mutant) -> str:
        """What becomes of it; the copy is as before."""
        mutant.apply(self.root)
        try:
            if not self.compile():
                return "does not compile"
            if self.code() == self.original:
                return "same code"
            found = self.found_by()
            return "survived" if found is None else f"killed by {found}"
        finally:
            shutil.copy(ROOT / mutant.path, self.root / mutant.path)

    def found_by(self) -> str | None:
        """The test that fails, as it was called; None: none does."""
        for limit, test in TESTS:
            succeeded, output = run([sys.executable, *test.split()], self.root, limit)
            if not succeeded:
                failed = re.search(r"^FAILED (\S+)", output, re.MULTILINE)
                return failed[1] if failed else test.split()[0]
        return None


def choose(paths: list[str], sample: int | None, seed: int) -> list[Mutant]:
    """All mutants; or `sample` of them, as many of one file as of another."""
    by_file = {path: list(mutants(path)) for path in paths}
    if sample is None:
        return [mutant for group in by_file.values() for mutant in group]
    choice = random.Random(seed)
    groups = [choice.sample(group, len(group)) for group in by_file.values()]
    chosen: list[Mutant] = []
    while len(chosen) < sample and any(groups):
        chosen += [group.pop() for group in groups if group]
    return chosen[:sample]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="files of csrc; default: those of the CPU")
    arguments = parser.parse_args()
    files = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cpu/*")]
    paths = arguments.only or sorted(
        str(path.relative_to(ROOT)) for path in files if path.suffix in (".h", ".cpp")
    )
    chosen = choose(paths, arguments.sample, arguments.seed)
    counts: Counter[str] = Counter()
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        build = Build(Path(folder))
        if (broken := build.found_by()) is not None:
            sys.exit(f"{broken} fails without a mutant")
        for i, mutant in enumerate(chosen, 1):
            start = time.monotonic()
            fate = build.fate(mutant)
            counts[fate.partition(" by ")[0]] += 1
            survivors += [mutant] * (fate == "survived")
            seconds = time.monotonic() - start
            print(f"[{i}/{len(chosen)}] {fate} ({seconds:.0f} s): {mutant}", flush=True)
    print(", ".join(f"{count} {fate}" for fate, count in counts.items()))
    for mutant in survivors:
        print(f"survived: {mutant}")


if __name__ == "__main__":
    main()
