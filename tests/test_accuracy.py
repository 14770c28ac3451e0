"""Errors over all of [1e-5, 1] for alpha, any mean, any decay, and every edge of the kernels.

Edges: a tile is 8 vectors (16, 32, 64 or 128 samples by level and dtype), a chunk is 1024 samples,
a segment 65536, and rows of two segments or more are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import bounds
import numpy as np
import oracle
import pytest
import torch
from cases import DTYPES, signal
from torch import Tensor

import _ema_ext
from ema_ext import ema, linear_recurrence

FLOATS = (torch.float32, torch.float64)

#: A logarithmic grid, then where powers of 1 - alpha underflow within a tile or a vector: carries
#: are then spread step by step, or rows walked sample by sample.
ALPHAS = torch.tensor(
    [*np.logspace(-5, 0, 11), 0.25, 0.42, 0.5, 0.67, 0.75, 0.9, 0.97, 0.99, 0.999, 0.9999],
    dtype=torch.float64,
)[:, None]

AROUND_TILES = [n + d for n in (16, 32, 64, 128) for d in (-1, 0, 1)]
AROUND_CHUNKS = [1023, 1025, 1024 + 127]

#: Along which axis time lies in memory: the same rows by tiles in place, by tiles through a buffer,
#: as lanes, and as lanes that do not touch.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": Tensor.clone,
    "gathered": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "lanes": lambda x: x.T.contiguous().T,
    "spaced lanes": lambda x: torch.stack([x.T, torch.full_like(x.T, torch.nan)], -1)[..., 0].T,
}


def noise(length: int, mean: float, dtype: torch.dtype) -> Tensor:
    """One row of `mean` plus noise for each of ALPHAS."""
    return (mean + signal(len(ALPHAS), length)).to(dtype)


@pytest.fixture
def by_tiles() -> Iterator[None]:
    """Rows by tiles on the CPU, short ones too."""
    _ema_ext.force_cpu_strategy("rows")
    yield
    _ema_ext.force_cpu_strategy("")


@pytest.mark.usefixtures("by_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 5.0, 1e4])
@pytest.mark.parametrize("length", AROUND_TILES + AROUND_CHUNKS)
def test_every_alpha_at_every_edge(length: int, mean: float, dtype: torch.dtype) -> None:
    """Catches a lost or rounded carry, a wrong power, a padded sample that takes part."""
    x = noise(length, mean, dtype)
    bounds.check_forward(ema(x, ALPHAS), x, ALPHAS, label="alphas")
    s = signal(len(ALPHAS), seed=1)
    y = ema(x, ALPHAS, initial_state=s, reverse=True)
    bounds.check_forward(y, x, ALPHAS, initial_state=s, reverse=True, label="alphas")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_alpha_in_every_layout(dtype: torch.dtype, layout: str) -> None:
    """Catches a carry that is compensated in one kernel and not in another."""
    x = LAYOUTS[layout](noise(2100, 5.0, dtype))
    for reverse in (False, True):
        y = ema(x, ALPHAS, reverse=reverse)
        bounds.check_forward(y, x, ALPHAS, reverse=reverse, label=f"alphas, {layout}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_alpha_in_a_long_row(dtype: torch.dtype) -> None:
    """Catches an error that grows with the length, at any alpha."""
    x = noise(70_001, 5.0, dtype)
    bounds.check_forward(ema(x, ALPHAS), x, ALPHAS, label="alphas")


def float32_loop(x: Tensor, alpha: Tensor) -> Tensor:
    """The loop as one writes it, every operation rounded to float32; alpha is (rows, 1)."""
    weight, keep = alpha[:, 0].float(), (1 - alpha[:, 0]).float()
    y = x.T.clone()
    for n in range(1, len(y)):
        torch.add(keep * y[n - 1], weight * y[n], out=y[n])
    return y.T


@pytest.mark.parametrize("mean", [0.0, 5.0, 1e4])
def test_never_worse_than_the_float32_loop(mean: float) -> None:
    """Catches a kernel that is only as good as what it replaces: at every alpha up to 0.1."""
    alpha = ALPHAS[ALPHAS[:, 0] <= 0.1]
    x = (mean + signal(len(alpha), 20_000)).float()
    exact = oracle.ema(x, alpha)

    def worst(y: Tensor) -> Any:
        return np.abs(oracle.longdouble(y) - exact).max(axis=-1)

    assert (worst(ema(x, alpha)) <= worst(float32_loop(x, alpha))).all()


@pytest.mark.usefixtures("by_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("length", [15, 17, 63, 65, 127, 129, *AROUND_CHUNKS])
def test_gradients_at_every_edge(length: int, mean: float, dtype: torch.dtype) -> None:
    """Catches a carry or a tile's share that the adjoint or the sum over time loses."""
    x, alpha = noise(length, mean, dtype).requires_grad_(), ALPHAS.clone().requires_grad_()
    grad_y = signal(*x.shape, dtype=dtype, seed=1)
    s = signal(len(x), seed=2).requires_grad_()
    for state, reverse in ((None, False), (s, True)):
        y = ema(x, alpha, initial_state=state, reverse=reverse)
        inputs = (x, alpha) if state is None else (x, alpha, state)
        grads = (*torch.autograd.grad(y, inputs, grad_y), None)[:3]
        bounds.check_backward(
            grads, grad_y, x, alpha, initial_state=state, reverse=reverse, label="alphas"
        )


# Large starts

DECAYS = torch.tensor([0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 0.9999], dtype=torch.float64)[:, None]
HUGE = {torch.float32: 1e30, torch.float64: 1e300, torch.float16: 6e4, torch.bfloat16: 1e30}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("start", ["first sample", "sample 669", "state"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tail_after_a_large_start(
    dtype: torch.dtype, start: str, reverse: bool, layout: str
) -> None:
    """Catches a tail of rounding errors of the start, and one cut short where a power underflows:
    it must decay until it underflows itself."""
    x = torch.zeros(len(DECAYS), 2100, dtype=dtype)
    if start != "state":
        x[:, 0 if start == "first sample" else 669] = HUGE[dtype]
    s = HUGE[dtype] if start == "state" else None
    x = LAYOUTS[layout](x.flip(1) if reverse else x)
    y = ema(x, DECAYS, initial_state=s, reverse=reverse)
    bounds.check_forward(y, x, DECAYS, initial_state=s, reverse=reverse, label="tail")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tail_of_the_adjoint(dtype: torch.dtype, learned: bool, layout: str) -> None:
    """Catches the same in the backward: the gradient of a large grad_state alone."""
    x = LAYOUTS[layout](torch.ones(len(DECAYS), 2100, dtype=dtype)).requires_grad_()
    alpha = DECAYS.clone().requires_grad_(learned)
    s = torch.ones(len(DECAYS), dtype=torch.float64, requires_grad=True)
    y, state = ema(x, alpha, initial_state=s, return_state=True)
    grad_y, grad_state = torch.zeros_like(x), torch.full_like(state, HUGE[dtype])
    wanted = [x, s, *([alpha] if learned else [])]
    grads = torch.autograd.grad([y, state], wanted, [grad_y, grad_state])
    bounds.check_backward(
        (grads[0], grads[2] if learned else None, grads[1]),
        *(grad_y, x, alpha),
        initial_state=s,
        grad_state=grad_state,
        label="tail",
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_later_samples_after_a_large_start(dtype: torch.dtype) -> None:
    """Catches the start's rounding errors in the samples after it, which are 1 and not 0."""
    x = torch.ones(len(ALPHAS), 2100, dtype=dtype)
    x[:, 0] = HUGE[dtype]
    bounds.check_forward(ema(x, ALPHAS), x, ALPHAS, label="after a large start")


# alpha's gradient


def series(kind: str, length: int) -> Tensor:
    """float64, one row for each of ALPHAS."""
    time = torch.linspace(0, 1, length, dtype=torch.float64)
    wiggle = signal(len(ALPHAS), length, seed=3)
    return {
        "mean 0": wiggle,
        "mean 5": 5 + wiggle,
        "mean 500": 500 + wiggle,
        "trend": 500 + 100 * time + wiggle,
        "walk": 500 + wiggle.cumsum(1),
    }[kind]


def alpha_gradient(x: Tensor, grad_y: Tensor, alpha: Tensor, s: Tensor | None = None) -> Tensor:
    alpha = alpha.clone().requires_grad_()
    return torch.autograd.grad(ema(x, alpha, initial_state=s), alpha, grad_y)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["mean 0", "mean 5", "mean 500", "trend", "walk"])
@pytest.mark.parametrize("length", [17, 1000, 5000])
def test_gradient_to_alpha(length: int, kind: str, dtype: torch.dtype, layout: str) -> None:
    """Catches x - y formed with the mean still in both, and partial sums in float32."""
    x = LAYOUTS[layout](series(kind, length).to(dtype))
    s = x[:, 0].double() + 0.5
    grad_y = LAYOUTS[layout](signal(*x.shape, dtype=dtype, seed=4))
    got = alpha_gradient(x, grad_y, ALPHAS, s)
    exact = oracle.ema_backward(grad_y, x, ALPHAS, initial_state=s).alpha
    derived = bounds.gradient_bounds(grad_y, x, ALPHAS, initial_state=s).alpha
    name = f"alpha's gradient, {layout}, {str(dtype).removeprefix('torch.')} x"
    bounds.assert_within(got, exact, derived, f"{name}, derived")
    # In float64 a sum over time of the size of lambda / alpha is rounded with no digits to spare.
    held = slice(None) if dtype == torch.float32 else ALPHAS[:, 0] >= 1 / 16
    required = bounds.alpha_requirement(grad_y, x, ALPHAS, initial_state=s)
    bounds.assert_within(got[held], exact[held], required[held], f"{name}, required")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [7, 1000, 5000])
def test_gradient_to_alpha_of_a_constant(length: int, dtype: torch.dtype, layout: str) -> None:
    """Catches a rounding error of the mean: a constant series has gradient 0 at any alpha."""
    x = LAYOUTS[layout](torch.full((len(ALPHAS), length), 500.3, dtype=dtype))
    grad_y = LAYOUTS[layout](signal(*x.shape, dtype=dtype, seed=1))
    assert not alpha_gradient(x, grad_y, ALPHAS).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tenth_of_each_bound_is_missed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a bound so wide that a mistake of several roundings per sample would pass."""
    x, grad_y = signal(8, 5000, dtype=dtype).requires_grad_(), signal(8, 5000, dtype=dtype, seed=2)
    weights = (0.3 * signal(5000, seed=3).sigmoid()).requires_grad_()
    averages = {bounds.KERNEL: weights[:1].detach(), bounds.VARYING: weights}
    monkeypatch.setattr(bounds, "SCALE", 0.1)
    monkeypatch.setattr(bounds, "WORST", {})
    for roundings, alpha in averages.items():
        y = ema(x, alpha)
        expected = oracle.ema(x, alpha)
        bound = bounds.pointwise_bound(x, alpha, roundings=roundings)
        with pytest.raises(AssertionError, match="tenth: error is"):
            bounds.assert_within(y, expected, bound, "tenth")
        (grad_x,) = torch.autograd.grad(y, x, grad_y)
        with pytest.raises(AssertionError, match="tenth grad x: error is"):
            bounds.check_backward(
                (grad_x, None, None), grad_y, x, alpha, roundings=roundings, label="tenth"
            )
    expected = oracle.ema(x, weights[:1])
    limit = bounds.row_bound(expected, dtype)
    with pytest.raises(AssertionError, match="tenth by row: error is"):
        bounds.assert_within(ema(x, weights[:1]), expected, limit, "tenth by row")
    y = linear_recurrence(weights, x)
    with pytest.raises(AssertionError, match="tenth y: error is"):
        bounds.check_recurrence(y, weights, x, label="tenth")
    (grad_b,) = torch.autograd.grad(y, x, grad_y)
    with pytest.raises(AssertionError, match="tenth grad b: error is"):
        bounds.check_recurrence_backward((None, grad_b, None), grad_y, weights, x, label="tenth")
