"""Short rows, which the CPU's kernels bring side by side: every number of rows and every length.

Edges: a block is 32 rows, a vector 2 to 16, a transposed block 2 or 4 samples, a group of steps 4,
a stretch of time 64, and from 192 samples on rows go by tiles again.
"""

from __future__ import annotations

from typing import Any

import backends
import bounds
import pytest
import torch
from cases import DTYPES, assert_same, signal
from torch import Tensor

from ema_ext import ema

ROWS = (8, 9, 15, 31, 32, 33, 47, 70)
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 31, 33, 63, 64, 65, 66, 67, 68, 127, 190, 191, 192)
PER_ROW = torch.logspace(-3, 0, 70, dtype=torch.float64)[:, None]


def gradients(y: Tensor, grad_y: Tensor, *inputs: Any) -> list[Tensor | None]:
    wanted = [t for t in inputs if isinstance(t, Tensor)]
    found = iter(torch.autograd.grad(y, wanted, grad_y))
    return [next(found) if isinstance(t, Tensor) else None for t in inputs]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length(dtype: torch.dtype, rows: int) -> None:
    """Catches a sample, a row or a step that the last block or the last group leaves out, forward
    and backward, for one alpha and for one per row. All positive: in rows of few samples a state
    could cancel, and its own rounding would then be large beside y."""
    for length in LENGTHS:
        x = signal(rows, length, dtype=dtype).abs().requires_grad_()
        grad_y = signal(rows, length, dtype=dtype, seed=1)
        s = signal(rows, seed=2).abs().requires_grad_()
        for alpha in (0.03, PER_ROW[:rows].clone().requires_grad_()):
            for state, reverse in ((None, False), (s, True)):
                y = ema(x, alpha, initial_state=state, reverse=reverse)
                options = {"initial_state": state, "reverse": reverse, "label": "short rows"}
                bounds.check_forward(y, x, alpha, **options)
                found = gradients(y, grad_y, x, alpha, state)
                bounds.check_backward(found, grad_y, x, alpha, **options)


@pytest.mark.skipif(
    backends.cuda_kernels, reason="whose tiles follow from shape and addresses: docs/cuda.md"
)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 30, 67, 191])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone(dtype: torch.dtype, length: int) -> None:
    """Catches a row whose bits follow from those beside it, ill-behaved coefficients included."""
    alpha = torch.tensor([0.3, 1.5, 1.0, 1 - 2.0**-40, -0.1, 0.0, 2.5, 1e-5], dtype=torch.float64)
    x = signal(8, length, dtype=dtype).requires_grad_()
    grad_y = signal(8, length, dtype=dtype, seed=1)
    for reverse in (False, True):
        y, state = ema(x, alpha[:, None], reverse=reverse, return_state=True)
        (grad_x,) = torch.autograd.grad(y, x, grad_y)
        for i in range(8):
            row = x[i].detach().clone().requires_grad_()
            alone, handed_on = ema(row, alpha[i], reverse=reverse, return_state=True)
            (grad_row,) = torch.autograd.grad(alone, row, grad_y[i])
            assert_same((alone, handed_on, grad_row), (y[i], state[i], grad_x[i]))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_beside_a_strange_one(dtype: torch.dtype, value: float) -> None:
    """Catches a lane that reaches its neighbours, and a power that forgets an infinity."""
    for alpha in (0.1, 1.0, 0.0, 1 - 2.0**-20):
        for position in (0, 1, 5, 66):
            x = signal(40, 67, dtype=dtype)
            expected = ema(x, alpha)
            x[7, position] = value
            loop = x[7].double().clone()
            for n in range(1, len(loop)):
                loop[n] = (1 - alpha) * loop[n - 1] + alpha * loop[n]
            y = ema(x, alpha)
            assert_same(y[7].isnan(), loop.isnan())
            assert_same(y[7].isinf(), loop.isinf())
            rest = [row for row in range(40) if row != 7]
            assert_same(y[rest], expected[rest])
            assert_same(y[7, :position], expected[7, :position])
