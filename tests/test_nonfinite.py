"""NaN and infinity go strictly forward in time, in their own row, exactly as in the for-loop."""

from __future__ import annotations

import math

import bounds
import pytest
import torch
from cases import DTYPES, signal

from ema_ext import ema

# numpy's, where a bound is taken of an infinity
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "where"), [(9, 0), (40, 3), (1000, 5), (1000, 999), (5000, 70)])
def test_one_bad_sample(length: int, where: int, dtype: torch.dtype, bad: float) -> None:
    """Catches inf - inf = NaN in a difference, 0 * inf at an underflown weight, a forgotten NaN."""
    clean = signal(3, length, dtype=dtype)
    x = clean.clone()
    x[1, where] = bad
    for alpha in (0.001, 0.5, torch.tensor([[0.2], [0.5], [0.9]])):
        y, undisturbed = ema(x, alpha), ema(clean, alpha)
        bounds.check_forward(y, x, alpha, label="non-finite")
        assert torch.equal(y[1, :where], undisturbed[1, :where])
        assert torch.equal(y[[0, 2]], undisturbed[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opposite_infinities_meet(dtype: torch.dtype) -> None:
    """Catches an infinity that survives the opposite one: the loop gives NaN from there on."""
    x = signal(2, 300, dtype=dtype)
    x[0, 20], x[0, 150] = math.inf, -math.inf
    bounds.check_forward(ema(x, 0.3), x, 0.3, label="non-finite")
    bounds.check_forward(ema(x, 0.3, reverse=True), x, 0.3, reverse=True, label="non-finite")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_strided_rows(dtype: torch.dtype, bad: float) -> None:
    """Catches a bad sample that spreads over the neighbours of its own vector."""
    clean = signal(100, 37, dtype=dtype)
    x = clean.clone()
    x[40, 5] = bad
    y = ema(x, 0.3, dim=0)
    bounds.check_forward(y, x, 0.3, dim=0, label="non-finite")
    kept = torch.arange(37) != 5
    assert torch.equal(y[:, kept], ema(clean, 0.3, dim=0)[:, kept])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_zero_weight_times_a_bad_sample(alpha: float, bad: float) -> None:
    """Catches a shortcut for alpha 0 or 1: in the loop 0 * inf is NaN, so nothing is forgotten."""
    x = signal(2, 50, dtype=torch.float32)
    x[0, 10] = bad
    for weight in (alpha, torch.tensor(alpha)):
        bounds.check_forward(ema(x, weight), x, weight, label="non-finite")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_initial_state(bad: float) -> None:
    """Catches a state that is looked at only where the samples are bad."""
    x, s = signal(2, 50, dtype=torch.float32), torch.tensor([bad, 1.0])
    bounds.check_forward(ema(x, 0.3, initial_state=s), x, 0.3, initial_state=s, label="non-finite")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_of_any_payload(dtype: torch.dtype) -> None:
    """Catches a NaN that rounding to a half makes a number: the carry of 0x7fffffff is a sign."""
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, -0x400000], dtype=torch.int32)
    x = signal(len(bits), 100, dtype=dtype)
    for alpha in (0.3, 0.9999):
        assert bool(ema(x, alpha, initial_state=bits.view(torch.float32)).isnan().all())


def test_no_overflow_inside() -> None:
    """Catches a difference or a sum of x that overflows though every output is finite."""
    huge = torch.finfo(torch.float32).max
    x = torch.full((2, 100), huge)
    x[1, ::2] = -huge
    bounds.check_forward(ema(x, 0.5), x, 0.5, label="huge")
