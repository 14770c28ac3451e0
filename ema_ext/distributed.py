"""Scans over a time axis that is sharded across a process group.

Each rank holds a contiguous piece of the sequence, in the order of the ranks; pieces may differ in
length, and any of them may be empty. What the past contributes to a piece is one number per row,
its carry, and that is all that travels. With c the coefficient of the recurrence, a piece that
starts from the carry s ends in

    aggregate + decay * s,    aggregate: its end when scanned from zero,    decay: the product of c.

So every rank (1) reads its piece once for the aggregate and the decay, (2) gathers those of all
ranks, (3) folds the ones before it, in order, into its carry, and (4) scans its piece from there:
the law that the kernels use between the tiles of a row, here between ranks. The backward pass is
the same with time reversed: the aggregate is that of the adjoint, and what comes in is the gradient
of the state that this rank handed on (docs/gradients.md).

Aggregates and decays travel and are folded in float64, 16 bytes per row and rank: so the rounding
does not grow with the number of ranks, and a message this small costs its latency anyway.

The engine is torch.distributed: any backend, gloo on the CPU and nccl on CUDA.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ema_ext import _checks, _ops
from ema_ext._autograd import accumulate_dtype, ends, fused_backward, varies

#: A piece is aggregated in parts of about this many samples, so that the scan's output, which
#: nobody wants, stays in the cache and only x itself passes through memory.
PART_SAMPLES = 2**20
#: Time steps of a part, at least: with very many rows the ends of the parts would take up memory.
PART_STEPS = 256

Group = dist.ProcessGroup | None


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
    x, and, where any argument wants a gradient, every rank runs the backward pass.

    Args:
        x: this rank's piece: as in `ema_ext.ema`. All pieces have the same dtype, and the same
            shape but for ``dim``, along which each may have any length, 0 included.
        alpha: as in `ema_ext.ema`, but constant in time; the same on every rank.
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

    Gradients of first order reach x, alpha and initial_state, for the sum of the losses of all
    ranks. A rank's gradient to an argument that all ranks share (alpha, initial_state) is its own
    share; the sum of the shares is the gradient of a single process.

    Traffic: 24 bytes per rank for the lengths and 16 per rank and row for the carries, whatever the
    length; in the backward pass 8, or 16 if the state is returned.

    Raises:
        What `ema_ext.ema` raises, on the rank whose argument it is; and
        RuntimeError: torch.distributed is not initialised; this process is no member of ``group``.
        ValueError, on every rank: the pieces' shapes without ``dim``, their dtypes, or any other
            argument that must be common, differ between two ranks, which it names; the state of a
            sequence without samples and without initial_state is asked for.
        NotImplementedError: alpha varies along ``dim``.
        A rank that fails leaves the others waiting until the group's timeout ends their call.
    """
    line = _Line.of(group, reverse)
    x = _checks.input_tensor("x", x)
    dim = _checks.dimension(dim, x)
    alpha = _constant_in_time(_checks.smoothing_weight(alpha, x), dim, x)
    start = _start(initial_state, x, dim)
    return _scan(_Problem(_EMA, line, dim, bool(return_state)), x, alpha, start)


@dataclass(frozen=True)
class _Line:
    """The ranks of a group in the order in which the scan meets them."""

    group: Group
    reverse: bool
    size: int
    place: int  # this rank's

    @staticmethod
    def of(group: Group, reverse: bool) -> _Line:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "ema_ext.distributed needs a process group: call "
                "torch.distributed.init_process_group first, or use ema_ext in one process"
            )
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise RuntimeError("ema_ext.distributed: this process is not a member of group")
        return _Line(group, bool(reverse), size, size - 1 - rank if reverse else rank)

    def gather(self, message: Tensor) -> Tensor:
        """The messages of all ranks, stacked along a new first dimension in the line's order."""
        gathered = message.new_empty(self.size, *message.shape)
        dist.all_gather_single(gathered, message[None].contiguous(), group=self.group)
        return gathered.flip(0) if self.reverse else gathered


class _Lengths:
    """The lengths of all pieces, under way while this rank aggregates its own."""

    def __init__(self, line: _Line, length: int, common: dict[str, object], like: Tensor) -> None:
        self.line, self.common = line, common
        digest = zlib.crc32(repr(common).encode())
        own = torch.tensor([digest, length], device=like.device)
        self.headers = own.new_empty(line.size, 2)
        self.work = dist.all_gather_single(self.headers, own[None], group=line.group, async_op=True)

    def wait(self) -> list[int]:
        """In the line's order. Raises ValueError where ranks differ in what must be common."""
        self.work.wait()
        headers: list[tuple[int, int]] = self.headers.tolist()
        if len({digest for digest, _ in headers}) > 1:
            self._raise()
        lengths = [length for _, length in headers]
        return lengths[::-1] if self.line.reverse else lengths

    def _raise(self) -> None:
        everyones: list[Any] = [None] * self.line.size
        dist.all_gather_object(everyones, self.common, group=self.line.group)
        for rank, theirs in enumerate(everyones):
            for name, value in everyones[0].items():
                if theirs[name] != value:
                    raise ValueError(
                        f"ema_ext.distributed: {name} must be the same on every rank, "
                        f"got {value} on rank 0 and {theirs[name]} on rank {rank}"
                    )


class _EMA:
    """y[n] = (1 - alpha) * y[n-1] + alpha * x[n]; without a start, y[0] = x[0]."""

    starts_at_first_sample = True

    @staticmethod
    def scan(
        x: Tensor, alpha: float | Tensor, start: Tensor | None, dim: int, reverse: bool
    ) -> Tensor:
        op = _ops.ema if isinstance(alpha, float) else _ops.ema_tensor
        return op(x, alpha, start, dim, reverse)

    @staticmethod
    def end(x: Tensor, alpha: float | Tensor, dim: int, reverse: bool) -> Tensor:
        """The state after x when scanned from zero."""
        op = _ops.ema_with_state if isinstance(alpha, float) else _ops.ema_with_state_tensor
        return op(x, alpha, x.new_zeros(()), dim, reverse)[1]

    @staticmethod
    def backward(
        grad_y: Tensor,
        grad_state: Tensor | None,
        x: Tensor | None,
        alpha: float | Tensor,
        start: Tensor | None,
        dim: int,
        reverse: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The gradients to x, alpha and start; x may be None where alpha's is not wanted."""
        if isinstance(alpha, float):
            grad_x, grad_start = _ops.ema_backward(
                grad_y, grad_state, alpha, start is not None, dim, reverse
            )
            return grad_x, None, grad_start
        return fused_backward(grad_y, grad_state, x, None, alpha, start, dim, reverse)

    @staticmethod
    def power(alpha: float | Tensor, steps: int) -> Tensor:
        """c ** steps in float64: by log1p, since c itself has lost the last digits of alpha."""
        weight = torch.as_tensor(alpha, dtype=torch.float64)
        c = 1 - weight
        return _in_range(torch.where(c > 0, torch.exp(steps * torch.log1p(-weight)), c**steps), c)


@dataclass(frozen=True)
class _Problem:
    """One call, without its tensors."""

    recurrence: type[_EMA]
    line: _Line
    dim: int
    return_state: bool

    def common(self, x: Tensor, start: Tensor | None, wants_gradient: bool) -> dict[str, object]:
        """What all ranks must agree on, by the name that an error gives it."""
        return {
            "the number of dimensions of x": x.dim(),
            "dim": self.dim,
            f"the shape of x without dim {self.dim}": _checks.state_shape(x, self.dim),
            "the dtype of x": x.dtype,
            "reverse": self.line.reverse,
            "return_state": self.return_state,
            "whether there is an initial_state": start is not None,
            "whether any argument requires a gradient": wants_gradient,
        }

    def aggregate(self, x: Tensor, coefficient: float | Tensor) -> Tensor:
        """The end of this piece when scanned from zero, in float64."""
        reverse = self.line.reverse
        return self._by_parts(
            x,
            coefficient,
            reverse,
            lambda part: self.recurrence.end(part, coefficient, self.dim, reverse),
        )

    def aggregate_adjoint(self, grad_y: Tensor, coefficient: float | Tensor) -> Tensor:
        """The gradient to this piece's carry as far as it comes from this piece, in float64."""
        reverse, zero = self.line.reverse, grad_y.new_zeros(())

        def end(part: Tensor) -> Tensor:
            return self.recurrence.backward(part, None, None, coefficient, zero, self.dim, reverse)[
                2
            ]

        return self._by_parts(grad_y, coefficient, not reverse, end)

    def _by_parts(
        self, x: Tensor, coefficient: float | Tensor, reverse: bool, end: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``end`` of all x from that of its parts, by the law that joins the ranks."""
        length = x.shape[self.dim]
        rows = math.prod(_checks.state_shape(x, self.dim))
        steps = max(PART_STEPS, PART_SAMPLES // max(rows, 1))
        short = [length % steps] if length % steps else []
        sizes = short + [steps] * (length // steps)  # all of one length but the first
        parts = torch.split_with_sizes(x, sizes[::-1] if reverse else sizes, self.dim)
        found = torch.stack([end(part) for part in (parts[::-1] if reverse else parts)]).double()
        if len(parts) == 1:
            return found[0]
        decay = _per_row(self.recurrence.power(coefficient, steps), x, self.dim)
        return _ops.linear_recurrence(decay[None], found, None, 0, False)[-1]


class _Sharded(Function):
    """This rank's share of a scan over the whole line.

    Arguments: problem, x, coefficient, start (float64, of x's shape without time, or None).
    Returns y and the state after the whole line.
    """

    @staticmethod
    def forward(
        ctx: Any,
        problem: _Problem,
        x: Tensor,
        coefficient: float | Tensor,
        start: Tensor | None,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        line, dim = problem.line, problem.dim
        length = x.shape[dim]
        under_way = _Lengths(line, length, problem.common(x, start, wants_gradient), x)
        aggregate = x.new_zeros(_checks.state_shape(x, dim), dtype=torch.float64)
        decay = torch.ones_like(aggregate)
        if length:
            aggregate = problem.aggregate(x, coefficient)
            power = problem.recurrence.power(coefficient, length)
            decay = _per_row(power, x, dim).expand_as(aggregate)

        lengths = under_way.wait()
        startless = start is None and problem.recurrence.starts_at_first_sample
        if startless and problem.return_state and not any(lengths):
            raise ValueError(
                "return_state: there is no sample on any rank and initial_state is None, so there "
                "is no state to return"
            )
        begins = startless and length > 0 and not any(lengths[: line.place])
        if begins:  # as from a start of x[0], for (1 - alpha) * x[0] + alpha * x[0] = x[0]
            aggregate = aggregate + decay * x.select(dim, ends(length, line.reverse)[0])
        aggregates, decays = line.gather(torch.stack([aggregate, decay])).unbind(1)
        states = _fold(aggregates, decays, torch.zeros_like(aggregate) if start is None else start)
        carry = None if begins else states[line.place]

        y = torch.empty_like(x)
        if length:
            y = problem.recurrence.scan(x, coefficient, carry, dim, line.reverse)
        ctx.problem, ctx.number = problem, coefficient
        tensor = coefficient if isinstance(coefficient, Tensor) else None
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, tensor, carry, decays)
        return y, states[-1].to(accumulate_dtype(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> Any:
        problem: _Problem = ctx.problem
        line, dim = problem.line, problem.dim
        x, coefficient, carry, decays = ctx.saved_tensors
        coefficient = ctx.number if coefficient is None else coefficient
        length = grad_y.shape[dim]

        message = torch.zeros_like(decays[:1])
        if length:
            message = problem.aggregate_adjoint(grad_y, coefficient)[None]
        if problem.return_state:
            message = torch.cat([message, grad_state.double()[None]])
        gathered = line.gather(message)
        last = gathered[:, 1].sum(0) if problem.return_state else torch.zeros_like(message[0])
        to_states = _fold(gathered[:, 0].flip(0), decays.flip(0), last).flip(0)

        grad_x = torch.empty_like(grad_y)
        grad_coefficient = torch.zeros_like(coefficient) if ctx.needs_input_grad[2] else None
        if length:
            grad_x, found, _ = problem.recurrence.backward(
                grad_y, to_states[line.place + 1], x, coefficient, carry, dim, line.reverse
            )
            grad_coefficient = found if ctx.needs_input_grad[2] else None
        grad_start = None
        if ctx.needs_input_grad[3]:
            grad_start = to_states[0] if line.place == 0 else torch.zeros_like(to_states[0])
        return None, grad_x, grad_coefficient, grad_start, None


def _scan(
    problem: _Problem, x: Tensor, coefficient: float | Tensor, start: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """The checked call."""
    tensors = [value for value in (x, coefficient, start) if isinstance(value, Tensor)]
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    apply: Callable[..., tuple[Tensor, Tensor]] = _Sharded.apply
    y, state = apply(problem, x, coefficient, start, wants_gradient)
    return (y, state) if problem.return_state else y


def _constant_in_time(alpha: float | Tensor, dim: int, x: Tensor) -> float | Tensor:
    if isinstance(alpha, Tensor) and varies(alpha, x, dim):
        raise NotImplementedError(
            f"alpha of shape {tuple(alpha.shape)} varies along dim {dim}, the dimension of "
            f"time: ema_ext.distributed takes one that is constant in time"
        )
    return alpha


def _start(initial_state: Any, x: Tensor, dim: int) -> Tensor | None:
    """initial_state in float64 and full shape; autograd undoes both."""
    state = _checks.start_state(initial_state, x, dim)
    if state is None:
        return None
    return state.to(x.device, torch.float64).expand(_checks.state_shape(x, dim))


def _fold(aggregates: Tensor, decays: Tensor, start: Tensor) -> Tensor:
    """The state before the first rank, which is ``start``, and after each: (ranks + 1, *rows)."""
    states = [start]
    for aggregate, decay in zip(aggregates, decays, strict=True):
        states.append(aggregate + decay * states[-1])
    return torch.stack(states)


def _per_row(value: Tensor, x: Tensor, dim: int) -> Tensor:
    """A value that expands to x and is constant in time, as one that expands to a row's state."""
    ones = [1] * (x.dim() - value.dim())
    return value.reshape(*ones, *value.shape).squeeze(dim).to(x.device)


def _in_range(power: Tensor, base: Tensor) -> Tensor:
    """A power of ``base`` that left the range of float64, at the end of that range.

    Then an infinite carry stays one (0 * inf is NaN) and a carry of 0 as well.
    """
    tiny, huge = 5e-324, torch.finfo(torch.float64).max
    return torch.where(base == 0, power, torch.copysign(power.abs().clamp(tiny, huge), power))
