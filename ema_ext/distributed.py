"""Scans over a time axis that is sharded across a process group.

Each rank holds a contiguous piece of the sequence, in the order of the ranks; pieces may differ in
length, and any of them may be empty. What the past contributes to a piece is one number per row,
its carry, and that is all that travels. With c the coefficients of the recurrence, a piece that
starts from the carry s ends in

    aggregate + product * s,    aggregate: its end when scanned from zero,    product: that of c.

So every rank (1) reads its piece once for the aggregate and the product, (2) gathers those of all
ranks, (3) folds the ones before it, in order, into its carry, and (4) scans its piece from there:
the law that the kernels use between the tiles of a row, here between ranks. The backward pass is
the same with time reversed: the aggregate is that of the adjoint, and what comes in is the gradient
of the state that this rank handed on (docs/gradients.md).

Aggregates and products travel and are folded in float64, 24 bytes per row and rank: so the rounding
does not grow with the number of ranks, and a message this small costs its latency anyway.

The engine is torch.distributed, its functional collectives, and any backend: gloo on the CPU, nccl
on CUDA. Every rank meets the same collectives in the same order, whatever it holds, in every pass:
one call of `_Sharded` is two all-gathers, its backward pass one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import Function

from ema_ext import _autograd, _checks, _ops, _sharding
from ema_ext._autograd import accumulate_dtype, ends, fused_backward, previous, sum_to, varies
from ema_ext._line import Group, Lengths, Line
from ema_ext._product import Product, fold

__all__ = ["ema", "linear_recurrence"]

#: A piece is aggregated in parts of about this many samples, so that the scan's output, which
#: nobody wants, stays in the cache and only x itself passes through memory.
PART_SAMPLES = 2**20
#: Time steps of a part, at least: with very many rows the ends of the parts would take up memory.
PART_STEPS = 256


@overload
def ema(
    x: Tensor,
    alpha: float | Tensor,
    *,
    group: Group = None,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: Literal[False] = False,
) -> Tensor: ...


@overload
def ema(
    x: Tensor,
    alpha: float | Tensor,
    *,
    group: Group = None,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def ema(
    x: Tensor,
    alpha: float | Tensor,
    *,
    group: Group = None,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def ema(
    x: Tensor,
    alpha: float | Tensor,
    *,
    group: Group = None,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ema_ext.ema` of the sequence whose pieces the ranks of ``group`` hold, in rank order.

    Collective: every rank of the group calls it with the same arguments but for its own piece of
    x and of what varies in time, and, where any argument wants a gradient, every rank runs the same
    backward passes, to the same arguments.

    Args:
        x: this rank's piece: as in `ema_ext.ema`. All pieces have the same dtype, and the same
            shape but for ``dim``, along which each may have any length, 0 included.
        alpha: as in `ema_ext.ema`. One that varies along ``dim`` is cut as x is, each rank giving
            its own piece; one that is constant in time is the same on every rank.
        group: the process group; None is the default group of ``torch.distributed``.
        dim: the dimension of time.
        initial_state: the average before the first sample of the whole sequence; the same on every
            rank. None starts at that sample itself, on the first rank that has one.
        reverse: run from the last sample of the last rank to the first of the first.
        return_state: return ``(y, state)``. ``state`` is the average after the whole sequence, the
            same on every rank, of x's shape without ``dim`` and in the dtype that `ema_ext.ema`
            gives it.

    Returns:
        This rank's piece of ``y``, or ``(y, state)``, within the error of a single process. Pieces
        cut elsewhere may differ in the last bits; the same pieces give the same bits.

    Gradients of any order reach x, alpha and initial_state, for the sum of the losses of all ranks.
    A rank's gradient to an argument that all ranks share (a constant alpha, initial_state) is its
    own share; the sum of the shares is the gradient of a single process. Where alpha wants a
    gradient, x and y are kept for it. Forward mode and the transforms of ``torch.func`` raise, and
    ``torch.compile`` leaves the call as it is: it breaks the graph, or raises with fullgraph.

    Traffic: 16 bytes per rank for the lengths and 24 per rank and row for the carries, whatever the
    length; in the backward pass 8, or 16 if the state is returned.

    Raises:
        What `ema_ext.ema` raises, on the rank whose argument it is; and
        RuntimeError: torch.distributed is not initialised; this process is no member of ``group``.
        TypeError: an argument is a DTensor: ``to_local()`` gives the piece.
        ValueError, on every rank: the pieces' shapes without ``dim``, their dtypes, or any other
            argument that must be common, differ between two ranks, which it names; the state of a
            sequence without samples and without initial_state is asked for.
        A rank that fails leaves the others waiting until the group's timeout ends their call.
    """
    return _untraced(_EMA, alpha, x, group, dim, initial_state, reverse, return_state)


@overload
def linear_recurrence(
    a: float | Tensor,
    b: Tensor,
    *,
    group: Group = None,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_recurrence(
    a: float | Tensor,
    b: Tensor,
    *,
    group: Group = None,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_recurrence(
    a: float | Tensor,
    b: Tensor,
    *,
    group: Group = None,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_recurrence(
    a: float | Tensor,
    b: Tensor,
    *,
    group: Group = None,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ema_ext.linear_recurrence` of the sequence whose pieces the ranks of ``group`` hold.

    Collective, and in all else as `ema_ext.distributed.ema`: a and b are this rank's pieces, except
    that one of them, or both, may be constant in time, and then is the same on every rank. Without
    initial_state the sequence starts from 0.

    Args:
        a: as in `ema_ext.linear_recurrence`, of this rank's piece.
        b: likewise; a and b together have the length of the piece, which may be 0.
        group, dim, initial_state, reverse, return_state: as in `ema_ext.distributed.ema`.

    Returns:
        This rank's piece of ``y``, or ``(y, state)``, within the error of a single process, as long
        as no state overflows. From rank to rank, as from chunk to chunk, the state is one of the
        accumulate dtype and may be infinite where a single process still carries a float64 on; and
        one that left the range of float64 and met a = 0 in the same piece is NaN there and, to the
        ranks that follow, reset.

    Gradients of any order reach a, b and initial_state as those of `ema` reach their arguments;
    where a wants one, b and y are kept.

    Raises:
        What `ema_ext.linear_recurrence` raises, on the rank whose argument it is, and what
        `ema_ext.distributed.ema` raises beside that.
    """
    return _untraced(_LinearRecurrence, a, b, group, dim, initial_state, reverse, return_state)


Coefficient = float | Tensor  # alpha or a; float for ema only
Start = Tensor | None


class _EMA:
    """y[n] = (1 - alpha) * y[n-1] + alpha * x[n]; without a start, y[0] = x[0]."""

    name, samples, coefficient = "ema", "x", "alpha"
    starts_at_first_sample = True

    @staticmethod
    def checked(alpha: Any, x: Any, dim: Any) -> tuple[Tensor, Coefficient, int]:
        """The samples, the coefficient and the dimension of time."""
        x = _checks.input_tensor("x", x)
        dim = _checks.dimension(dim, x)
        return x, _checks.smoothing_weight(alpha, x), dim

    @staticmethod
    def scan(x: Tensor, alpha: Coefficient, start: Start, dim: int, reverse: bool) -> Tensor:
        op = _ops.ema if isinstance(alpha, float) else _ops.ema_tensor
        return op(x, alpha, start, dim, reverse)

    @staticmethod
    def end(x: Tensor, alpha: Coefficient, start: Start, dim: int, reverse: bool) -> Tensor:
        """The state after x."""
        op = _ops.ema_with_state if isinstance(alpha, float) else _ops.ema_with_state_tensor
        return op(x, alpha, start, dim, reverse)[1]

    @staticmethod
    def ratio(alpha: Coefficient, x: Tensor) -> Tensor:
        """The weight of the past, in float64."""
        return 1 - torch.as_tensor(alpha, dtype=torch.float64, device=x.device)

    @staticmethod
    def power(alpha: Coefficient, x: Tensor, steps: int) -> Product:
        """ratio ** steps, by log1p where it is positive: itself it has lost digits of alpha."""
        weight = torch.as_tensor(alpha, dtype=torch.float64, device=x.device)
        log = torch.where(weight < 1, torch.log1p(-weight), torch.log(weight - 1))
        return Product.power(1 - weight, log, steps)

    @staticmethod
    def adjoint_end(grad_y: Tensor, alpha: Coefficient, dim: int, reverse: bool) -> Tensor:
        """The gradient to the state before a piece, as far as it comes from the piece, for an alpha
        constant in time."""
        zero = grad_y.new_zeros(())
        return _EMA.backward(grad_y, None, None, alpha, None, zero, dim, reverse)[2]

    @staticmethod
    def backward(
        grad_y: Tensor, grad_state: Start, x: Start, alpha: Coefficient, y: Start, start: Start,
        dim: int, reverse: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        """The gradients to x, alpha and start; x and y may be None where alpha's is not wanted."""
        if isinstance(alpha, float):
            grad_x, grad_start = _ops.ema_backward(
                grad_y, grad_state, alpha, start is not None, dim, reverse
            )
            return grad_x, None, grad_start
        return fused_backward(grad_y, grad_state, x, y, alpha, start, dim, reverse)

    @staticmethod
    def composed(
        adjoint: Tensor, alpha: Coefficient, x: Start, before: Start
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients to x and alpha from lambda, x and y[n-1], by differentiable operations."""
        weight = torch.as_tensor(alpha, dtype=adjoint.dtype, device=adjoint.device)
        if not isinstance(alpha, Tensor) or x is None or before is None:
            return weight * adjoint, None
        grad_alpha = sum_to(adjoint * (x.to(adjoint.dtype) - before), alpha.detach())
        return weight * adjoint, grad_alpha


class _LinearRecurrence:
    """y[n] = a[n] * y[n-1] + b[n], from 0 or a start. The methods are those of _EMA."""

    name, samples, coefficient = "linear_recurrence", "b", "a"
    starts_at_first_sample = False

    @staticmethod
    def checked(a: Any, b: Any, dim: Any) -> tuple[Tensor, Coefficient, int]:
        a, b, shape = _checks.recurrence(a, b)
        if b.shape != shape:
            b = _autograd.expand(b, b.dtype, *shape)
        return b, a, _checks.dimension(dim, b)

    @staticmethod
    def scan(b: Tensor, a: Coefficient, start: Start, dim: int, reverse: bool) -> Tensor:
        return _ops.linear_recurrence(a, b, start, dim, reverse)

    @staticmethod
    def end(b: Tensor, a: Coefficient, start: Start, dim: int, reverse: bool) -> Tensor:
        return _ops.linear_recurrence_with_state(a, b, start, dim, reverse)[1]

    @staticmethod
    def ratio(a: Coefficient, b: Tensor) -> Tensor:
        return torch.as_tensor(a, dtype=torch.float64, device=b.device)

    @staticmethod
    def power(a: Coefficient, b: Tensor, steps: int) -> Product:
        ratio = _LinearRecurrence.ratio(a, b)
        return Product.power(ratio, ratio.abs().log(), steps)

    @staticmethod
    def adjoint_end(grad_y: Tensor, a: Coefficient, dim: int, reverse: bool) -> Tensor:
        end = _LinearRecurrence.end(grad_y, a, None, dim, not reverse)
        return end * _per_row(_LinearRecurrence.ratio(a, grad_y), grad_y, dim)

    @staticmethod
    def backward(
        grad_y: Tensor, grad_state: Start, _: Start, a: Coefficient, y: Start, start: Start,
        dim: int, reverse: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        # y is read for a's gradient alone: where nobody wants that, any of its shape will do
        grad_a, grad_b, grad_start = _ops.linear_recurrence_backward(
            grad_y, grad_state, a, grad_y if y is None else y, start, dim, reverse
        )
        return grad_b, grad_a, grad_start

    @staticmethod
    def composed(
        adjoint: Tensor, a: Coefficient, _: Start, before: Start
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(a, Tensor) or before is None:
            return adjoint, None
        return adjoint, sum_to(adjoint * before, a.detach())


@dataclass(frozen=True)
class _Problem:
    """One call, without its tensors."""

    recurrence: type[_EMA] | type[_LinearRecurrence]
    line: Line
    dim: int
    return_state: bool

    def common(self, x: Tensor, start: Start, wanted: tuple[bool, bool]) -> dict[str, object]:
        """What all ranks must agree on, by the name that an error gives it."""
        samples, coefficient = self.recurrence.samples, self.recurrence.coefficient
        return {
            "the function called": self.recurrence.name,
            f"the number of dimensions of {samples}": x.dim(),
            "dim": self.dim,
            f"the shape of {samples} without dim {self.dim}": _checks.state_shape(x, self.dim),
            f"the dtype of {samples}": x.dtype,
            "reverse": self.line.reverse,
            "return_state": self.return_state,
            "whether there is an initial_state": start is not None,
            "whether any argument requires a gradient": wanted[0],
            f"whether {coefficient} requires a gradient": wanted[1],
        }

    def aggregate(
        self, x: Tensor, coefficient: Coefficient, begins: bool
    ) -> tuple[Tensor, Product]:
        """The end of this piece when scanned from zero, or if it begins the sequence from its first
        sample, and the product of its coefficients."""
        dim, reverse, zero = self.dim, self.line.reverse, x.new_zeros(())
        found: list[Tensor] = []
        products: list[Product] = []
        for part, weight in self._parts(x, coefficient, reverse):
            start = None if begins and not found else zero
            found.append(_wide(self.recurrence.end, part, weight, start, dim, reverse))
            products.append(self._product(part, weight))
        return _joined(found, products), Product.chain(products)

    def aggregate_adjoint(self, grad_y: Tensor, coefficient: Coefficient) -> Tensor:
        """The gradient to this piece's carry as far as it comes from this piece."""
        dim, reverse = self.dim, self.line.reverse
        parts = self._parts(grad_y, coefficient, not reverse)
        found = [_wide(self._adjoint_end, part, weight, dim, reverse) for part, weight in parts]
        if len(parts) == 1:
            return found[0]
        return _joined(found, [self._product(part, weight) for part, weight in parts])

    def _adjoint_end(
        self, grad_y: Tensor, coefficient: Coefficient, dim: int, reverse: bool
    ) -> Tensor:
        if isinstance(coefficient, float) or not varies(coefficient, grad_y, dim):
            return self.recurrence.adjoint_end(grad_y, coefficient, dim, reverse)
        # lambda[n] meets the coefficient of n + 1, the last one none: that starts the scan
        ratio, axis = self.recurrence.ratio(coefficient, grad_y), dim - grad_y.dim()
        first, last = ends(grad_y.shape[dim], reverse)
        rest, turned = grad_y.shape[dim] - 1, int(reverse)
        _, end = _ops.linear_recurrence_with_state(
            ratio.narrow(axis, 1 - turned, rest),
            grad_y.narrow(dim, turned, rest),
            grad_y.select(dim, last),
            dim,
            not reverse,
        )
        return end * ratio.select(axis, first)

    def _product(self, part: Tensor, coefficient: Coefficient) -> Product:
        """The product of the coefficients over a part, of the shape of its state."""
        dim, steps = self.dim, part.shape[self.dim]
        shape = _checks.state_shape(part, dim)
        if isinstance(coefficient, float) or not varies(coefficient, part, dim):
            power = self.recurrence.power(coefficient, part, steps)
            mantissa, exponent = (_per_row(value, part, dim) for value in power)
        else:
            ratio = self.recurrence.ratio(coefficient, part)
            mantissa, exponent = Product.of(ratio, dim - part.dim())
        return Product(mantissa.expand(shape), exponent.expand(shape))

    def _parts(
        self, x: Tensor, coefficient: Coefficient, reverse: bool
    ) -> list[tuple[Tensor, Coefficient]]:
        """A piece cut along time, in the order in which a scan in that direction meets the parts;
        all are of one length but the first."""
        dim, length = self.dim, x.shape[self.dim]
        rows = math.prod(_checks.state_shape(x, dim))
        steps = max(PART_STEPS, PART_SAMPLES // max(rows, 1))
        short = [length % steps] if length % steps else []
        sizes = short + [steps] * (length // steps)
        sizes = sizes[::-1] if reverse else sizes
        parts = torch.split_with_sizes(x, sizes, dim)
        weights: Sequence[Coefficient] = [coefficient] * len(parts)
        if isinstance(coefficient, Tensor) and varies(coefficient, x, dim):
            weights = torch.split_with_sizes(coefficient, sizes, dim - x.dim())
        pairs = list(zip(parts, weights, strict=True))
        return pairs[::-1] if reverse else pairs


class _Sharded(Function):
    """This rank's share of a scan over the whole line.

    Arguments: problem, x, coefficient, start (float64, of x's shape without time, or None), and
    whether any argument, and whether the coefficient, wants a gradient.
    Returns y, the state after the whole line and the state before this rank's piece, both float64;
    the latter is 0 where y starts at this rank's first sample.
    """

    @staticmethod
    def forward(
        ctx: Any,
        problem: _Problem,
        x: Tensor,
        coefficient: Coefficient,
        start: Start,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        line, dim, length = problem.line, problem.dim, x.shape[problem.dim]
        under_way = Lengths(line, length, problem.common(x, start, wanted), x)
        from_sample = start is None and problem.recurrence.starts_at_first_sample
        begins = from_sample and line.place == 0 and length > 0
        message = _message(problem, x, coefficient, begins)

        lengths = under_way.wait()
        if from_sample and problem.return_state and not any(lengths):
            raise ValueError(
                "return_state: there is no sample on any rank and initial_state is None, so there "
                "is no state to return"
            )
        if from_sample and line.place > 0 and length > 0 and not any(lengths[: line.place]):
            begins = True  # only now known: all pieces before this one are empty
            message = _message(problem, x, coefficient, begins)
        aggregates, mantissas, exponents = line.gather(message).unbind(1)
        products = Product(mantissas, exponents)
        states = fold(
            aggregates, products, torch.zeros_like(message[0]) if start is None else start
        )
        carry = states[line.place]

        if length:
            arguments = coefficient, None if begins else carry, dim, line.reverse
            y = problem.recurrence.scan(x, *arguments)
        else:
            y = torch.empty_like(x)
        ctx.problem, ctx.begins = problem, begins
        ctx.number = coefficient if isinstance(coefficient, float) else None
        tensor = None if isinstance(coefficient, float) else coefficient
        kept = (x, y) if ctx.needs_input_grad[2] else (None, None)
        ctx.save_for_backward(*kept, carry, tensor, *products)
        return y, states[-1], carry

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor, grad_carry: Tensor) -> Any:
        gradients = _composed_backward if torch.is_grad_enabled() else _fused_backward
        return None, *gradients(ctx, grad_y, grad_state, grad_carry), None


def _fused_backward(
    ctx: Any, grad_y: Tensor, grad_state: Tensor, grad_carry: Tensor
) -> tuple[Tensor, Start, Start]:
    """The gradients of _Sharded to x, coefficient and start, by the native operators."""
    problem: _Problem = ctx.problem
    line, dim, length = problem.line, problem.dim, grad_y.shape[problem.dim]
    x, y, carry, coefficient, *products = ctx.saved_tensors
    coefficient = ctx.number if coefficient is None else coefficient

    own = grad_carry
    if length:
        own = own + problem.aggregate_adjoint(grad_y, coefficient)
    message = torch.stack([own, grad_state] if problem.return_state else [own])
    gathered = line.gather(message)
    last = gathered[:, 1].sum(0) if problem.return_state else torch.zeros_like(own)
    turned = Product(*(value.flip(0) for value in products))
    to_states = fold(gathered[:, 0].flip(0), turned, last).flip(0)

    if length:
        start = None if ctx.begins else carry
        grad_x, grad_coefficient, _ = problem.recurrence.backward(
            grad_y, to_states[line.place + 1], x, coefficient, y, start, dim, line.reverse
        )
    else:
        grad_x, grad_coefficient = torch.empty_like(grad_y), None
    if not ctx.needs_input_grad[2]:
        grad_coefficient = None
    elif not length:
        grad_coefficient = torch.zeros_like(coefficient)
    grad_start = to_states[0] if line.place == 0 else torch.zeros_like(to_states[0])
    return grad_x, grad_coefficient, grad_start if ctx.needs_input_grad[3] else None


def _composed_backward(
    ctx: Any, grad_y: Tensor, grad_state: Tensor, grad_carry: Tensor
) -> tuple[Tensor, Start, Start]:
    """The same out of differentiable parts.

    With lambda[n] the adjoint, mu[n] = ratio[n] * lambda[n] is the gradient to y[n-1] as far as it
    comes through y[n]: the recurrence mu[n] = ratio[n] * (mu[n+1] + g[n]), sharded as x is, which
    never meets the coefficient of another rank. lambda[n] = g[n] + mu[n+1].
    """
    problem: _Problem = ctx.problem
    line, dim, length = problem.line, problem.dim, grad_y.shape[problem.dim]
    x, y, carry, coefficient, *_ = ctx.saved_tensors
    coefficient = ctx.number if coefficient is None else coefficient
    first, _ = ends(length, line.reverse)
    begins = ctx.begins

    g = _taped(grad_y.to(accumulate_dtype(grad_y)))
    ratio = problem.recurrence.ratio(coefficient, g)
    drive = (ratio * g).to(g.dtype)
    last = None
    if problem.return_state:
        last = line.total(_taped(grad_state))
    if length:  # what the state before this piece meets beside the piece
        drive = drive.select_scatter(drive.select(dim, first) + grad_carry.to(g.dtype), dim, first)
    turned = _Problem(_LinearRecurrence, line.turned(), dim, True)
    mu, to_start, incoming = _apply(turned, drive, ratio, last)
    adjoint = g + _shifted(mu, incoming, dim, not line.reverse)

    before = None
    if y is not None:
        start = x.select(dim, first) if begins else carry
        before = _shifted(y.to(g.dtype), start, dim, line.reverse)
    grad_x, grad_coefficient = problem.recurrence.composed(adjoint, coefficient, x, before)
    if begins:  # y[0] = x[0]
        grad_x = grad_x.select_scatter(adjoint.select(dim, first), dim, first)
    grad_start = torch.where(torch.tensor(line.place == 0, device=g.device), to_start, 0.0)
    return (
        grad_x.to(grad_y.dtype),
        grad_coefficient if ctx.needs_input_grad[2] else None,
        grad_start if ctx.needs_input_grad[3] else None,
    )


def _apply(
    problem: _Problem, x: Tensor, coefficient: Coefficient, start: Start
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [value for value in (x, coefficient, start) if isinstance(value, Tensor)]
    learns = isinstance(coefficient, Tensor) and coefficient.requires_grad
    wanted = any(tensor.requires_grad for tensor in tensors), learns
    if not torch.is_grad_enabled():
        wanted = False, False
    result: tuple[Tensor, Tensor, Tensor] = _Sharded.apply(problem, x, coefficient, start, wanted)  # type: ignore[no-untyped-call]
    return result


def _call(
    recurrence: type[_EMA] | type[_LinearRecurrence],
    coefficient: Any,
    x: Any,
    group: Group,
    dim: Any,
    initial_state: Any,
    reverse: bool,
    return_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Either function, its arguments not yet checked."""
    line = Line.of(group, reverse)
    names = recurrence.samples, recurrence.coefficient, "initial_state"
    for name, value in zip(names, (x, coefficient, initial_state), strict=True):
        _sharding.refuse(name, value)
    x, coefficient, dim = recurrence.checked(coefficient, x, dim)
    if isinstance(coefficient, Tensor):
        coefficient = coefficient.to(x.device)
    start = _checks.start_state(initial_state, x, dim, recurrence.samples)
    if start is not None:  # in float64 and full shape; autograd undoes both
        start = _autograd.expand(start.to(x.device), torch.float64, *_checks.state_shape(x, dim))
    problem = _Problem(recurrence, line, dim, bool(return_state))
    y, state, _ = _apply(problem, x, coefficient, start)
    return (y, state.to(accumulate_dtype(x))) if return_state else y


def _message(problem: _Problem, x: Tensor, coefficient: Coefficient, begins: bool) -> Tensor:
    """What a rank tells the others: aggregate, and mantissa and exponent of the product."""
    if x.shape[problem.dim] == 0:
        message = x.new_zeros((3, *_checks.state_shape(x, problem.dim)), dtype=torch.float64)
        message[1] = 0.5
        message[2] = 1.0  # 0.5 * 2 ** 1: nothing happens to the state
        return message
    aggregate, product = problem.aggregate(x, coefficient, begins)
    return torch.stack([aggregate, *product])


def _wide(end: Callable[..., Tensor], samples: Tensor, *arguments: Any) -> Tensor:
    """``end`` in float64; where the accumulate dtype of the samples is too small for it, computed
    in float64 as well, for what it meets on another rank may bring it back."""
    found = end(samples, *arguments)
    if samples.dtype != torch.float64 and not bool(found.isfinite().all()):
        found = end(samples.double(), *arguments)
    return found.double()


def _joined(ends_of_parts: list[Tensor], products: list[Product]) -> Tensor:
    """The end of all parts, each scanned from zero, by the law that joins the ranks."""
    found = torch.stack(ends_of_parts)
    return fold(found, Product.stack(products), torch.zeros_like(found[0]))[-1]


def _shifted(y: Tensor, start: Tensor, dim: int, reverse: bool) -> Tensor:
    """y[n-1] for every n in the order of the scan, ``start`` before the first; y if it is empty."""
    return previous(y, start.to(y.dtype), dim, reverse) if y.shape[dim] else y


def _taped(tensor: Tensor) -> Tensor:
    """The tensor, recorded by autograd in any case, so that every rank meets the same messages."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def _per_row(value: Tensor, x: Tensor, dim: int) -> Tensor:
    """A value that expands to x and is constant in time, as one that expands to a row's state."""
    ones = [1] * (x.dim() - value.dim())
    return value.reshape(*ones, *value.shape).squeeze(dim)


_untraced: Callable[..., Tensor | tuple[Tensor, Tensor]] = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _call, reason="ema_ext.distributed goes by the lengths of other ranks' pieces"
)
