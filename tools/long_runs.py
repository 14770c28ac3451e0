"""Runs too long for the tests, each with a figure: memory over training steps, and large shapes.

    python tools/long_runs.py            # all of RUNS
    python tools/long_runs.py training

Every run ends in an assertion against the bounds of tests/bounds.py or prints what it measured.
"""

from __future__ import annotations

import gc
import resource
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import bounds  # noqa: E402

from ema_ext import ema, linear_recurrence  # noqa: E402

MIB = 1 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def training(steps: int = 10_000) -> str:
    """Training steps that learn alpha and a state, at lengths that change: no growth of memory."""
    weight = torch.full((16, 1), -2.0, requires_grad=True)
    state = torch.zeros(16, requires_grad=True)
    optimizer = torch.optim.Adam([weight, state])
    generator = torch.Generator().manual_seed(0)
    start = 0
    for step in range(steps):
        if step == steps // 10:  # allocators have seen every size by then
            gc.collect()
            start = resident()
        x = torch.randn(8, 16, 200 + step % 50, generator=generator)
        y, last = ema(x, weight.sigmoid(), initial_state=state, return_state=True)
        loss = (y.square().mean() + last.square().mean()) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gc.collect()
    growth = resident() - start
    assert growth < MIB * steps // 10_000 + MIB, f"{growth} bytes more than at the first tenth"
    return f"{steps} steps, {growth / MIB:+.2f} MiB after the first tenth"


def long_row(length: int = 100_000_000) -> str:
    """One row, forward and backward. Its ends are held to the oracle, through a state."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(length, generator=generator).add_(1).requires_grad_()
    alpha, end = 1e-3, 40_000  # (1 - alpha)**end is below a rounding of float32
    y = ema(x, alpha)
    (grad,) = torch.autograd.grad(y, x, torch.ones(()).expand(length))
    bounds.check_forward(y[:end], x[:end], alpha, label="long row")
    start = y[-end].double()  # an error in it has decayed before the samples that are looked at
    tail = x.detach()[1 - end :]
    allowed = bounds.pointwise_bound(tail, alpha, initial_state=start)[-1000:]
    due = bounds.oracle.ema(tail, alpha, initial_state=start)[-1000:]
    bounds.assert_within(y[-1000:], due, allowed, "long row")
    weight = grad[1:].double().sum() + grad[0].double()
    assert abs(weight - length) <= length * bounds.KERNEL.base * bounds.unit(torch.float32)
    return f"{length} samples, sum of the gradient {weight.item():.0f}"


def many_rows(rows: int = 10_000_000) -> str:
    """Rows of length 3, forward and backward, some held to the oracle and all to each other."""
    pattern = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    x = pattern.repeat(rows // 1000, 1).requires_grad_()
    y = ema(x, 0.3)
    (grad,) = torch.autograd.grad(y, x, torch.ones(()).expand(y.shape))
    bounds.check_forward(y[:1000], pattern, 0.3, label="many rows")
    for result in (y, grad):
        blocks = result.detach().view(-1, 1000, 3)
        assert all(torch.equal(block, blocks[0]) for block in blocks)
    return f"{rows} rows, the same bits wherever a row stands"


def beyond_32_bits(rows: int = 2_200_000, length: int = 1000) -> str:
    """More elements than 32 bits count, of one row that is expanded: all must be that row's, and
    the gradient the sum of as many.
    """
    b = torch.ones(length, dtype=torch.bfloat16, requires_grad=True)
    a = torch.full((rows, 1), 0.5)
    y = linear_recurrence(a, b)
    first = y[:1].detach()
    bounds.check_recurrence(first, 0.5, b.detach()[None], label="expanded row")
    assert all(torch.equal(part, first.expand(part.shape)) for part in y.detach().split(10_000))
    (grad,) = torch.autograd.grad(y, b, torch.ones((), dtype=y.dtype).expand(y.shape))
    (one,) = torch.autograd.grad(linear_recurrence(0.5, b[None]), b, torch.ones_like(first))
    assert torch.equal(grad, (rows * one.double()).to(grad.dtype))
    return f"{y.numel()} elements of one row of {length}"


RUNS = {run.__name__: run for run in (training, long_row, many_rows, beyond_32_bits)}


def main() -> None:
    for name in sys.argv[1:] or RUNS:
        start = time.monotonic()
        figure = RUNS[name]()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = time.monotonic() - start
        print(f"{name}: {figure}; {seconds:.0f} s, peak {peak / MIB:.0f} MiB so far", flush=True)
    for label, ratio in sorted(bounds.WORST.items()):
        print(f"{label:<24} worst error / bound {ratio:.3f}")


if __name__ == "__main__":
    main()
