"""The CUDA kernels on the CPU, by the executor of cuda_executor/: any schedule, the same bits.

The tests of the CPU's kernels run through them too: SELECTION, under several schedules.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import executor as ex
import pytest
import torch
from cases import DTYPES, signal
from torch import Tensor

TESTS = Path(__file__).parent

#: In order, reversed and at random; few blocks at a time and many.
RUNS = [
    *((schedule, 0, resident) for schedule in ("in order", "reversed") for resident in (1, 8)),
    *(("random", seed, resident) for seed, resident in enumerate((1, 2, 3, 8, 64, 2, 3, 8, 64, 1))),
]

#: Shapes and dims that between them go to every kernel, on a device of 4 multiprocessors.
SHAPES = {
    "teams of 8": ((65, 21), 1),
    "teams of 32": ((19, 301), 1),
    "a block a row": ((9, 1500), 1),
    "a row over blocks": ((2, 4501), 1),
    "channels last": ((2, 300, 20), 1),
    "channels last, long": ((2, 3001, 3), 1),
}


@pytest.fixture(scope="module")
def loaded() -> ex.Executor:
    return ex.load_operators()


@pytest.fixture(autouse=True)
def _defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "loaded" in request.fixturenames:
        request.getfixturevalue("loaded").set()


def forward(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    return torch.ops.ema_ext_executor.ema_with_state(x, 1e-4, None, dim, False)


def backward(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """The gradients to x, to an alpha per row (which needs no sum), and to the state."""
    shape = [1 if d == dim else n for d, n in enumerate(x.shape)]
    alpha = torch.full(shape, 1e-4, dtype=torch.float64)
    return torch.ops.ema_ext_executor.ema_backward.Tensor(
        x.flip(dim), None, x, alpha, None, dim, False
    )


def varying(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """A linear recurrence with coefficients near 1, forward and backward."""
    a = (1 - 1e-4 * signal(*x.shape, seed=3).abs()).to(x.dtype)
    y, state = torch.ops.ema_ext_executor.linear_recurrence_with_state(a, x, None, dim, False)
    return (
        y,
        state,
        *torch.ops.ema_ext_executor.linear_recurrence_backward(
            x.flip(dim), None, a, y, None, dim, False
        ),
    )


WORK: dict[str, Callable[[Tensor, int], tuple[Tensor, ...]]] = {
    "forward": forward,
    "backward": backward,
    "varying": varying,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("work", WORK)
def test_the_same_bits_under_every_schedule(
    loaded: ex.Executor, work: str, shape: str, dtype: torch.dtype
) -> None:
    """Catches a fold of what happens to be ready, and all that the executor's checks are for."""
    size, dim = SHAPES[shape]
    x = signal(*size, dtype=dtype)
    expected = None
    for schedule, seed, resident in RUNS:
        loaded.set(schedule, seed, resident)
        results = [result.view(torch.uint8) for result in WORK[work](x, dim)]
        expected = expected or results
        assert all(map(torch.equal, results, expected)), (schedule, seed, resident)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_sample_is_moved_once(loaded: ex.Executor, shape: str, dtype: torch.dtype) -> None:
    """2N forward and 3N backward: catches a sample read again, by a tail or by another block."""
    size, dim = SHAPES[shape]
    x = signal(*size, dtype=dtype)
    bytes_of_x = x.numel() * x.element_size()
    read = ex.Count(bytes_of_x, 1, 1, 0, 0, bytes_of_x, 0)
    written = ex.Count(bytes_of_x, 0, 0, 1, 1, 0, bytes_of_x)
    loaded.set("random", 1, 3)
    forward(x, dim)
    counts = loaded.counts()
    assert (counts["x"], counts["y"]) == (read, written)
    backward(x, dim)
    counts = loaded.counts()
    assert (counts["x"], counts["forward_x"], counts["y"]) == (read, read, written)
    if dtype == torch.float32:
        counts = {name: count for name, count in counts.items() if name.startswith("workspace")}
        assert sum(c.bytes_written for c in counts.values()) < bytes_of_x / 10


#: Values against the oracle: forward and backward, dtypes, layouts, every edge of a tile, states,
#: non-finite samples, weights per step.
SELECTION = [
    "test_ema.py",
    "test_state.py",
    "test_strides.py",
    "test_nonfinite.py",
    "test_range.py",
]

#: What is left out, and why.
DESELECTED = {
    "test_ema.py::test_more_rows_than_a_16_bit_count": "millions of fibers",
}


@pytest.mark.parametrize(
    "run",
    [
        "schedule=in_order checks=False",
        "schedule=reversed resident=2",
        "schedule=random seed=1 resident=3",
    ],
)
def test_selection(run: str) -> None:
    """Catches whatever the tests of the CPU's kernels catch, in those for CUDA."""
    ex.needed_headers()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SELECTION]
    for name in DESELECTED:
        command += ["--deselect", name]
    done = subprocess.run(
        command,
        cwd=TESTS,
        env={**os.environ, "EMA_EXT_BACKEND": "executor", "EMA_EXT_EXECUTOR": run},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "like"),
    [
        ((300, 40), (40,)),
        ((40, 300), (40, 1)),
        ((2, 9001), (2, 1)),
        ((9001, 2), (2,)),
        ((2, 5, 7, 3), (5, 1, 3)),
        ((33, 7, 41), (7, 1)),
        ((3, 0), (3, 1)),
        ((2,) * 12, (1, 2) * 6),
    ],
)
def test_sums_have_the_same_bits_whatever_the_strides(
    loaded: ex.Executor, shape: tuple[int, ...], like: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Catches terms that are left out, and an order that follows from strides or the schedule."""
    terms, result = signal(*shape, dtype=dtype), torch.empty(like, dtype=dtype)
    want = terms.double().sum_to_size(like)
    expected = None
    for schedule, seed, resident in RUNS[:6]:
        loaded.set(schedule, seed, resident)
        axes = torch.randperm(terms.dim(), generator=torch.Generator().manual_seed(seed))
        moved = terms.permute(*axes).contiguous().permute(*axes.argsort())
        found = torch.ops.ema_ext_executor.sum_to(moved, result)
        expected = found if expected is None else expected
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    size = terms.double().abs().sum_to_size(like)
    bound = torch.finfo(dtype).eps * (want.abs() / 2 + torch.finfo(dtype).tiny) + 1e-13 * size
    assert ((expected.double() - want).abs() <= bound).all()
