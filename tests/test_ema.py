"""Values of ema over dtypes, lengths, dims and forms of alpha, and its exact special cases."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import backends
import bounds
import numpy as np
import pytest
import torch
from cases import DTYPES, LENGTHS, signal

from ema_ext import ema

ALPHAS = (1e-5, 0.01, 1 / 3, 0.999, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length(length: int, reverse: bool, dtype: torch.dtype) -> None:
    """Catches a wrong tail, a lost carry between tiles (alpha near 0), a wrong first sample."""
    x = 1 + signal(3, length, dtype=dtype)
    for alpha in (1e-4, 0.3):
        y = ema(x, alpha, reverse=reverse)
        assert y.dtype == dtype
        bounds.check_forward(y, x, alpha, reverse=reverse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_every_alpha(alpha: float, dtype: torch.dtype) -> None:
    """Catches 1 - alpha or its powers formed in x's own precision, a mean of 5 making it worse."""
    x = 5 + signal(2, 3000, dtype=dtype)
    bounds.check_forward(ema(x, alpha), x, alpha)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [12, 300])
def test_ties_of_halves_go_to_even(length: int, dtype: torch.dtype) -> None:
    """Catches a store that rounds what lies between two halves up, or away from zero."""
    eps = torch.finfo(dtype).eps
    at = torch.arange(2, length)
    for sign in (1, -1):
        for odd in (0, 1):
            # Each row has y = 1 + odd * eps + eps / 2 at a place of its own, after zeros.
            x = torch.zeros(length, length, dtype=dtype)
            x[at, at - 1] = sign * 2 * eps
            x[at, at] = sign * (2 + 2 * odd * eps)
            for reverse in (False, True):
                y = ema(x.flip(1) if reverse else x, 0.5, reverse=reverse)
                y = y.flip(1) if reverse else y
                assert (y[at, at] == sign * (1 + 2 * odd * eps)).all(), (sign, odd, reverse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37,), (5, 37), (3, 5, 7), (2, 3, 1, 5), (1, 1), (130, 40)])
def test_every_dim(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Catches rows and time mixed up; a negative dim means the same as a positive one."""
    x = signal(*shape, dtype=dtype)
    for dim in range(len(shape)):
        y = ema(x, 0.2, dim=dim)
        bounds.check_forward(y, x, 0.2, dim=dim)
        assert torch.equal(ema(x, 0.2, dim=dim - len(shape)), y)


@pytest.mark.parametrize("shape", [(70_001, 3), (70_001, 1), (2, 70_001, 2)])
def test_more_rows_than_a_16_bit_count(shape: tuple[int, ...]) -> None:
    """Catches a row index of 16 bits, or a grid dimension that stops at 65 535."""
    x = signal(*shape, dtype=torch.float32)
    bounds.check_forward(ema(x, 0.3), x, 0.3)
    bounds.check_forward(ema(x.mT, 0.3, dim=-2), x.mT, 0.3, dim=-2)


@pytest.mark.parametrize("alpha_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (3, 1, 1), (3, 4, 1), (1, 1, 1)])
def test_tensor_alpha(shape: tuple[int, ...], dtype: torch.dtype, alpha_dtype: torch.dtype) -> None:
    """Catches an alpha given to the wrong row, and one that promotes or is rounded to x's dtype."""
    x = signal(3, 4, 50, dtype=dtype)
    alpha = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(alpha_dtype)
    y = ema(x, alpha)
    assert y.dtype == dtype
    bounds.check_forward(y, x, alpha)


def test_tensor_alpha_per_channel_of_another_dim() -> None:
    """Catches alpha aligned with the moved dimensions instead of with x's own."""
    x, alpha = signal(3, 50, 4), torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    bounds.check_forward(ema(x, alpha, dim=1), x, alpha, dim=1)
    bounds.check_forward(ema(x.mT, alpha[:, None], dim=2), x.mT, alpha[:, None])
    bounds.check_forward(ema(x, alpha[:, None, None][:3], dim=1), x, alpha[:3, None, None], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tensor_alpha_outside_the_unit_interval(dtype: torch.dtype) -> None:
    """Catches log1p(-alpha) = NaN above 1, and a carry cut off where |c| >= 1."""
    alpha = torch.tensor([[-0.01], [0.0], [1.0], [1.5], [1.99], [2.01]], dtype=dtype)
    x = signal(6, 300, dtype=dtype)
    # Where |c| > 1 the roundings of c grow with the signal, as in the loop whose values are due.
    bounds.check_forward(ema(x, alpha), x, alpha, roundings=bounds.LOOP, label="alpha outside")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_sample_is_copied(dtype: torch.dtype) -> None:
    """Catches y[0] = (1 - alpha) * x[0] + alpha * x[0], which is another number for one in four."""
    x = signal(1000, 33, dtype=dtype)
    for alpha in (0.1, torch.tensor(0.1)):
        assert torch.equal(ema(x, alpha)[:, 0], x[:, 0])
        assert torch.equal(ema(x, alpha, reverse=True)[:, -1], x[:, -1])
        assert torch.equal(ema(x, alpha, dim=0)[0], x[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 17, 1000])
def test_alpha_one_is_the_identity_and_alpha_zero_holds(length: int, dtype: torch.dtype) -> None:
    """Catches coefficients that are nearly 0 or 1 at the two ends of the range."""
    x = signal(3, length, dtype=dtype)
    for one, zero in ((1.0, 0.0), (1, 0), (torch.tensor(1.0), torch.tensor(0.0))):
        assert torch.equal(ema(x, one), x)
        assert torch.equal(ema(x, one, initial_state=3.0), x)
        assert torch.equal(ema(x, zero), x[:, :1].expand_as(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reverse_is_flip_ema_flip(dtype: torch.dtype) -> None:
    """Catches a reverse scan that starts, or hands on its state, at the wrong end."""
    x, s = signal(3, 129, dtype=dtype), signal(3)
    y, state = ema(x, 0.2, initial_state=s, reverse=True, return_state=True)
    flipped, same_state = ema(x.flip(1), 0.2, initial_state=s, return_state=True)
    bounds.check_forward(y, x, 0.2, initial_state=s, reverse=True)
    if backends.cuda_kernels:  # whose tiles follow from the samples' addresses
        bounds.check_forward(flipped, x.flip(1), 0.2, initial_state=s)
        return
    assert torch.equal(y, flipped.flip(1))
    assert torch.equal(state, same_state)


@pytest.mark.parametrize(
    "number", [1, np.float32(0.25), np.float64(0.25), Fraction(1, 4)], ids=repr
)
def test_real_numbers_count_as_floats(number: Any) -> None:
    """Catches an int or a numpy scalar taken for a tensor; a bool is refused in test_errors."""
    x, same = signal(2, 9), torch.tensor(float(number))
    assert torch.equal(ema(x, number), ema(x, float(number)))
    assert torch.equal(ema(x, 0.5, initial_state=number), ema(x, 0.5, initial_state=same))


PUBLISHED: dict[str, tuple[list[int], dict[str, Any], list[float]]] = {
    "pandas adjust=False": (
        [1, 2, 4, 8],
        {"alpha": 1 / 3},
        [1, 4 / 3, 20 / 9, 112 / 27],
    ),
    "span 3 on the prices of the forum thread": (
        [22, 34, 22, 18, 23, 34, 45, 40, 47, 46],
        {"alpha": 0.5},
        [22, 28, 25, 21.5, 22.25, 28.125, 36.5625, 38.28125, 42.640625, 44.3203125],
    ),
    "scipy.signal.lfilter([a], [1, a - 1])": (
        [1, 2, 4, 8],
        {"alpha": 1 / 3, "initial_state": 0},
        [1 / 3, 8 / 9, 52 / 27, 320 / 81],
    ),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_numbers(case: str) -> None:
    """Catches the other convention: alpha on the past, a bias correction, a start at zero."""
    values, options, expected = PUBLISHED[case]
    x = torch.tensor(values, dtype=torch.float64)
    bound = (
        bounds.pointwise_bound(x, options["alpha"], initial_state=options.get("initial_state"))
        + bounds.unit(torch.float64) * torch.tensor(expected, dtype=torch.float64).numpy()
    )
    bounds.assert_within(ema(x, **options), expected, bound, "published")
