"""The CUDA kernels on the CPU, by the executor of cuda_executor/: any schedule, the same bits.

The tests of the CPU's kernels run through them too: SELECTION, under several schedules.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import bounds
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

#: Shapes and dims that between them go to every kernel, on a device of 4 multiprocessors, and the
#: kernel. Time comes in units of 16 bytes; one sample more makes every row end in a tail.
SHAPES = {
    "teams of 8": ((65, 7), -1, r"RowTiles<.*, 8, "),
    "teams of 32": ((9, 150), -1, r"RowTiles<.*, 32, "),
    "a block a row": ((9, 600), -1, r"RowTiles<.*, 256, "),
    "a row over blocks": ((1, 9400), -1, r"SplitRows<"),  # the last tile takes several warps
    "channels last": ((2, 25, 37), 1, r"Lanes<"),
    "channels last, over blocks": ((1, 400, 32), 1, r"Lanes<"),
}


def samples(shape: str, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Samples of this shape, and the dim of time."""
    size, dim, _ = SHAPES[shape]
    length = size[dim] * 16 // dtype.itemsize + 1
    return signal(
        *(length if n == dim % len(size) else s for n, s in enumerate(size)), dtype=dtype
    ), dim % len(size)


@pytest.fixture(scope="module")
def loaded() -> ex.Executor:
    return ex.load_operators()


@pytest.fixture(autouse=True)
def _defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "loaded" in request.fixturenames:
        request.getfixturevalue("loaded").set()
        request.getfixturevalue("loaded").plant()


def forward(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    return torch.ops.ema_ext_executor.ema_with_state(x, 1e-4, None, dim, False)


def backward(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """The gradients to x, to an alpha per row (which needs no sum), and to the state."""
    shape = [1 if d == dim else n for d, n in enumerate(x.shape)]
    alpha = torch.full(shape, 1e-4, dtype=torch.float64)
    return torch.ops.ema_ext_executor.ema_backward.Tensor(
        x.flip(dim), None, x, alpha, None, dim, False
    )


def coefficients(x: Tensor) -> Tensor:
    """Per sample, near 0."""
    return (1e-4 * signal(*x.shape, seed=3).abs()).to(x.dtype)


def recurrence_forward(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    a = 1 - coefficients(x)
    return torch.ops.ema_ext_executor.linear_recurrence_with_state(a, x, None, dim, False)


def recurrence_backward(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    a = 1 - coefficients(x)
    return torch.ops.ema_ext_executor.linear_recurrence_backward(
        x.flip(dim), None, a, x, None, dim, False
    )


def average_forward(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    alpha = coefficients(x)
    return torch.ops.ema_ext_executor.ema_with_state.Tensor(x, alpha, None, dim, False)


def average_backward(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    alpha, y = coefficients(x), x.sin()
    return torch.ops.ema_ext_executor.ema_backward.Varying(
        x.flip(dim), None, x, alpha, y, None, dim, False
    )


def varying(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """A coefficient per sample, which keeps nearly all of the past; and rows of whole chunks."""
    results: tuple[Tensor, ...] = ()
    for b in (x, x.narrow(dim, 0, x.shape[dim] - 1).contiguous()):
        for work in (recurrence_forward, recurrence_backward, average_forward, average_backward):
            results += work(b, dim)
    return results


def sums(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Over each axis, and over all of them."""
    likes = [x.sum(dim, keepdim=True), x.sum(-1, keepdim=True), x.sum(0), x.sum()]
    return tuple(torch.ops.ema_ext_executor.sum_to(x, like) for like in likes)


WORK: dict[str, Callable[[Tensor, int], tuple[Tensor, ...]]] = {
    "forward": forward,
    "backward": backward,
    "sums": sums,
    "varying": varying,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("work", WORK)
def test_the_same_bits_under_every_schedule(
    loaded: ex.Executor, work: str, shape: str, dtype: torch.dtype
) -> None:
    """Catches a fold of what happens to be ready, and all that the executor's checks are for."""
    x, dim = samples(shape, dtype)
    expected = None
    for schedule, seed, resident in RUNS if dtype == torch.float32 else RUNS[::4]:
        loaded.set(schedule, seed, resident)
        results = [result.reshape(-1).view(torch.uint8) for result in WORK[work](x, dim)]
        expected = expected or results
        assert all(map(torch.equal, results, expected)), (schedule, seed, resident)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_sample_is_moved_once(loaded: ex.Executor, shape: str, dtype: torch.dtype) -> None:
    """2N forward and 3N backward: catches a sample read again, by a tail or by another block.

    But an average without an initial state looks at each row's first sample beforehand.
    """
    x, dim = samples(shape, dtype)
    bytes_of_x = x.numel() * x.element_size()
    read = ex.Count(bytes_of_x, 1, 1, 0, 0, bytes_of_x, 0)
    written = ex.Count(bytes_of_x, 0, 0, 1, 1, 0, bytes_of_x)
    loaded.set("random", 1, 3)
    forward(x, dim)
    assert any(re.search(SHAPES[shape][2], kernel) for kernel in loaded.kernels())
    counts = loaded.counts()
    looked_at = replace(read, most_read=2, bytes_read=bytes_of_x + bytes_of_x // x.shape[dim])
    assert (counts["x"], counts["y"]) == (looked_at, written)
    backward(x, dim)
    counts = loaded.counts()
    assert (counts["x"], counts["forward_x"], counts["y"]) == (read, read, written)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_from_tile_to_tile(loaded: ex.Executor, shape: str, dtype: torch.dtype) -> None:
    """Catches what is wrong only between tiles, warps or blocks: tests of the CPU's kernels have
    few rows so long, and those that they have it cuts elsewhere."""
    x, dim = samples(shape, dtype)
    grad_y, start = signal(*x.shape, dtype=dtype, seed=1), signal(*x.select(dim, 0).shape, seed=2)
    loaded.set(checks=False)
    for weight, reverse in ((0.3, False), (1e-4, True)):
        shape_of_alpha = [1 if d == dim else n for d, n in enumerate(x.shape)]
        alpha = torch.full(shape_of_alpha, weight, dtype=torch.float64)
        options = {"dim": dim, "initial_state": start, "reverse": reverse}
        arguments = alpha, start, dim, reverse
        y, _ = torch.ops.ema_ext_executor.ema_with_state.Tensor(x, *arguments)
        assert any(re.search(SHAPES[shape][2], kernel) for kernel in loaded.kernels())
        bounds.check_forward(y, x, alpha, **options)
        gradients = torch.ops.ema_ext_executor.ema_backward.Tensor(grad_y, None, x, *arguments)
        bounds.check_backward(gradients, grad_y, x, alpha, **options)


@pytest.mark.parametrize("stride", [2**30 - 8, 2**30], ids=["near enough", "too far"])
def test_samples_that_are_far_apart(loaded: ex.Executor, stride: int) -> None:
    """Catches strides that do not fit the 32 bits in which rows side by side have them."""
    values = signal(2, 32, dtype=torch.float16)
    x = torch.empty(stride + 32, dtype=torch.float16).as_strided((2, 32), (stride, 1))
    x.copy_(values)
    loaded.set(checks=False)  # whose memory of what was touched would be as large
    y, _ = torch.ops.ema_ext_executor.ema_with_state(x, 0.5, None, 0, False)
    aligned = "true" if stride * x.itemsize < 2**31 else "false"
    assert any(f"Lanes<ema_ext::cuda::Float16, {aligned}" in name for name in loaded.kernels())
    assert torch.equal(y, torch.ops.ema_ext.ema(values, 0.5, None, 0, False))


@pytest.mark.parametrize("alpha", [1e-4, 1 - 2**-40], ids=["a tile less", "none"])
def test_a_split_row_may_have_fewer_tiles(loaded: ex.Executor, alpha: float) -> None:
    """Catches a block that stays at a tile without samples: of a row that begins between two
    boundaries of 16 bytes, or that is walked."""
    x = signal(2, 5 * 8192 + 5)
    loaded.set("random", 1, 3)
    y, _ = torch.ops.ema_ext_executor.ema_with_state(x, alpha, None, 1, False)
    assert any("SplitRows<" in kernel for kernel in loaded.kernels())
    expected, _ = torch.ops.ema_ext.ema_with_state(x.double(), alpha, None, 1, False)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["odd", "whole chunks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_sample_of_a_varying_scan_is_moved_once(
    loaded: ex.Executor, shape: str, whole: bool, dtype: torch.dtype
) -> None:
    """3N forward; backward 5N of a recurrence and 6N of an average: each tensor once.

    But the gradient to a coefficient takes the y before each sample. Of each row's last y nothing
    is needed, and sample by sample nothing is read; by chunks, a stretch of lanes takes the first y
    of the stretch behind it, which that reads as well.
    """
    x, dim = samples(shape, dtype)
    length = x.shape[dim] - whole
    x = x.narrow(dim, 0, length).contiguous()
    rows, size, bytes_of_x = x.numel() // length, x.element_size(), x.numel() * x.element_size()
    read = ex.Count(bytes_of_x, 1, 1, 0, 0, bytes_of_x, 0)
    written = ex.Count(bytes_of_x, 0, 0, 1, 1, 0, bytes_of_x)
    chunks = whole and dim == x.dim() - 1
    kernel = ("AlignedRows<" if chunks else "AnyRows<") if dim == x.dim() - 1 else "Columns<"
    loaded.set("random", 1, 3)
    for forward in (recurrence_forward, average_forward):
        forward(x, dim)
        counts = loaded.counts()
        assert (counts["coefficient"], counts["x"], counts["y"]) == (read, read, written)
        assert all(kernel in name for name in loaded.kernels())
    again = 0
    if chunks:
        lanes, items = 8 if "of 8" in shape else 32, 64 // size
        again = (length - 1) // (lanes * items)  # per row
    next_y = replace(
        read,
        least_read=1 if chunks else 0,
        most_read=2 if again else 1,
        bytes_read=bytes_of_x + rows * size * (again if chunks else -1),
    )
    for backward, inputs in (
        (recurrence_backward, ("x", "coefficient")),
        (average_backward, ("x", "coefficient", "forward_x")),
    ):
        backward(x, dim)
        counts = loaded.counts()
        assert [counts[name] for name in inputs] == [read] * len(inputs)
        assert counts["forward_y"] == next_y
        assert (counts["y"], counts["grad_coefficient"]) == (written, written)
        assert all(kernel in name for name in loaded.kernels())


@pytest.mark.parametrize("length", [600_000, 600_001], ids=["73 tiles", "293 tiles"])
def test_tiles_of_a_varying_row(loaded: ex.Executor, length: int) -> None:
    """Catches a tile, group or batch of tiles that a fold forgets or counts twice: sums of small
    integers, which are exact.
    """
    loaded.set("random", 1, 3, checks=False)
    b = torch.randint(-1, 2, (2, length), generator=torch.Generator().manual_seed(1))
    y, state = torch.ops.ema_ext_executor.linear_recurrence_with_state(
        torch.ones(b.shape), b.float(), None, 1, False
    )
    assert torch.equal(y, b.cumsum(1).float())
    assert torch.equal(state, y[:, -1])


def sites() -> list[tuple[str, int]]:
    """The lines of the kernels on which threads wait for others, or take a ticket."""
    return [
        (path.name, number)
        for path in sorted((ex.ROOT / "csrc" / "cuda").glob("*.cuh"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"__syncthreads\(|__syncwarp\(|__threadfence\(|atomicAdd\(", line)
    ]


@pytest.mark.parametrize("site", sites(), ids=lambda site: f"{site[0]}:{site[1]}")
def test_no_barrier_can_be_left_out(loaded: ex.Executor, site: tuple[str, int]) -> None:
    """Catches checks too weak for these kernels: each barrier, fence and ticket is missed."""
    loaded.plant(*site)
    noticed = "race: |uninitialised: |livelock: |timeout: |never written"
    with pytest.raises(RuntimeError, match=noticed):  # noqa: PT012 - by the first that meets it
        for schedule, seed, resident in (("random", 2, 2), ("random", 1, 3), ("reversed", 0, 2)):
            loaded.set(schedule, seed, resident, seconds=20)
            for work in WORK.values():
                for shape in SHAPES:
                    work(*samples(shape, torch.float32))
            backward(signal(1, 70_000), 1)  # tiles whose sums several warps join
            for work in (forward, varying):
                work(signal(7, 40_965), 1)  # from row to row, some of a tile less


#: Values against the oracle: forward and backward, dtypes, layouts, every edge of a tile, states,
#: non-finite samples, weights per step; what takes seconds here, not minutes.
SELECTION = [
    "test_accuracy.py::test_gradients_at_every_edge",
    "test_accuracy.py::test_tail_after_a_large_start",
    "test_ema.py",
    "test_gradients.py",
    "test_laws.py",
    "test_linear_recurrence.py::test_lengths",
    "test_linear_recurrence.py::test_layouts",
    "test_linear_recurrence.py::test_what_is_not_finite_as_in_the_loop",
    "test_nonfinite.py",
    "test_range.py",
    "test_state.py",
    "test_strides.py",
    "test_time_varying.py::test_every_broadcast",
    "test_time_varying.py::test_lengths",
    "test_time_varying.py::test_layouts",
]

#: Of those, with every access checked too: what takes seconds.
CHECKED = [
    "test_ema.py",
    "test_linear_recurrence.py::test_layouts",
    "test_nonfinite.py",
    "test_state.py",
    "test_strides.py",
    "test_time_varying.py::test_every_broadcast",
]

#: What is left out, and why.
DESELECTED = {
    "test_ema.py::test_more_rows_than_a_16_bit_count": "millions of fibers",
    "test_laws.py::test_any_number_of_threads": "those of the CPU, on long rows",
}


@pytest.mark.parametrize(
    ("run", "selection"),
    [
        ("schedule=in_order checks=False", SELECTION),
        ("schedule=reversed resident=2", CHECKED),
        ("schedule=random seed=1 resident=3 multiprocessors=1", CHECKED),
    ],
    ids=["in order", "reversed", "random"],
)
def test_selection(run: str, selection: list[str]) -> None:
    """Catches whatever the tests of the CPU's kernels catch, in those for CUDA."""
    ex.needed_headers()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [str(TESTS / name) for name in selection]
    for name in DESELECTED:
        command += ["--deselect", f"tests/{name}"]
    done = subprocess.run(
        command,
        cwd=ex.ROOT,
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
    # once for each term here and once in what is wanted, then the store
    count = 2 * terms.numel() // max(1, result.numel())
    error = count * bounds.unit(torch.float64) * terms.double().abs().sum_to_size(like)
    limit = bounds._stored(want.numpy(), error.numpy(), dtype)
    bounds.assert_within(expected, want, limit, "sums")
