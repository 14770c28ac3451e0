"""The recurrence and its gradients in long double: the numbers every implementation is held to.

One loop in numpy's 80-bit long double (`scan`), written from the formulas of the recurrence and
sharing no code with the package. Tensors of any float dtype enter exactly; so does a Python float.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.longdouble]

#: Unit roundoff of the oracle itself.
UNIT = float(np.finfo(np.longdouble).eps) / 2

#: From this length on a row of one alpha is scanned in stretches side by side.
LONG = 256


def longdouble(value: Any) -> Array:
    """The same numbers in long double; torch tensors, numpy arrays and floats alike."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().to(torch.float64).numpy()
    return np.asarray(value, dtype=np.longdouble)


@dataclass(frozen=True)
class Problem:
    """One call with time first and running forward; every array is (length, *rest)."""

    x: Array
    weight: Array  # alpha, expanded to x's shape
    keep: Array  # 1 - alpha
    start: Array | None  # (*rest)
    dim: int
    reverse: bool
    alpha_shape: tuple[int, ...]
    start_shape: tuple[int, ...]

    @staticmethod
    def of(
        x: Any, alpha: Any, dim: int = -1, initial_state: Any = None, reverse: bool = False
    ) -> Problem:
        values, factor = longdouble(x), longdouble(alpha)
        weight = _time_first(np.broadcast_to(factor, values.shape), dim, reverse)
        keep = _time_first(np.broadcast_to(1 - factor, values.shape), dim, reverse)
        values = _time_first(values, dim, reverse)
        start, start_shape = None, ()
        if initial_state is not None:
            start = longdouble(initial_state)
            start_shape = start.shape
            start = np.broadcast_to(start, values.shape[1:])
        return Problem(values, weight, keep, start, dim, reverse, factor.shape, start_shape)

    def restore(self, values: Array) -> Array:
        """Undo the layout: time back to its dimension and direction."""
        return np.moveaxis(values[::-1] if self.reverse else values, 0, self.dim)

    def to_alpha(self, terms: Array) -> Array:
        """Sum terms, time first, over everything alpha was expanded along."""
        return _sum_to(self.restore(terms), self.alpha_shape)

    def to_start(self, terms: Array) -> Array:
        """Sum terms of x's shape without time over everything initial_state was expanded along."""
        return _sum_to(terms, self.start_shape)


@dataclass(frozen=True)
class Gradients:
    """What backward returns; initial_state is None where the call had none."""

    x: Array
    alpha: Array
    initial_state: Array | None


def ema(
    x: Any, alpha: Any, *, dim: int = -1, initial_state: Any = None, reverse: bool = False
) -> Array:
    """y[n] = (1 - alpha) y[n-1] + alpha x[n], of x's shape."""
    problem = Problem.of(x, alpha, dim, initial_state, reverse)
    return problem.restore(outputs(problem))


def outputs(problem: Problem) -> Array:
    """y with time first."""
    with np.errstate(all="ignore"):
        drive = problem.weight * problem.x
        if not len(drive):
            return drive
        if problem.start is None:
            drive[0] = problem.x[0]
        else:
            drive[0] += problem.keep[0] * problem.start
    return scan(problem.weight, drive)


def adjoint(problem: Problem, grad_y: Any, grad_state: Any = None) -> Array:
    """lambda[n] = g[n] + (1 - alpha[n+1]) lambda[n+1], time first; grad_state joins the last g."""
    g = _time_first(longdouble(grad_y), problem.dim, problem.reverse)[::-1].copy()
    if len(g) and grad_state is not None:
        g[0] += longdouble(grad_state)
    return scan(later(problem.weight), g)[::-1]


def centred(problem: Problem) -> Problem:
    """The same with every sample and the start measured from the start, which is y[-1]."""
    first = problem.x[0] if problem.start is None else problem.start
    with np.errstate(all="ignore"):
        return replace(problem, x=problem.x - first, start=np.zeros_like(first))


def innovation(problem: Problem) -> Array:
    """x[n] - y[n-1], time first; of a constant exactly 0."""
    if not len(problem.x):
        return problem.x
    with np.errstate(all="ignore"):
        moved = centred(problem)
        return moved.x - np.concatenate([moved.x[:1] * 0, outputs(moved)[:-1]])


def later(weight: Array) -> Array:
    """The weights of the adjoint's scan, which runs from the last sample to the first."""
    return weight[::-1] if _constant(weight) else np.roll(weight, -1, axis=0)[::-1]


def scan(weight: Array, drive: Array) -> Array:
    """total[n] = (1 - weight[n]) total[n-1] + drive[n] from total[-1] = 0, time first.

    The loop, sample by sample. A long row of one weight in [0, 1] is laid out as stretches that the
    loop walks along side by side, each from zero; powers of 1 - weight then bring in the total
    before each. That is the more exact as well: 1e5 steps with a 1 - weight that has been rounded
    to long double cost 16 bits. Infinities take the plain loop, for a power may underflow to 0.
    """
    with np.errstate(all="ignore"):
        side_by_side = (
            len(drive) >= LONG
            and _constant(weight)
            and bool(((weight[0] >= 0) & (weight[0] <= 1)).all())
            and bool(np.isfinite(drive).all())
        )
        if side_by_side:
            return _scan_stretches(weight[0], drive)
        return loop(1 - weight, drive)


def loop(ratio: Array, drive: Array) -> Array:
    """total[n] = ratio[n] total[n-1] + drive[n] from total[-1] = 0, time first."""
    with np.errstate(all="ignore"):
        total = np.empty_like(drive)
        total[:1] = drive[:1]
        for n in range(1, len(drive)):
            total[n] = ratio[n] * total[n - 1] + drive[n]
        return total


def _scan_stretches(weight: Array, drive: Array) -> Array:
    steps = min(int(len(drive) ** 0.5), 512)
    count = -(-len(drive) // steps)
    rest = drive.shape[1:]
    total = np.zeros((count * steps, *rest), np.longdouble)
    total[: len(drive)] = drive
    # step by stretch: what the loop reads at once lies together
    total = np.ascontiguousarray(total.reshape(count, steps, *rest).swapaxes(0, 1))
    for i in range(1, steps):
        total[i] += (1 - weight) * total[i - 1]
    ages = np.arange(1, steps + 1).reshape(steps, *(1 for _ in rest))
    power = np.exp(ages * np.log1p(-weight))
    before = np.zeros((count, *rest), np.longdouble)
    for k in range(1, count):
        before[k] = total[-1, k - 1] + power[-1] * before[k - 1]
    for i in range(steps):
        total[i] += power[i] * before
    return total.swapaxes(0, 1).reshape(count * steps, *rest)[: len(drive)]


def ema_backward(
    grad_y: Any,
    x: Any,
    alpha: Any,
    *,
    dim: int = -1,
    initial_state: Any = None,
    reverse: bool = False,
    grad_state: Any = None,
) -> Gradients:
    """Gradients of sum(grad_y * y) + sum(grad_state * last y), each in its own shape."""
    problem = Problem.of(x, alpha, dim, initial_state, reverse)
    carried = adjoint(problem, grad_y, grad_state)
    if not len(carried):
        through = np.broadcast_to(
            longdouble(0.0 if grad_state is None else grad_state), problem.x.shape[1:]
        )
        empty = None if problem.start is None else problem.to_start(through)
        return Gradients(problem.restore(carried), problem.to_alpha(carried), empty)
    with np.errstate(all="ignore"):
        grad_x = problem.weight * carried
        if problem.start is None:
            grad_x[0] = carried[0]
        grad_alpha = problem.to_alpha(carried * innovation(problem))
        grad_start = None
        if problem.start is not None:
            grad_start = problem.to_start(problem.keep[0] * carried[0])
    return Gradients(problem.restore(grad_x), grad_alpha, grad_start)


@dataclass(frozen=True)
class Recurrence:
    """One call of linear_recurrence with time first and running forward, a and b broadcast."""

    a: Array
    b: Array
    start: Array  # (*rest), 0 where there is none
    dim: int
    reverse: bool
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    start_shape: tuple[int, ...]

    @staticmethod
    def of(
        a: Any, b: Any, dim: int = -1, initial_state: Any = None, reverse: bool = False
    ) -> Recurrence:
        ratio, drive = longdouble(a), longdouble(b)
        shape = np.broadcast_shapes(ratio.shape, drive.shape)
        moved = [
            _time_first(np.broadcast_to(values, shape), dim, reverse) for values in (ratio, drive)
        ]
        start = longdouble(0.0 if initial_state is None else initial_state)
        whole = np.broadcast_to(start, moved[0].shape[1:])
        return Recurrence(*moved, whole, dim, reverse, ratio.shape, drive.shape, start.shape)

    def restore(self, values: Array) -> Array:
        """Undo the layout: time back to its dimension and direction."""
        return np.moveaxis(values[::-1] if self.reverse else values, 0, self.dim)

    def to_arguments(self, a: Array, b: Array, start: Array) -> tuple[Array, Array, Array]:
        """Terms, time first, summed to the shape of each argument."""
        return (
            _sum_to(self.restore(a), self.a_shape),
            _sum_to(self.restore(b), self.b_shape),
            _sum_to(start, self.start_shape),
        )

    def outputs(self) -> Array:
        """y with time first."""
        with np.errstate(all="ignore"):
            drive = self.b.copy()
            drive[:1] += self.a[:1] * self.start
        return loop(self.a, drive)

    def adjoint(self, grad_y: Any, grad_state: Any = None) -> Array:
        """lambda[n] = g[n] + a[n+1] lambda[n+1], time first; grad_state joins the last g."""
        g = _time_first(longdouble(grad_y), self.dim, self.reverse)[::-1].copy()
        if len(g) and grad_state is not None:
            g[0] += longdouble(grad_state)
        return loop(np.roll(self.a, -1, axis=0)[::-1], g)[::-1]

    def before(self, y: Array) -> Array:
        """y[n-1]."""
        return np.concatenate([self.start[None], y[:-1]])[: len(y)]


def linear_recurrence(
    a: Any, b: Any, *, dim: int = -1, initial_state: Any = None, reverse: bool = False
) -> Array:
    """y[n] = a[n] y[n-1] + b[n], of the shape that a and b broadcast to."""
    problem = Recurrence.of(a, b, dim, initial_state, reverse)
    return problem.restore(problem.outputs())


def _constant(weight: Array) -> bool:
    """Whether time is broadcast."""
    return weight.strides[0] == 0 or len(weight) == 1


def _sum_to(terms: Array, shape: tuple[int, ...]) -> Array:
    padded = (1,) * (terms.ndim - len(shape)) + shape
    axes = tuple(i for i, size in enumerate(padded) if size == 1)
    return terms.sum(axis=axes, keepdims=True).reshape(shape)


def _time_first(values: Array, dim: int, reverse: bool) -> Array:
    moved = np.moveaxis(values, dim, 0)
    return moved[::-1] if reverse else moved
