"""The recurrence and its gradients in long double: the numbers every implementation is held to.

Plain loops in numpy's 80-bit long double, written from the formulas of the recurrence and sharing
no code with the package. Tensors of any float dtype enter exactly; so does a Python float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.longdouble]

#: Unit roundoff of the oracle itself.
UNIT = float(np.finfo(np.longdouble).eps) / 2


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
        values = _time_first(values, dim, reverse)
        start, start_shape = None, ()
        if initial_state is not None:
            start = longdouble(initial_state)
            start_shape = start.shape
            start = np.broadcast_to(start, values.shape[1:])
        return Problem(values, weight, 1 - weight, start, dim, reverse, factor.shape, start_shape)

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
    y = np.empty_like(problem.x)
    state = problem.start
    with np.errstate(all="ignore"):
        for n in range(len(y)):
            if state is None:
                state = problem.x[n]
            else:
                state = problem.keep[n] * state + problem.weight[n] * problem.x[n]
            y[n] = state
    return y


def adjoint(problem: Problem, grad_y: Any, grad_state: Any = None) -> Array:
    """lambda[n] = g[n] + (1 - alpha[n+1]) lambda[n+1], time first; grad_state joins the last g."""
    carried = np.empty_like(problem.x)
    g = _time_first(longdouble(grad_y), problem.dim, problem.reverse)
    with np.errstate(all="ignore"):
        later = longdouble(0.0 if grad_state is None else grad_state)
        for n in reversed(range(len(g))):
            carried[n] = g[n] + later
            later = problem.keep[n] * carried[n]
    return carried


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
        first = problem.x[0] if problem.start is None else problem.start
        previous = np.concatenate([np.expand_dims(first, 0), outputs(problem)[:-1]])
        grad_x = problem.weight * carried
        if problem.start is None:
            grad_x[0] = carried[0]
        grad_alpha = problem.to_alpha(carried * (problem.x - previous))
        grad_start = None
        if problem.start is not None:
            grad_start = problem.to_start(problem.keep[0] * carried[0])
    return Gradients(problem.restore(grad_x), grad_alpha, grad_start)


def _sum_to(terms: Array, shape: tuple[int, ...]) -> Array:
    padded = (1,) * (terms.ndim - len(shape)) + shape
    axes = tuple(i for i, size in enumerate(padded) if size == 1)
    return terms.sum(axis=axes, keepdims=True).reshape(shape)


def _time_first(values: Array, dim: int, reverse: bool) -> Array:
    moved = np.moveaxis(values, dim, 0)
    return moved[::-1] if reverse else moved
