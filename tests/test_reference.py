"""The reference versions against the oracle, against each other, and at their documented limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import bounds
import numpy as np
import oracle
import pytest
import torch

from ema_ext.reference import EMAConv, ema_loop, ema_matmul, weight_matrix, wma_window

EPS = 2.0**-52
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
PRICES = [22.0, 34.0, 22.0, 18.0, 23.0, 34.0, 45.0, 40.0, 47.0, 46.0]


def signal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def conv_roundings(conv: EMAConv, length: int, eps: float) -> bounds.Roundings:
    return bounds.conv(min(conv.taps, length), eps if conv.taps < length else 0.0)


# Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 1e-5, 1e-3, 0.1, 0.5, 0.97, 1.0])
def test_each_version_meets_its_own_bound(alpha: float, dtype: torch.dtype) -> None:
    """Catches a wrong weight, a 1 - alpha formed in half, a lost carry at c near 1."""
    length = 300
    x = signal(3, length, dtype=dtype) + 5
    bounds.check_forward(ema_loop(x, alpha), x, alpha, roundings=bounds.LOOP, label="loop")
    exact = bounds.matmul(length)
    bounds.check_forward(ema_matmul(x, alpha), x, alpha, roundings=exact, label="matmul")
    conv = EMAConv(alpha, eps=1e-8, max_length=length)
    truncated = conv_roundings(conv, length, 1e-8)
    bounds.check_forward(conv(x), x, alpha, roundings=truncated, label="conv")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("kind", ["float", "scalar", "per row", "per step", "full"])
def test_loop_over_any_dim_and_alpha(kind: str, dim: int, dtype: torch.dtype) -> None:
    """Catches an alpha aligned with the wrong dimension and a start that is blended with itself."""
    x = signal(4, 5, 6, dtype=dtype)
    full = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = [1, 1, 1]
    step[dim] = x.shape[dim]
    alpha = {
        "float": 0.3,
        "scalar": full[0, 0, 0],
        "per row": full.amax(dim, keepdim=True),
        "per step": full[0, 0, 0] / torch.arange(1, x.shape[dim] + 1).reshape(step),
        "full": full,
    }[kind]
    start = signal(*(size for i, size in enumerate(x.shape) if i != dim % 3), seed=2)
    for initial_state in (None, 0.1, start):
        options = {"dim": dim, "initial_state": initial_state}
        y = ema_loop(x, alpha, **options)
        assert y.dtype == dtype
        bounds.check_forward(y, x, alpha, roundings=bounds.LOOP, label="loop", **options)
    first = ema_loop(x, alpha, dim=dim).select(dim, 0)
    assert torch.equal(first, x.select(dim, 0))


def test_printed_values() -> None:
    """Catches a recurrence that is not pandas' adjust=False, or a start other than x[0] or zero."""
    x = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    for y in (ema_loop(x, 1 / 3), ema_matmul(x, 1 / 3), EMAConv(1 / 3)(x)):
        assert [round(v, 6) for v in y.tolist()] == [1, 1.333333, 2.222222, 4.148148]
    y = ema_loop(x, 1 / 3, initial_state=0.0)
    assert [round(v, 6) for v in y.tolist()] == [0.333333, 0.888889, 1.925926, 3.950617]
    pandas = [22, 28, 25, 21.5, 22.25, 28.125, 36.5625, 38.28125, 42.640625, 44.3203125]
    assert ema_loop(torch.tensor(PRICES), 0.5).tolist() == pandas


def test_wma_window_prints_the_threads_example() -> None:
    """Catches a ramp-up with the full window's weights."""
    y = wma_window(torch.tensor([[PRICES]]), 3)
    due = [22, 30, 26, 22, 21.1667, 27.6667, 37.6667, 40.6667, 44.3333, 45.3333]
    assert y.shape == (1, 1, 10)
    assert [round(v, 4) for v in y.flatten().tolist()] == due


@pytest.mark.parametrize("length", [0, 1, 2, 6, 7, 8, 40])
@pytest.mark.parametrize("period", [1, 2, 7])
def test_wma_window_is_its_formula(period: int, length: int) -> None:
    """Catches an off-by-one where the ramp-up meets the full window."""
    x = signal(length)
    y = wma_window(x, period)
    assert y.shape == x.shape
    size = x.abs().cumsum(0)  # every weight is at most 1
    for n in range(length):
        m = min(n + 1, period)
        terms = [(m - k) * oracle.longdouble(x[n - k]) for k in range(m)]
        expected = sum(terms) / (m * (m + 1) // 2)
        bound = (m + 3) * bounds.unit(x.dtype) * float(size[n])
        bounds.assert_within(y[n], expected, bound, "wma_window")


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (0, 5), (2, 1), (2, 0, 3)])
def test_empty_and_single(shape: tuple[int, ...]) -> None:
    """Catches a crash, or a y[0] that is not x[0], at the shortest lengths."""
    x = signal(*shape)
    conv = EMAConv(0.3)
    for y in (ema_loop(x, 0.3), ema_matmul(x, 0.3), conv(x), wma_window(x, 3)):
        assert y.shape == x.shape
        if 0 < shape[-1] <= 1:
            bounds.assert_within(y, x, 4 * bounds.unit(x.dtype) * x.abs(), "single sample")
    assert ema_loop(x.mT if x.dim() > 1 else x, 0.3, dim=0).numel() == x.numel()


def test_weights_are_reused_for_shorter_rows() -> None:
    """Catches a slice that is not the top left block."""
    weights = weight_matrix(64, 0.2)
    for length in (0, 1, 17, 64):
        assert torch.equal(weights[:length, :length], weight_matrix(length, 0.2))
        x = signal(2, 3, length, dtype=torch.float32)
        assert torch.equal(ema_matmul(x, 0.2, weights=weights), ema_matmul(x, 0.2))
    # Rows of the matrix are averages: a constant stays itself.
    ones = torch.ones(64, dtype=torch.float64)
    room = bounds.pointwise_bound(ones, 0.2, roundings=bounds.matmul(64))
    bounds.assert_within(weights.sum(1), ones, room, "weight_matrix rows")


def test_half_is_computed_in_float32_and_rounded_once() -> None:
    """Catches a state in half precision: 20 000 ones from 0 would stall at 0.25."""
    x = torch.ones(20_000, dtype=torch.bfloat16)
    assert ema_loop(x, 1e-3, initial_state=0.0)[-1] == 1
    wide = signal(200, dtype=torch.bfloat16)
    assert torch.equal(ema_loop(wide, 0.1), ema_loop(wide.float(), 0.1).bfloat16())


# Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 0.5])
def test_gradients_meet_their_bounds(alpha: float, dtype: torch.dtype) -> None:
    """Catches a detached state or weight, and a gradient in the wrong shape or dtype."""
    length, eps = 200, 1e-8
    x = (signal(2, length, dtype=dtype) + 1).requires_grad_()
    g = signal(2, length, dtype=dtype, seed=1)
    factor = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    for label, y, roundings in (
        ("loop", ema_loop(x, factor), bounds.LOOP),
        ("matmul", ema_matmul(x, factor), bounds.matmul(length)),
    ):
        grad_x, grad_alpha = torch.autograd.grad(y, (x, factor), g)
        grads = (grad_x, grad_alpha, None)
        bounds.check_backward(grads, g, x, alpha, roundings=roundings, label=label)
    conv = EMAConv(alpha, eps)
    (grad_x,) = torch.autograd.grad(conv(x), x, g)
    expected, bound = bounds.conv_backward(g, x, alpha, conv_roundings(conv, length, eps))
    bounds.assert_within(grad_x, expected, bound, "conv grad x")


def test_loop_gradients_reach_every_argument() -> None:
    """Catches an argument's gradient summed over the wrong dimensions."""
    x = signal(2, 3, 9).requires_grad_()
    alpha = torch.tensor([[0.2], [0.5], [0.9]], dtype=torch.float64, requires_grad=True)
    start = signal(2, 3, seed=3).requires_grad_()
    g = signal(2, 3, 9, seed=1)
    y = ema_loop(x, alpha, initial_state=start)
    grads = torch.autograd.grad(y, (x, alpha, start), g)
    options = {"roundings": bounds.LOOP, "label": "loop"}
    bounds.check_backward(grads, g, x, alpha, initial_state=start, **options)


def test_printed_gradients() -> None:
    """Catches a wrong derivative to alpha, first or second order."""
    x = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    alpha = torch.tensor(1 / 2, dtype=torch.float64, requires_grad=True)
    for version in (ema_loop, ema_matmul):
        (total,) = torch.autograd.grad(version(x, alpha).sum(), alpha)
        loss = version(x, alpha).square().sum()
        (slope,) = torch.autograd.grad(loss, alpha, create_graph=True)
        (curve,) = torch.autograd.grad(slope, alpha)
        assert (total.item(), slope.item(), curve.item()) == (10.75, 92.0625, 24.875)


# Documented limits ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_where_a_bad_sample_goes(bad: float) -> None:
    """Holds the docs to it: the loop forward only, the matrix backward too, conv forgets."""
    x = signal(2, 60)
    clean = ema_loop(x, 0.5)
    x[0, 20] = bad
    loop, matmul, conv = ema_loop(x, 0.5), ema_matmul(x, 0.5), EMAConv(0.5, max_length=8)
    assert torch.equal(loop[0, :20], clean[0, :20])
    assert torch.equal(loop[1], clean[1])
    assert not loop[0, 20:].isfinite().any()
    assert matmul[0, :20].isnan().all()
    assert matmul[1].isfinite().all()
    assert not conv(x)[0, 20:28].isfinite().any()
    assert conv(x)[0, 28:].isfinite().all()


def test_the_float32_loop_loses_digits_at_small_alpha() -> None:
    """The float32 loop at alpha = 1e-4 misses the bound that a kernel has to meet."""
    x = 5 + signal(30_000, dtype=torch.float32)
    y = ema_loop(x, 1e-4)
    bounds.check_forward(y, x, 1e-4, roundings=bounds.LOOP, label="loop")
    with pytest.raises(AssertionError, match="times the bound"):
        bounds.assert_within(y, oracle.ema(x, 1e-4), bounds.pointwise_bound(x, 1e-4), "not kept")
    bounds.WORST.pop("not kept float32")


def test_conv_taps_follow_eps() -> None:
    """Catches a kernel one tap short, and a max_length that is not an upper limit."""
    for alpha in (0.5, 2 / 22, 1e-3):
        taps = EMAConv(alpha, eps=1e-6).taps
        assert (1 - alpha) ** taps < 1e-6 <= (1 - alpha) ** (taps - 1)
    assert EMAConv(0.5, max_length=3).taps == 3
    assert EMAConv(1.0).taps == 1
    assert not list(EMAConv(0.5).parameters())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda _: ema_loop([1.0], 0.5), TypeError, "x must be a tensor, got list"),
        (lambda x: ema_loop(x.int(), 0.5), TypeError, "x must have a floating dtype.*int32"),
        (lambda x: ema_matmul(x + 0j, 0.5), TypeError, "x must have a floating dtype.*complex"),
        (lambda x: ema_loop(x.sum(), 0.5), ValueError, r"x must have at least one.*\(\)"),
        (lambda x: ema_loop(x, 1.5), ValueError, r"alpha must be in \[0, 1\], got 1.5"),
        (lambda _: EMAConv(math.nan), ValueError, r"alpha must be in \[0, 1\], got nan"),
        (lambda x: ema_loop(x, torch.rand(3)), ValueError, r"alpha of shape \(3,\).*\(2, 5\)"),
        (lambda x: ema_loop(x, 0.5, dim=2), IndexError, "got 2"),
        (
            lambda x: ema_loop(x, 0.5, initial_state=torch.rand(5)),
            ValueError,
            r"initial_state of shape \(5,\) does not expand to \(2,\)",
        ),
        (lambda x: ema_matmul(x, torch.rand(2)), ValueError, r"alpha must be.*0-dim.*\(2,\)"),
        (
            lambda x: ema_matmul(x, 0.5, weights=weight_matrix(4, 0.5)),
            ValueError,
            r"weights must be at least \(5, 5\).*got \(4, 4\)",
        ),
        (lambda _: EMAConv(0.0), ValueError, "alpha = 0 .* max_length"),
        (lambda _: EMAConv(0.5, eps=0.0), ValueError, r"eps must be in \(0, 1\), got 0.0"),
        (lambda _: EMAConv(0.5, max_length=0), ValueError, "max_length must be at least 1, got 0"),
        (lambda x: wma_window(x, 0), ValueError, "period must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(
    call: Callable[[torch.Tensor], object], error: type[Exception], message: str
) -> None:
    """Catches an error that leaves the user guessing."""
    with pytest.raises(error, match=message):
        call(torch.rand(2, 5))


# The comparison itself --------------------------------------------------------------------------


def test_the_comparison_can_fail() -> None:
    """Catches an assert_within that drops NaN, or lets a garbage tail hide behind a large start."""
    x = signal(50)
    x[0] = 1e6
    y = ema_loop(x, 0.5)
    expected, bound = oracle.ema(x, 0.5), bounds.pointwise_bound(x, 0.5, roundings=bounds.LOOP)
    bounds.assert_within(y, expected, bound, "planted")
    for n, wrong in ((49, y[49] * (1 + 1e-14)), (10, math.nan), (10, math.inf)):
        bad = y.clone()
        bad[n] = wrong
        with pytest.raises(AssertionError, match="planted"):
            bounds.assert_within(bad, expected, bound, "planted")
    expected[3] = math.nan
    with pytest.raises(AssertionError, match="planted"):
        bounds.assert_within(y, expected, bound, "planted")
    bounds.WORST.pop("planted float64")


def test_the_oracle_agrees_with_exact_fractions() -> None:
    """Catches a mistake in the oracle itself, which every other test leans on."""
    x, g, start, alpha = signal(12), signal(12, seed=1), 0.75, Fraction(1, 8)
    samples, weights = [Fraction(v) for v in x.tolist()], [Fraction(v) for v in g.tolist()]
    for state in (None, start):
        # y and dy/dalpha in closed form, from the weights of each sample.
        before = samples[0] if state is None else Fraction(state)
        y, slope = [], Fraction(0)
        for n in range(12):
            age = n + 1
            terms = [alpha * (1 - alpha) ** (n - k) * samples[k] for k in range(age)]
            y.append((1 - alpha) ** age * before + sum(terms))
            slope -= weights[n] * age * (1 - alpha) ** (age - 1) * before
            for k in range(age):
                older = n - k
                power = (1 - alpha) ** older - alpha * older * (1 - alpha) ** max(older - 1, 0)
                slope += weights[n] * power * samples[k]
        kernel = [sum(weights[n] * (1 - alpha) ** (n - k) for n in range(k, 12)) for k in range(12)]
        grad_x = [alpha * v if k or state is not None else v for k, v in enumerate(kernel)]
        call = {"alpha": float(alpha), "initial_state": state}
        got, forward = oracle.ema_backward(g, x, **call), oracle.ema(x, **call)
        # the oracle's own error, and the rounding of the fractions to float64
        own = {**call, "roundings": bounds.Roundings(base=0)}
        off = bounds.gradient_bounds(g, x, **own)
        held = [(forward, y, bounds.pointwise_bound(x, **own)), (got.x, grad_x, off.x)]
        held.append((got.alpha, slope, off.alpha))
        if state is not None:
            held.append((got.initial_state, (1 - alpha) * kernel[0], off.initial_state))
        for value, exact, bound in held:
            assert (np.abs(value - np.array(exact, dtype=np.float64)) <= bound).all()
