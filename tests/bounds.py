"""How far a correct implementation may be from the exact result, derived once for all tests.

Notation: u is the unit roundoff (eps / 2) of the accumulate dtype (float32 for float32, float16 and
bfloat16; float64 for float64), c = 1 - alpha, and w[n,k] >= 0 the weight of x[k] in y[n].

**Forward.** Every implementation returns sum_k w[n,k] x[k] (1 + theta) with |theta| at most
(base + per_step * (n - k)) u to first order, `base` counting the roundings each term meets once and
`per_step` those it meets again at every later step. Hence

    |err[n]| <= u * sum_k (base + per_step * (n - k)) w[n,k] |x[k]|.

With M = ema(|x|) and S[n] = sum_k (n - k) w[n,k] |x[k]|, each step adds one to every age n - k, so
S[n] = c (S[n-1] + M[n-1]), and the bound is u (base M[n] + per_step S[n]): one more loop. It holds
at every sample, so a small tail after a large start is held to the tail's own size.

* loop: c and alpha rounded, two products, one sum. A term meets alpha, its product and a sum once
  and c, a product and a sum at every later step: base 3, per_step 3. At alpha = 1e-5 this
  per_step is what makes the sequential float32 loop lose four digits.
* kernel: coefficients come from float64 and the carry is held in more than x's precision, so
  nothing repeats per step. Once each: coefficient and product (2); four doublings of a 16-sample
  window, coefficient and fused add (8); carry coefficient, product, sum (3); the state's own
  rounding (1); the rest of compensation, to second order (2). base 16, that is K = 8 eps.
  What repeats is float64's (u64) and follows the decay: c^k = exp(k log c) has a relative error of
  3 |k log c| u64 (log to an ulp, one product); a carry that decays by less than half from tile to
  tile is compensated, one that decays by more meets a rounded c^k, a product and a sum, 4 u64 for
  a decay of log 2 or more. So per_decay 9: a term that has decayed by e^-t is known to 16 u and
  9 t u64. Beside the row's maximum that is 9 t e^-t, not 4 u64; only in a tail it is what is left.
* matmul: a rounded weight, a product, and a dot product of n + 1 terms in any order: length + 2.
  The weight is a power of a rounded c: per_step 1.
* conv: the same over the kernel's taps, with the first-sample term beside it: taps + 4, per_step 1.
  What the truncated kernel leaves out weighs less than its eps together: eps * max |x| of the past.

**Backward.** lambda, the adjoint, is the same recurrence run backward over grad_y, so the same
count applies to it with |grad_y| for |x|; call Lambda[n] the adjoint of |grad_y|. alpha's gradient
is sum_n lambda[n] r[n] with r[n] = x[n] - y[n-1].

* loop, matmul: the error of lambda times |x| + M, the error of y times Lambda, and the summation's
  own roundings, one per term.
* kernel: r is never formed from x and y, which share their mean, but from differences of x, so the
  bound has no mean in it. R[n] is the range of x over every tile (at most 128 samples) that n may
  be in; u64 is float64's u. First, the error of lambda times |r|. Second, by tiles (tiles.h),
  r = x' - y' - c^i r[f] with x' = x - x[f] and y' = ema(x') from zero, f the tile's first sample:
  |x'| and y' are at most R, and so c^i |r[f]| <= |r| + 2 R. Each is rounded as a kernel's y (base),
  then by one difference, one product and 8 or 16 sums in T (18): (base + 18) u Lambda (|r| + 4 R).
  What earlier tiles got wrong of y reaches later ones with y's own weights: base u Lambda ema(R).
  Third, all else is float64, by tiles (alpha_sums.h) as by samples (walk.h, where the gradient is
  summed by parts, sum_n kappa[n] (x[n] - x[n-1]) with kappa the adjoint of lambda): a rounding of
  kappa or of a product of it, 8 in all, costs u64 kappa (|r| + R), a rounding of the running sum
  u64 |sum so far|, which is at most |sum_{m >= n} lambda[m] r[m]| + kappa (|r| + R). kappa may be
  1 / alpha times Lambda: for float32 and halves that is still below their own u, for float64 it is
  the larger part where alpha is small.

What must hold on data that is not made against it is simpler and tighter (`alpha_requirement`):
8 eps sum |lambda r|.

**A coefficient per sample** (varying.h) runs in float64 throughout, whatever the dtype. Beside the
initial state's own rounding (base 1 in the accumulate dtype), a term meets 1 - alpha, alpha * x and
a sum once, and one product and one sum more where the past comes in: 6 u64. At every later step it
meets a rounded 1 - alpha, a product and a sum, and once more a product where maps are composed: 4
u64. For float64 the error so grows with the memory, as the loop's does; for the others it never
shows. A linear recurrence is the same with |a| for c and |b| for alpha |x|. So is one of constant a
in float64 whose rows walk side by side (walk.h), for only an average's steps are compensated there.
A product of float64 coefficients, over at most a chunk, may
underflow: a smallest float64 subnormal times the y before.

**The same of halves on a GPU** (csrc/cuda/stretch.cuh) is float64 from group to group of four
samples, and float32 within one. What is rounded to float32, of a term on its way from its own group
to a result in another:

* forward: c * x is exact, of two halves. To the end of its group three steps, each a rounded 1 - c
  and a fused add (6); the y before the other group (1); there at most four steps (8). base 15, for
  a linear recurrence, whose a is exact, 8. Within one group it is at most 4 steps.
* lambda of an average: to the end of the group three sums and four products with 1 - c, fused (7);
  the value before the other group (1); there four sums and three products (7); c times lambda (1).
  base 16. Of a linear recurrence a step is one fused add, with a constant a that is rounded
  besides: three steps (6) and a product (2); 1; a sum and three steps (7). base 16.

The initial state's own rounding takes the place of those of a first group. Of a product with a
constant coefficient's gradient four are summed in float32, which takes two roundings more.

So base 16, and float32's underflow for float64's. Rows that are not aligned, and rows side by side,
stay in float64 throughout, and are not told apart.

Its gradient to a coefficient is lambda[n] times r[n] = x[n] - y[n-1], or y[n-1], with the y that
was returned: its error and its rounding to the dtype of y enter times Lambda[n]. Each term is
rounded to the accumulate dtype of x or of the coefficient, whichever is coarser; terms that share a
coefficient are then summed in float64.

**Stored result.** One more rounding, to the result's dtype: its unit roundoff times |result|.
Underflow costs a smallest subnormal per rounding.

**Row bound** (kernels only): 4 ulp of the row's largest |y|, for every alpha in [1e-5, 1]. An
initial state is y[-1] and counts: y[0] may be what is left of it and of alpha x[0].

The oracle's own error (long double, the count of oracle.scan with its u) is added to every bound.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracle
import torch
from oracle import Array, Problem, Recurrence, longdouble

#: Worst error / bound seen in this run, by label: printed at the end of the run by conftest.py.
WORST: dict[str, float] = {}

#: By how much every bound is stretched: with EMA_EXT_BOUND_SCALE=0.1 the suite must fail.
SCALE = float(os.environ.get("EMA_EXT_BOUND_SCALE", "1"))

#: Whether the kernels are those of csrc/cuda: conftest.py says so.
cuda_kernels = False

ULPS = 4

#: Samples of the longest tile that a CPU kernel has: float32 at x86-64-v4.
TILE = 128


@dataclass(frozen=True)
class Roundings:
    """How often an implementation rounds: see the module's docstring."""

    base: float
    per_step: float = 0.0
    per_decay: float = 0.0  # in float64, for each factor e by which a term decays
    base_wide: float = 0.0  # in float64, once
    per_step_wide: float = 0.0  # in float64, at every later step
    truncation: float = 0.0  # weight left out, as a share of max |x|
    partials: torch.dtype | None = None  # of sums over time; None: the accumulate dtype
    products: float = 2  # roundings of lambda times what a coefficient meets, in a gradient


LOOP = Roundings(base=3, per_step=3)
ORACLE = Roundings(base=6, per_step=3)
VARYING = Roundings(base=1, base_wide=6, per_step_wide=4)
#: The same of halves on the CUDA kernels: see `_own`.
GROUPED = replace(VARYING, base=16, products=4)
KERNEL = Roundings(base=16, per_decay=9, partials=torch.float64)
#: Of a float64 recurrence of constant a, whether by tiles or side by side.
STEPWISE = replace(KERNEL, per_step_wide=VARYING.per_step_wide)


def _own(roundings: Roundings, dtype: torch.dtype) -> Roundings:
    """Those by which the chosen backend does what is asked for of samples of this dtype."""
    grouped = roundings is VARYING and cuda_kernels and dtype.itemsize == 2
    return GROUPED if grouped else roundings


def matmul(length: int) -> Roundings:
    """A matrix product over `length` samples."""
    return Roundings(base=length + 2, per_step=1)


def conv(taps: int, eps: float) -> Roundings:
    """A convolution with `taps` taps that leaves out weights of `eps` in all."""
    return Roundings(base=taps + 4, per_step=1, truncation=eps)


@dataclass(frozen=True)
class GradientBounds:
    """Bounds on each gradient, shaped like oracle.Gradients."""

    x: Array
    alpha: Array
    initial_state: Array | None


def pointwise_bound(
    x: torch.Tensor,
    alpha: Any,
    *,
    dim: int = -1,
    initial_state: Any = None,
    reverse: bool = False,
    roundings: Roundings = KERNEL,
) -> Array:
    """Largest |error| allowed to each y of ema(x, ...), in x's shape and stored in x's dtype."""
    problem = Problem.of(x, alpha, dim, initial_state, reverse)
    roundings = _own(roundings, x.dtype)
    _, error = _forward(problem, roundings, accumulate_dtype(x.dtype))
    if roundings.truncation:
        error = error + roundings.truncation * np.maximum.accumulate(np.abs(problem.x), axis=0)
    return problem.restore(_stored(oracle.outputs(problem), error, x.dtype))


def gradient_bounds(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    alpha: Any,
    *,
    dim: int = -1,
    initial_state: Any = None,
    reverse: bool = False,
    grad_state: Any = None,
    roundings: Roundings = KERNEL,
) -> GradientBounds:
    """Largest |error| allowed to the gradients of ema(x, ...), each stored in its own dtype."""
    problem = Problem.of(x, alpha, dim, initial_state, reverse)
    dtype, roundings = accumulate_dtype(x.dtype), _own(roundings, x.dtype)
    exact = oracle.ema_backward(
        grad_y,
        x,
        alpha,
        dim=dim,
        initial_state=initial_state,
        reverse=reverse,
        grad_state=grad_state,
    )
    carried, carried_error = _backward(problem, grad_y, grad_state, roundings, dtype)
    if not len(carried):  # the gradient of the state goes to the start, summed in any order
        grad_start = None
        if exact.initial_state is not None:
            through = np.broadcast_to(
                longdouble(0.0 if grad_state is None else grad_state), problem.x.shape[1:]
            )
            count = through.size // max(1, exact.initial_state.size)
            error = count * unit(dtype) * problem.to_start(np.abs(through))
            grad_start = _stored(exact.initial_state, error, _dtype(initial_state))
        return GradientBounds(exact.x, exact.alpha, grad_start)
    weight = np.abs(problem.weight).copy()
    if problem.start is None:
        weight[0] = 1
    grad_x = problem.restore(weight * carried_error)

    if roundings in (VARYING, GROUPED):
        _, y_error = _forward(problem, roundings, dtype)
        y_error = _stored(oracle.outputs(problem), y_error, x.dtype) + _unsure(problem)
        coarser = max(dtype, accumulate_dtype(_dtype(alpha)), key=unit)
        terms = _shared_terms(
            oracle.innovation(problem),
            y_error,
            carried,
            carried_error,
            coarser,
            problem.alpha_shape,
            roundings.products,
        )
    elif roundings is KERNEL:
        adjoint = oracle.adjoint(problem, grad_y, grad_state)
        terms = _kernel_terms(problem, adjoint, carried, carried_error, dtype)
    else:
        terms = _plain_terms(problem, carried, carried_error, roundings, dtype)
    grad_alpha = _stored(exact.alpha, problem.to_alpha(terms), _dtype(alpha))

    grad_start = None
    if exact.initial_state is not None:
        error = problem.to_start(np.abs(problem.keep[0]) * carried_error[0])
        grad_start = _stored(exact.initial_state, error, _dtype(initial_state))
    return GradientBounds(_stored(exact.x, grad_x, x.dtype), grad_alpha, grad_start)


def alpha_requirement(
    grad_y: torch.Tensor, x: torch.Tensor, alpha: Any, *, dim: int = -1, initial_state: Any = None,
    reverse: bool = False,
) -> Array:  # fmt: skip
    """Largest |error| allowed to alpha's gradient on ordinary data: 8 eps sum |lambda r|."""
    problem = Problem.of(x, alpha, dim, initial_state, reverse)
    terms = np.abs(oracle.adjoint(problem, grad_y) * oracle.innovation(problem))
    error = 16 * unit(accumulate_dtype(x.dtype)) * problem.to_alpha(terms)
    exact = oracle.ema_backward(
        grad_y, x, alpha, dim=dim, initial_state=initial_state, reverse=reverse
    )
    return _stored(exact.alpha, error, _dtype(alpha))


def row_bound(y: Array, dtype: torch.dtype, dim: int = -1, initial_state: Any = None) -> Array:
    """4 ulp (in `dtype`) of the largest finite |y| of each row, expanded to y's shape."""
    if not y.size:
        return np.zeros_like(y)
    peak = np.where(np.isfinite(y), np.abs(y), 0).max(axis=dim, keepdims=True)
    if initial_state is not None:
        start = np.broadcast_to(longdouble(initial_state), peak.squeeze(dim).shape)
        start = np.where(np.isfinite(start), np.abs(start), 0)
        peak = np.maximum(peak, np.expand_dims(start, dim))
    peak = np.maximum(peak, torch.finfo(dtype).tiny)
    ulp = np.exp2(np.floor(np.log2(peak))) * torch.finfo(dtype).eps
    return np.broadcast_to(ULPS * ulp, y.shape)


def assert_within(actual: torch.Tensor, expected: Any, bound: Any, label: str) -> None:
    """|actual - expected| <= bound everywhere; NaN and each infinity where, and only where,
    expected.

    Adds the worst error / bound to the table under `label` and actual's dtype.
    """
    got, want = longdouble(actual), longdouble(expected)
    assert got.shape == want.shape, f"{label}: shape {got.shape}, expected {want.shape}"
    allowed = np.broadcast_to(SCALE * longdouble(bound), want.shape)
    finite = np.isfinite(want)
    same = np.where(finite, np.isfinite(got), (got == want) | (np.isnan(got) & np.isnan(want)))
    if not same.all():
        where = tuple(int(i) for i in np.argwhere(~same)[0])
        raise AssertionError(f"{label}: {got[where]} where {want[where]} is due, at {where}")
    error, limit = np.abs(got[finite] - want[finite]), allowed[finite]
    assert not np.isnan(limit).any(), f"{label}: the bound is NaN where the result is finite"
    ratio = np.divide(error, limit, out=np.where(error > 0, np.inf, 0.0), where=limit > 0)
    worst = float(ratio.max()) if ratio.size else 0.0
    key = f"{label} {str(actual.dtype).removeprefix('torch.')}"
    WORST[key] = max(WORST.get(key, 0.0), worst)
    if worst > 1:
        i = int(ratio.argmax())
        where = tuple(int(j) for j in np.argwhere(finite)[i])
        raise AssertionError(
            f"{label}: error is {worst:.3g} times the bound at {where}: got {got[where]}, "
            f"expected {want[where]}, error {error[i]:.3g}, bound {limit[i]:.3g}"
        )


def assert_within_range(actual: torch.Tensor, exact: Array, bound: Array, label: str) -> None:
    """assert_within wherever the bound keeps the result inside the range of its dtype."""
    with np.errstate(all="ignore"):
        most = torch.finfo(actual.dtype).max
        inside = np.asarray(~(np.isfinite(exact) & (np.abs(exact) + bound > most)))
    assert_within(actual[torch.from_numpy(inside)], exact[inside], bound[inside], label)


def check_forward(
    y: torch.Tensor,
    x: torch.Tensor,
    alpha: Any,
    *,
    dim: int = -1,
    initial_state: Any = None,
    reverse: bool = False,
    roundings: Roundings = KERNEL,
    label: str = "kernel",
) -> None:
    """Hold y = ema(x, ...) to the oracle: pointwise and, for kernels, by row."""
    options = {"dim": dim, "initial_state": initial_state, "reverse": reverse}
    expected = oracle.ema(x, alpha, **options)
    bound = pointwise_bound(x, alpha, roundings=roundings, **options)
    assert_within(y, expected, bound, f"{label} y")
    if roundings is KERNEL:
        limit = row_bound(expected, y.dtype, dim, initial_state)
        assert_within(y, expected, limit, f"{label} y by row")


def check_backward(
    grads: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    grad_y: torch.Tensor,
    x: torch.Tensor,
    alpha: Any,
    *,
    dim: int = -1,
    initial_state: Any = None,
    reverse: bool = False,
    grad_state: Any = None,
    roundings: Roundings = KERNEL,
    label: str = "kernel",
) -> None:
    """Hold the gradients (to x, alpha, initial_state; None: not asked for) to the oracle."""
    options = {
        "dim": dim, "initial_state": initial_state, "reverse": reverse, "grad_state": grad_state
    }  # fmt: skip
    exact = oracle.ema_backward(grad_y, x, alpha, **options)
    bounds = gradient_bounds(grad_y, x, alpha, roundings=roundings, **options)
    for name, grad in zip(("x", "alpha", "initial_state"), grads, strict=True):
        if grad is not None:
            expected, bound = getattr(exact, name), getattr(bounds, name)
            assert_within(grad, expected, bound, f"{label} grad {name}")


def conv_backward(
    grad_y: torch.Tensor, x: torch.Tensor, alpha: float, roundings: Roundings
) -> tuple[Array, Array]:
    """EMAConv's gradient to x: the exact one, and the bound with what the short kernel leaves out.

    The backward leaves out the same weights: for x[k], k > 0, those of later samples, at most
    `truncation` times the largest |grad_y|; x[0], whose weight in y[n] is (1 - alpha)**n, loses
    all of them together, a sum of 1 / alpha times as much.
    """
    exact = oracle.ema_backward(grad_y, x, alpha).x
    bound = gradient_bounds(grad_y, x, alpha, roundings=roundings).x
    left_out = roundings.truncation * np.abs(longdouble(grad_y)).max(axis=-1, keepdims=True)
    left_out = np.repeat(left_out, x.shape[-1], axis=-1)
    left_out[..., 0] /= alpha
    return exact, bound + left_out


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that states are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff."""
    return torch.finfo(dtype).eps / 2


def subnormal(dtype: torch.dtype) -> float:
    """The smallest number above 0: what a rounding costs in an underflow."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _forward(problem: Problem, roundings: Roundings, dtype: torch.dtype) -> tuple[Array, Array]:
    """ema(|x|) and the error bound, time first, before the result is stored."""
    with np.errstate(all="ignore"):
        drive = np.abs(problem.weight * problem.x)
        if len(drive) and problem.start is None:
            drive[0] = np.abs(problem.x[0])
        elif len(drive):
            drive[0] += np.abs(problem.keep[0] * problem.start)
    return _aged_sum(problem.weight, drive, roundings, dtype)


def _backward(
    problem: Problem, grad_y: Any, grad_state: Any, roundings: Roundings, dtype: torch.dtype
) -> tuple[Array, Array]:
    """The adjoint of |grad_y| and its error bound, time first (the problem's own direction)."""
    drive = np.abs(Problem.of(grad_y, 0.0, problem.dim, None, problem.reverse).x[::-1]).copy()
    if len(drive) and grad_state is not None:
        drive[0] += np.abs(longdouble(grad_state))
    size, error = _aged_sum(oracle.later(problem.weight), drive, roundings, dtype)
    return size[::-1], error[::-1]


def _plain_terms(
    problem: Problem, carried: Array, carried_error: Array, roundings: Roundings, dtype: torch.dtype
) -> Array:
    """By how much each term of alpha's gradient may be wrong: loop, matmul."""
    size, size_error = _forward(problem, roundings, dtype)
    first = problem.x[0] if problem.start is None else problem.start
    before = np.concatenate([np.abs(first)[None], size[:-1]])
    before_error = np.concatenate([np.zeros_like(first)[None], size_error[:-1]])
    span = np.abs(problem.x) + before
    count = problem.x.size * unit(roundings.partials or dtype) + 2 * unit(dtype)
    return carried_error * span + carried * (before_error + count * span)


def _kernel_terms(
    problem: Problem, adjoint: Array, carried: Array, carried_error: Array, dtype: torch.dtype
) -> Array:
    """By how much each term of alpha's gradient may be wrong: the kernels."""
    with np.errstate(all="ignore"):
        innovation = oracle.innovation(problem)
        size, near = np.abs(innovation), _range(problem.x)
        drive = np.abs(problem.weight) * near
        before = np.concatenate([near[:1] * 0, _magnitudes(problem.weight, drive)[:-1]])
        kappa = _magnitudes(oracle.later(problem.weight), carried[::-1].copy())[::-1]
        so_far = np.abs(np.cumsum((adjoint * innovation)[::-1], axis=0)[::-1])
        base, u = KERNEL.base, unit(dtype)
        unsure = _unsure(problem)
        before_unsure = np.concatenate([unsure[:1] * 0, unsure[:-1]]) + 3 * oracle.UNIT * size
        tiles = carried * (before_unsure + (base + 18) * u * (size + 4 * near) + base * u * before)
        rest = 9 * kappa * (size + near) + so_far
        return carried_error * size + tiles + unit(torch.float64) * rest


def _unsure(problem: Problem) -> Array:
    """The oracle's own error in the y of which it makes innovations."""
    return _forward(oracle.centred(problem), Roundings(base=0), torch.float64)[1]


def _shared_terms(
    factor: Array,
    y_error: Array,
    carried: Array,
    carried_error: Array,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    products: float,
) -> Array:
    """By how much lambda[n] * factor[n], made of the returned y[n-1], may be wrong in a sum to
    `shape`.
    """
    with np.errstate(all="ignore"):
        first = unit(dtype) * np.abs(factor[:1])
        before_error = np.concatenate([first, y_error[:-1]])
        size = np.abs(factor) + before_error
        terms = factor.size // max(1, math.prod(shape))
        count = products * unit(dtype) + (terms + 2) * unit(torch.float64)
        return carried_error * size + carried * (before_error + count * size) + subnormal(dtype)


def recurrence_bound(
    a: Any,
    b: torch.Tensor,
    *,
    dim: int = -1,
    initial_state: Any = None,
    reverse: bool = False,
    roundings: Roundings | None = None,
) -> Array:
    """Largest |error| allowed to each y of linear_recurrence(a, b, ...). Without roundings they are
    those of tiles for a constant a, and VARYING for any other.
    """
    problem = Recurrence.of(a, b, dim, initial_state, reverse)
    _, error = _recurrence_forward(problem, b.dtype, roundings)
    return problem.restore(_stored(problem.outputs(), error, b.dtype))


def check_recurrence(
    y: torch.Tensor,
    a: Any,
    b: torch.Tensor,
    *,
    label: str = "recurrence",
    **options: Any,
) -> None:
    """Hold y = linear_recurrence(a, b, **options) to the oracle."""
    expected = oracle.linear_recurrence(a, b, **options)
    assert_within(y, expected, recurrence_bound(a, b, **options), f"{label} y")


def recurrence_gradients(
    grad_y: torch.Tensor,
    a: Any,
    b: torch.Tensor,
    *,
    grad_state: Any = None,
    initial_state: Any = None,
    roundings: Roundings | None = None,
    **options: Any,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The gradients of linear_recurrence(a, b, ...) to a, b and initial_state, and their bounds."""
    problem = Recurrence.of(a, b, initial_state=initial_state, **options)
    dtype = accumulate_dtype(b.dtype)
    y, (_, y_error) = problem.outputs(), _recurrence_forward(problem, b.dtype, roundings)
    adjoint, before = problem.adjoint(grad_y, grad_state), problem.before(y)
    size = Recurrence.of(np.abs(problem.restore(problem.a)), np.abs(longdouble(grad_y)), **options)
    drive = size.b[::-1].copy()
    drive[:1] += np.abs(longdouble(0.0 if grad_state is None else grad_state))
    ways = _own(VARYING, b.dtype)
    carried, carried_error = _aged(np.roll(size.a, -1, axis=0)[::-1], drive, ways, dtype)
    carried, carried_error = carried[::-1], carried_error[::-1]
    y_error = _stored(y, y_error, b.dtype)
    coarser = max(dtype, accumulate_dtype(_dtype(a)), key=unit)
    terms = _shared_terms(
        before, y_error, carried, carried_error, coarser, problem.a_shape, ways.products
    )
    count = problem.b.size // max(1, math.prod(problem.b_shape)) + 2
    wide = count * unit(torch.float64) + unit(b.dtype)
    with np.errstate(all="ignore"):
        through = problem.a * adjoint, size.a * (carried_error + 3 * unit(dtype) * carried)
        if not len(adjoint):  # no steps: what comes from the state goes to the start
            handed_on = np.broadcast_to(
                longdouble(0.0 if grad_state is None else grad_state), problem.start.shape
            )
            through = handed_on[None], np.zeros_like(handed_on)[None]
        exact = problem.to_arguments(adjoint * before, adjoint, through[0][0])
        bound = problem.to_arguments(terms, carried_error + wide * carried, through[1][0])
    dtypes = _dtype(a), b.dtype, _dtype(initial_state)
    stored = (_stored(*pair) for pair in zip(exact, bound, dtypes, strict=True))
    return exact, tuple(stored)


def check_recurrence_backward(
    grads: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    grad_y: torch.Tensor,
    a: Any,
    b: torch.Tensor,
    *,
    label: str = "recurrence",
    **options: Any,
) -> None:
    """Hold the gradients (to a, b, initial_state; None: not asked for) to the oracle."""
    exact, bound = recurrence_gradients(grad_y, a, b, **options)
    for name, grad, want, error in zip(
        ("a", "b", "initial_state"), grads, exact, bound, strict=True
    ):
        if grad is not None:
            assert_within(grad, want, error, f"{label} grad {name}")


def _recurrence_forward(
    problem: Recurrence, dtype: torch.dtype, roundings: Roundings | None
) -> tuple[Array, Array]:
    """The recurrence of the magnitudes and the error bound, time first, before the store."""
    with np.errstate(all="ignore"):
        drive = np.abs(problem.b)
        drive[:1] += np.abs(problem.a[:1] * problem.start)
    # a constant is left to the kernels of tiles
    constant = len(problem.a) == 1 or problem.a.strides[0] == 0
    roundings = _own(roundings or (KERNEL if constant else VARYING), dtype)
    return _aged(np.abs(problem.a), drive, roundings, accumulate_dtype(dtype))


def _range(x: Array) -> Array:
    """Largest less smallest x among the samples fewer than TILE away, along the first axis."""
    high, low, width = x, x, 1
    while width < TILE:  # now over [n, n + width)
        edge = np.minimum(np.arange(len(x)) + width, len(x) - 1)
        high, low, width = np.maximum(high, high[edge]), np.minimum(low, low[edge]), 2 * width
    edge = np.maximum(np.arange(len(x)) - (TILE - 1), 0)
    return np.maximum(high, high[edge]) - np.minimum(low, low[edge])


def _magnitudes(weight: Array, drive: Array) -> Array:
    """total[n] = |1 - weight[n]| total[n-1] + drive[n]."""
    if (weight > 1).any():
        weight = np.where(weight > 1, 2 - weight, weight)
    return oracle.scan(weight, drive)


def _aged_sum(
    weight: Array, drive: Array, roundings: Roundings, dtype: torch.dtype
) -> tuple[Array, Array]:
    """total[n] = |keep| total + drive, and u * sum (base + per_step * age) * contribution."""
    if roundings in (VARYING, GROUPED):
        return _aged(np.abs(1 - weight), drive, roundings, dtype)
    here, exact = unit(dtype), oracle.UNIT
    base = here * roundings.base + exact * ORACLE.base
    keep = np.abs(1 - (weight[:1] if weight.strides[0] == 0 else weight))
    decay = np.abs(np.log(np.where(keep > 0, keep, 1)))
    per_step = here * roundings.per_step + exact * ORACLE.per_step
    per_step = per_step + unit(torch.float64) * roundings.per_decay * decay
    tiny = longdouble(subnormal(dtype))
    with np.errstate(all="ignore"):
        total = _magnitudes(weight, drive)
        error = np.zeros_like(total)
        ageing = per_step * keep
        error[1:] = (ageing if len(ageing) == 1 else ageing[1:]) * total[:-1]
        aged = _magnitudes(weight, error)
        floor = (roundings.base + roundings.per_step) * tiny
        return total, base * total + aged + _magnitudes(weight, np.full_like(total, floor))


def _aged(
    ratio: Array, drive: Array, roundings: Roundings, dtype: torch.dtype
) -> tuple[Array, Array]:
    """The same for a ratio per sample: total[n] = ratio[n] total[n-1] + drive[n], and the error."""
    wide, exact = unit(torch.float64), oracle.UNIT
    base = unit(dtype) * roundings.base + wide * roundings.base_wide + exact * ORACLE.base
    per_step = unit(dtype) * roundings.per_step + wide * roundings.per_step_wide
    per_step = per_step + exact * ORACLE.per_step
    tiny = longdouble(subnormal(torch.float64 if roundings is VARYING else dtype))
    tiny = tiny * (roundings.base + roundings.base_wide)
    with np.errstate(all="ignore"):
        per_step = per_step + wide * roundings.per_decay * np.abs(
            np.log(np.where(ratio[1:] > 0, ratio[1:], 1))
        )
        total = oracle.loop(ratio, drive)
        error = np.full_like(total, tiny)
        error[1:] += (per_step * ratio[1:] + tiny) * total[:-1]
        return total, base * total + oracle.loop(ratio, error)


def _stored(value: Array, error: Array, dtype: torch.dtype) -> Array:
    """The error bound once the value is rounded to dtype."""
    with np.errstate(all="ignore"):
        return error + unit(dtype) * (np.abs(value) + error) + subnormal(dtype)


def _dtype(value: Any) -> torch.dtype:
    return value.dtype if isinstance(value, torch.Tensor) else torch.float64
