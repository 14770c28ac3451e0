"""The executor that runs CUDA kernels on the CPU: what it computes, and that each check can fail.

The kernels are those of cuda_executor/examples.cpp; the project's own are in test_cuda_kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bounds
import executor as ex
import numpy as np
import oracle
import pytest
import torch

TESTS = Path(__file__).parent

#: In order, reversed and at random; few blocks at a time and many.
RUNS = [
    *((schedule, 0, resident) for schedule in ("in order", "reversed") for resident in (1, 8)),
    *(("random", seed, resident) for seed, resident in enumerate((1, 2, 3, 8, 64, 2, 3, 8, 64, 8))),
]
RANDOM = [run for run in RUNS if run[0] == "random"]
TILE = 128


@pytest.fixture(scope="module")
def library() -> ex.Executor:
    return ex.Executor(ex.build_examples(ex.needed_headers()))


@pytest.fixture(autouse=True)
def _defaults(library: ex.Executor) -> Iterator[None]:
    yield
    library.set()


def pointer(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def noise(n: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(n).astype(np.float32)


def scan(
    library: ex.Executor,
    x: np.ndarray[Any, Any],
    fault: str = "none",
    two_words: bool = True,
    c: float = 0.9999,
) -> np.ndarray[Any, Any]:
    """y, or RuntimeError with what the executor said. y lies far from x, for what reads beyond."""
    room = np.empty(len(x) + 4096, dtype=np.float32)
    y = room[-len(x) :]
    apart = np.concatenate([x, room])[: len(x)]
    n, number = ctypes.c_int64(len(x)), ex.FAULTS.index(fault)
    if not library.library.example_scan(
        number, ctypes.c_bool(two_words), pointer(apart), pointer(y), n, ctypes.c_float(c)
    ):
        raise RuntimeError(library.error())
    return y


#: Once: two in each of five doublings over a warp, of three warps before and of what a warp and a
#: tile bring in. A power is a product of as many factors; the carry is rounded with every tile.
ROUNDINGS = bounds.Roundings(base=20, per_step=2)


@pytest.mark.parametrize("two_words", [False, True])
def test_values_and_bits_under_every_schedule(library: ex.Executor, two_words: bool) -> None:
    """Catches a lost carry (c is near 1), and an executor that finds fault with what is right."""
    x = noise(10 * TILE + 17)
    call = float(np.float32(0.9999)), torch.from_numpy(x)
    expected, results = oracle.linear_recurrence(*call), set()
    limit = bounds.recurrence_bound(*call, roundings=ROUNDINGS)
    for schedule, seed, resident in RUNS:
        for checks in (True, False):
            library.set(schedule, seed, resident, checks)
            y = scan(library, x, two_words=two_words)
            bounds.assert_within(torch.from_numpy(y), expected, limit, "example")
            results.add(hashlib.sha256(y.tobytes()).digest())
    assert len(results) == 1


def test_schedules(library: ex.Executor) -> None:
    """Catches seeds that change nothing, and runs that cannot be repeated."""
    x, traces = noise(5 * TILE), {}
    for _ in range(2):
        for schedule, seed, resident in RUNS:
            library.set(schedule, seed, resident)
            scan(library, x)
            assert traces.setdefault((schedule, seed, resident), library.trace()) == library.trace()
    assert len(set(traces.values())) == len(traces)


def test_both_kinds_of_fibers(library: ex.Executor) -> None:
    """Catches a fallback that is never compiled: glibc's ucontext takes the same turns."""
    other = ex.Executor(ex.build_examples(ex.needed_headers(), boost=False))
    x, traces = noise(5 * TILE), []
    for one in (library, other):
        one.set("random", 3, 3)
        scan(one, x)
        traces.append(one.trace())
    assert traces[0] == traces[1]


#: What the executor says of each fault. Which of two it is depends on who comes first.
SAID = {
    "no barrier": "race: .* at shared memory|uninitialised: .* at shared memory",
    "no barrier after": "race: .* at shared memory",
    "no release": "race: read of 4 bytes at values",
    "flag first": "race: .* at values|uninitialised: read of 4 bytes at values",
    "block order": "livelock: .* waits for a message at examples.cpp",
    "garbage lanes": "names lanes that have returned|returns while its warp waits|divergent",
    "out of bounds": r"out of bounds: read of 4 bytes at x \+ \d+ bytes, which has \d+",
    "uninitialised": "uninitialised: read of 4 bytes at shared memory",
    "divergent barrier": "divergent barrier|uninitialised|race: read of 4 bytes at shared memory",
    "two barriers": "divergent barrier: others wait at examples.cpp:.* and this one",
    "deadlock": "deadlock: .*waits for its warp at examples.cpp",
    "misaligned": "misaligned: an address that is no multiple of 8 at examples.cpp",
    "skips a sample": r"y \+ 20 bytes was never written",
    "writes its input": "write to an input: write of 4 bytes at x",
}


@pytest.mark.parametrize("fault", SAID)
def test_faults_are_caught(library: ex.Executor, fault: str) -> None:
    """Catches a check that lets through what it is for, under any random schedule."""
    x, said = noise(10 * TILE + 17), set()
    for schedule, seed, resident in RANDOM:
        if fault == "block order" and resident > 3:
            continue  # so many run at a time that nobody need wait for one that cannot start
        library.set(schedule, seed, resident)
        with pytest.raises(RuntimeError, match=SAID[fault]) as error:
            scan(library, x, fault)
        said.add("race: " in str(error.value))
    if fault.startswith("no ") or fault == "flag first":
        assert True in said


@pytest.mark.parametrize("fault", ["no release", "flag first"])
def test_values_alone_do_not_show_them(library: ex.Executor, fault: str) -> None:
    """Why accesses are checked at all: in order, without checks, these give the right numbers."""
    x = noise(10 * TILE)
    library.set("in order", checks=False)
    assert np.array_equal(scan(library, x, fault), scan(library, x))


def test_forgotten_infinity(library: ex.Executor) -> None:
    """Catches a comparison that drops NaN and infinity: the fault shows in values alone."""
    x = noise(4 * TILE)
    x[3] = np.inf
    assert np.isposinf(scan(library, x, c=0.5)[3:]).all()
    assert np.isfinite(scan(library, x, "forgets infinity", c=0.5)[2 * TILE :]).all()


def test_order_of_arrival(library: ex.Executor) -> None:
    """Catches hashes that agree whatever happens: sums in order of arrival have many results."""
    x, results = noise(10 * TILE), set()
    for schedule, seed, resident in RUNS:
        library.set(schedule, seed, resident)
        results.add(scan(library, x, "arrival order").tobytes())
    assert len(results) > 3


def test_loop_without_memory() -> None:
    """Catches a kernel that never comes back and never reaches the executor: a message ends it."""
    code = (
        "import executor as ex, test_executor as t\n"
        "library = ex.Executor(ex.build_examples(ex.needed_headers()))\n"
        "library.set(seconds=0.5)\n"
        "t.scan(library, t.noise(100), 'spins')"
    )
    ex.needed_headers()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ex.ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, "loops without touching memory" in done.stderr) == (3, True)


def test_timeout(library: ex.Executor) -> None:
    """Catches a launch that goes on for ever though somebody always makes progress."""
    library.set(seconds=0.01)
    with pytest.raises(RuntimeError, match="timeout: "):
        scan(library, noise(1000 * TILE))


def test_counts(library: ex.Executor) -> None:
    """Catches a count that misses accesses or takes one for two."""
    library.set("random", 1, 3)
    scan(library, noise(1000))
    once = library.counts()
    assert once["x"] == ex.Count(4000, 1, 1, 0, 0, 4000, 0)
    assert once["y"] == ex.Count(4000, 0, 0, 1, 1, 0, 4000)
    assert once["values"] == ex.Count(32, 0, 1, 1, 1, 28, 32)


EXCHANGES = ("index", "up", "down", "xor", "ballot", "any", "all")


def source(kind: str, lane: int, operand: int, width: int) -> int:
    """The lane whose value a lane gets, by the CUDA C++ guide."""
    begin = lane // width * width
    if kind == "index":
        return begin + (operand + lane) % width
    if kind == "up":
        return lane - operand if lane - operand >= begin else lane
    if kind == "down":
        return lane + operand if lane + operand < begin + width else lane
    return lane ^ operand if lane ^ operand < begin + width else lane


@pytest.mark.parametrize("schedule", ex.SCHEDULES)
@pytest.mark.parametrize("kind", EXCHANGES)
def test_shuffles_and_votes(library: ex.Executor, kind: str, schedule: str) -> None:
    """Catches lanes that get another's value, over every width and distance."""
    library.set(schedule, 5)
    for values in (np.arange(32) - 15.5, np.arange(32) + 0.5, -np.ones(32)):
        for width in (1, 2, 4, 8, 16, 32):
            for operand in (0, 1, 2, 3, 5, 15, 16, 31):
                got = np.empty(32)
                code = EXCHANGES.index(kind)
                assert library.library.example_exchange(
                    code, operand, width, pointer(values), pointer(got)
                ), library.error()
                votes = values > 0
                expected = {
                    "ballot": sum(int(vote) << lane for lane, vote in enumerate(votes)),
                    "any": votes.any(),
                    "all": votes.all(),
                }.get(kind, [values[source(kind, lane, operand, width)] for lane in range(32)])
                assert np.array_equal(got, np.broadcast_to(expected, 32).astype(float))


@pytest.mark.parametrize("width", [0, 3, 33])
def test_bad_width(library: ex.Executor, width: int) -> None:
    """Catches a width that a GPU would make something undefined of."""
    assert not library.library.example_exchange(
        1, 1, width, pointer(np.zeros(32)), pointer(np.zeros(32))
    )
    assert "the width of a shuffle must be a power of two" in library.error()


@pytest.mark.parametrize(("schedule", "seed", "resident"), RUNS)
def test_last_block(library: ex.Executor, schedule: str, seed: int, resident: int) -> None:
    """Catches an order among blocks that the executor does not see, or makes up without fences."""
    library.set(schedule, seed, resident)
    x, y = np.arange(20 * 64, dtype=np.float32), np.zeros(1, dtype=np.float32)
    run = library.library.example_last_block
    assert run(pointer(x), pointer(y), ctypes.c_int64(20), ctypes.c_bool(True)), library.error()
    assert y[0] == x.sum()
    assert not run(pointer(x), pointer(y), ctypes.c_int64(20), ctypes.c_bool(False))
    assert "race: read of 4 bytes at partials" in library.error()
