"""ema over a time axis sharded across 2, 3 and 4 processes is ema in one."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bounds
import pytest
import ranks
import torch
import torch.distributed as dist
from cases import DTYPES, LAYOUTS, assert_same, signal
from ranks import cut, each, whole
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.tensor import (
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.func import grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import ema_ext
from ema_ext import EMA, distributed
from ema_ext._autograd import varies
from ema_ext._line import Line

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from scaling import Traffic

CHECKS: list[ranks.Check] = []


def check(function: ranks.Check) -> ranks.Check:
    """Has the function run by every rank of each world."""
    CHECKS.append(function)
    return function


@pytest.fixture(scope="module", params=[2, 3, 4], ids=lambda world: f"{world} ranks")
def world(request: pytest.FixtureRequest) -> dict[str, str]:
    """What the checks found, all run by one group of processes."""
    return ranks.run(CHECKS, request.param)


def lengths(*of_rank: int) -> list[int]:
    """The first entries, one for each rank."""
    return list(of_rank[: dist.get_world_size()])


#: Pieces of one length, of many, and with empty ones in every place.
CUTS = [(50, 50, 50, 50), (1, 33, 130, 7), (0, 40, 0, 61), (70, 0, 0, 5), (0, 0, 0, 0)]


@contextmanager
def parts_of(samples: int) -> Iterator[None]:
    """Aggregate in parts of so many samples, which otherwise takes long pieces."""
    before = distributed.PART_SAMPLES, distributed.PART_STEPS
    distributed.PART_SAMPLES, distributed.PART_STEPS = samples, 1
    try:
        yield
    finally:
        distributed.PART_SAMPLES, distributed.PART_STEPS = before


def piece_of(coefficient: Any, x: Tensor, sizes: list[int], dim: int) -> Any:
    """This rank's piece of an alpha or a that varies in time, or the whole of one that does not, as
    a leaf of its own; a number as it is."""
    if not isinstance(coefficient, Tensor):
        return coefficient
    axis = dim % x.dim() - x.dim()
    if varies(coefficient, x, dim % x.dim()):
        return cut(coefficient, sizes, axis).requires_grad_()
    return coefficient.clone().requires_grad_()


class Run:
    """One call of a sharded function with its first gradients, brought together on every rank.

    Each rank's loss has a part of its own in y and a share of its own in the state.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        x: Tensor,
        coefficient: Any,
        sizes: list[int],
        *,
        dim: int = -1,
        state: Tensor | None = None,
        reverse: bool = False,
        layout: str = "contiguous",
        create_graph: bool = False,
        some: bool = True,
    ) -> None:
        self.piece = LAYOUTS[layout](cut(x, sizes, dim)).requires_grad_()
        self.coefficient = piece_of(coefficient, x, sizes, dim)
        self.start = None if state is None else state.clone().requires_grad_()
        self.grad_y = signal(*x.shape, dtype=x.dtype, seed=8)
        result = function(
            self.piece, self.coefficient, initial_state=self.start, return_state=some, dim=dim,
            reverse=reverse,
        )  # fmt: skip
        y, self.state = result if some else (result, None)
        assert y.dtype == x.dtype
        outputs, gradients = [y], [cut(self.grad_y, sizes, dim)]
        self.grad_state: Tensor | None = None
        if self.state is not None:
            assert self.state.dtype == bounds.accumulate_dtype(x.dtype)
            assert all(torch.equal(self.state, other) for other in each(self.state))
            shares = signal(dist.get_world_size(), *self.state.shape, seed=9).to(self.state.dtype)
            outputs, gradients = [y, self.state], [*gradients, shares[dist.get_rank()]]
            self.grad_state = shares.double().sum(0)
        wanted = [v for v in (self.piece, self.coefficient, self.start) if isinstance(v, Tensor)]
        found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=create_graph))
        self.y, self.grad_x = whole(y, dim), whole(next(found), dim)
        self.grad_coefficient = self.grad_start = None
        self.rounding = [0.0, 0.0]
        if isinstance(coefficient, Tensor):
            self.grad_coefficient, self.rounding[0] = self.joined(next(found), coefficient, x, dim)
        if state is not None:
            self.grad_start, self.rounding[1] = self.joined(next(found), state, x, None)

    @staticmethod
    def joined(found: Tensor, value: Tensor, x: Tensor, dim: int | None) -> tuple[Tensor, Any]:
        """The gradient as one, and how far it may be off as each rank's share was stored."""
        if dim is not None and varies(value, x, dim % x.dim()):
            return whole(found, dim % x.dim() - x.dim()), 0.0
        shares = torch.stack(each(found)).double()
        return shares.sum(0), bounds.unit(value.dtype) * shares.abs().sum(0).numpy()


def compare(
    x: Tensor, alpha: float | Tensor, sizes: list[int], *, state: Tensor | None = None,
    roundings: bounds.Roundings | None = None, label: str = "sharded", **options: Any,
) -> None:  # fmt: skip
    """Hold outputs, state and gradients of all ranks together to the oracle."""
    dim, reverse = options.get("dim", -1), options.get("reverse", False)
    some = state is not None or x.shape[dim] > 0
    run = Run(distributed.ema, x, alpha, sizes, state=state, some=some, **options)
    if dist.get_rank():
        return
    varying = isinstance(alpha, Tensor) and varies(alpha, x, dim % x.dim())
    kind = bounds.VARYING if varying else bounds.KERNEL
    label = f"{label} varying" if varying else label
    call: dict[str, Any] = {"dim": dim, "reverse": reverse, "initial_state": state}
    bounds.check_forward(run.y, x, alpha, label=label, roundings=kind, **call)
    if run.state is not None and x.shape[dim]:
        exact = torch.from_numpy(bounds.oracle.ema(x, alpha, **call).astype("float64"))
        limit = bounds.pointwise_bound(x, alpha, roundings=kind, **call)
        last = 0 if reverse else -1
        limit = torch.from_numpy(limit.astype("float64")).select(dim, last)
        bounds.assert_within(run.state, exact.select(dim, last), limit, f"{label} state")
    call |= {"grad_state": run.grad_state}
    kind = roundings or kind
    bounds.check_backward(
        (run.grad_x, None, None), run.grad_y, x, alpha, label=label, roundings=kind, **call
    )
    expected = bounds.oracle.ema_backward(run.grad_y, x, alpha, **call)
    limits = bounds.gradient_bounds(run.grad_y, x, alpha, roundings=kind, **call)
    for name, found, rounding in zip(
        ("alpha", "initial_state"),
        (run.grad_coefficient, run.grad_start),
        run.rounding,
        strict=True,
    ):
        if found is not None:
            limit = getattr(limits, name) + rounding
            bounds.assert_within(found, getattr(expected, name), limit, f"{label} grad {name}")


def compare_recurrence(
    a: Any, b: Tensor, sizes: list[int], *, state: Tensor | None = None, **options: Any
) -> None:
    """The same for linear_recurrence. b has the whole shape; a shared a is of float64, so that
    storing each rank's share of its gradient costs nothing."""

    def call(b: Tensor, a: Any, **options: Any) -> Any:
        return distributed.linear_recurrence(a, b, **options)

    run = Run(call, b, a, sizes, state=state, **options)
    if dist.get_rank():
        return
    if not run.y.numel():
        if run.grad_start is not None:
            # both are sums of the ranks' shares, in orders of their own
            limit = 2 * (dist.get_world_size() - 1) * run.rounding[1]
            bounds.assert_within(run.grad_start, run.grad_state, limit, "sharded nothing")
        assert run.grad_coefficient is None or not run.grad_coefficient.any()
        return
    options = {"dim": options.get("dim", -1), "reverse": options.get("reverse", False)}
    options |= {"initial_state": state, "label": "sharded recurrence"}
    bounds.check_recurrence(run.y, a, b, **options)
    gradients = run.grad_coefficient, run.grad_x, run.grad_start
    bounds.check_recurrence_backward(
        gradients, run.grad_y, a, b, grad_state=run.grad_state, **options
    )


@check
def values_and_gradients_for_every_cut() -> None:
    """Catches a carry of the wrong rank, one lost at an empty piece, and a first sample scaled."""
    cases = itertools.product(CUTS, (False, True), (False, True))
    alphas = itertools.cycle((0.001, torch.tensor(0.001).double(), signal(2, 1, seed=3).sigmoid()))
    for (sizes, reverse, with_state), alpha in zip(cases, alphas, strict=False):
        own = lengths(*sizes)
        x = 3 + signal(2, sum(own), seed=1)
        compare(x, alpha, own, state=signal(2, seed=2) if with_state else None, reverse=reverse)


@check
def every_dtype_and_dim() -> None:
    """Catches a carry rounded to a half type, and rows mixed up between two layouts."""
    own = lengths(9, 40, 0, 17)
    for dtype, dim, reverse in itertools.product(DTYPES, (0, 1, 2), (False, True)):
        shape = [3, 4, 5]
        shape[dim] = sum(own)
        x = signal(*shape, dtype=dtype)
        constant = [1 if i == dim else size for i, size in enumerate(shape)]
        alpha = signal(*constant, seed=1).sigmoid().to(dtype)
        layout = list(LAYOUTS)[(dim + 2 * reverse) % len(LAYOUTS)]
        weight = alpha if (dim + reverse) % 2 else 0.01
        compare(x, weight, own, dim=dim, reverse=reverse, layout=layout)


@check
def pieces_aggregated_in_parts() -> None:
    """Catches a wrong law between the parts of a piece: their order, the short one, the power."""
    own = lengths(130, 77, 0, 64)
    for dtype, reverse in itertools.product((torch.float32, torch.float64), (False, True)):
        x = 3 + signal(2, sum(own), dtype=dtype)
        for samples, alpha in ((32, 0.003), (20, torch.tensor([[0.003], [0.1]]).double())):
            with parts_of(samples):
                compare(x, alpha, own, state=signal(2, seed=2), reverse=reverse)


@check
def first_sample_is_copied() -> None:
    """Catches a first sample that is blended with itself: 27 % of random doubles then differ."""
    own = lengths(0, 30, 5, 5)
    x = signal(100, sum(own))
    y = whole(distributed.ema(cut(x, own), 0.1))
    assert torch.equal(y[:, 0], x[:, 0])
    y = whole(distributed.ema(cut(x, own), 0.1, reverse=True))
    assert torch.equal(y[:, -1], x[:, -1])


@check
def alpha_at_and_beyond_its_ends() -> None:
    """Catches log1p(-1), and powers of a c below zero or beyond the range of float64."""
    own = lengths(30, 31, 5, 4000)
    x = signal(1, sum(own), dtype=torch.float32)
    for alpha in (0.0, 1.0, torch.tensor(0.0), torch.tensor(1.0), torch.tensor(1.75)):
        bounds.check_forward(whole(distributed.ema(cut(x, own), alpha)), x, alpha, label="sharded")
    zeros = torch.zeros(1, sum(own))
    assert not whole(distributed.ema(cut(zeros, own), torch.tensor(-2.0))).any()


@check
def nonfinite_values_go_forward_alone() -> None:
    """Catches 0 * inf where the power of c has underflowed: the loop's c * inf is inf."""
    own = lengths(20, 3000, 3000, 3000)
    for value in (torch.inf, -torch.inf, torch.nan):
        x = signal(3, sum(own), dtype=torch.float32)
        x[1, 10] = value
        y = whole(distributed.ema(cut(x, own), 0.5))
        alone = ema_ext.ema(x, 0.5)
        assert torch.equal(y.isfinite(), alone.isfinite())
        expected = torch.full_like(y[1, 10:], value)
        assert torch.equal(y[1, 10:].nan_to_num(7.0), expected.nan_to_num(7.0))


@check
def same_bits_every_time() -> None:
    """Catches a fold in the order of arrival."""
    own = lengths(200, 300, 100, 50)
    x = cut(signal(64, sum(own), dtype=torch.float32), own).requires_grad_()
    alpha = torch.tensor(0.001, requires_grad=True)
    first = None
    for _ in range(4):
        y, state = distributed.ema(x, alpha, return_state=True)
        found = [y, state, *torch.autograd.grad(y.square().sum() + state.sum(), (x, alpha))]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@check
def a_group_within_the_group() -> None:
    """Catches ranks of the world used where those of the group are due."""
    members = [dist.get_world_size() - 1, 0]
    group = dist.new_group(sorted(members))
    x = signal(2, 20)
    try:
        piece = x.split(10, -1)[sorted(members).index(dist.get_rank())]
    except ValueError:
        with pytest.raises(RuntimeError, match="not a member"):
            distributed.ema(x, 0.1, group=group)
        return
    y = distributed.ema(piece, 0.1, group=group)
    mine = (..., slice(10 * dist.get_rank(group), 10 * (dist.get_rank(group) + 1)))
    expected, limit = bounds.oracle.ema(x, 0.1)[mine], bounds.pointwise_bound(x, 0.1)[mine]
    bounds.assert_within(y, expected, limit, "group within the group")


@check
def traffic_is_independent_of_the_length() -> None:
    """Catches samples on the wire, and a message that goes by another way."""
    options = {"initial_state": 0.5, "return_state": True}
    gather, total = "all_gather_into_tensor", "all_reduce"
    for length in (1, 10, 1000):
        for alpha in (0.1, torch.full((5, length), 0.1)):
            x = torch.ones(5, length, requires_grad=True)
            with Traffic() as traffic:
                y = distributed.ema(x, alpha)
                y.sum().backward()
            assert traffic.sent == [(gather, 16), (gather, 24 * 5), (gather, 8 * 5)]
            with Traffic() as traffic:
                y, state = distributed.ema(x, alpha, **options)
                (y.sum() + state.sum()).backward()
            assert traffic.sent == [(gather, 16), (gather, 24 * 5), (gather, 16 * 5)]
        with Traffic() as traffic:
            results = distributed.ema(x, alpha, **options)
            given = [result.detach().requires_grad_() for result in results]
            (found,) = torch.autograd.grad(results, x, given, create_graph=True)
            found.sum().backward()
        again = [(gather, 16), (gather, 24 * 5)]
        assert traffic.sent == [*again, (total, 8 * 5), *again, (gather, 16 * 5), (total, 8 * 5)]


class Made(TorchDispatchMode):
    """Counts the tensors of at least so many samples that operators make, views left out."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples, self.count = samples, 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        results = operator(*arguments, **(options or {}))
        if not operator.is_view:
            made = results if isinstance(results, tuple) else (results,)
            self.count += sum(isinstance(t, Tensor) and t.numel() >= self.samples for t in made)
        return results


@check
def a_piece_is_aggregated_in_place() -> None:
    """Catches what is made of the size of a piece beside y and the gradients: 3N bytes are read and
    written, and a piece may fill half of the memory."""
    own = lengths(3000, 2000, 1000, 1000)[dist.get_rank()]
    samples = torch.ones(2, own)
    for alpha in (0.1, torch.tensor(0.1), torch.full((2, own), 0.1)):
        learned = alpha.clone().requires_grad_() if isinstance(alpha, Tensor) else None
        x = samples.clone().requires_grad_()
        with parts_of(64), Made(samples.numel()) as made:
            y = distributed.ema(x, alpha if learned is None else learned)
        assert made.count == 1
        with parts_of(64), Made(samples.numel()) as made:
            torch.autograd.grad(y, x if learned is None else (x, learned), samples)
        assert made.count == 1 + (learned is not None and learned.dim() > 0)


def traced(function: Callable[[Tensor], Tensor], value: Tensor) -> str:
    """The program that the function is to a tracer."""
    code: str = make_fx(lambda value: function(value))(value).code
    return code


@check
def messages_are_functional_collectives() -> None:
    """Catches a message that autograd does not see, or a tracer."""
    world, own = dist.get_world_size(), dist.get_rank()
    shares, along = signal(world, 3, seed=1), signal(world, 3, seed=2)
    for reverse in (False, True):
        line = Line.of(None, reverse)
        gathered = (lambda every: every.flip(0)) if reverse else lambda every: every
        for send, alone, shape in (
            (line.gather, gathered, (world, 3)),
            (line.total, lambda every: every.sum(0), (3,)),
        ):
            weights = signal(world, *shape, seed=3)  # each rank's own
            share, every = (v.clone().requires_grad_() for v in (shares[own], shares))
            loss = (weights[own] * send(share) ** 3).sum()
            losses = (weights * alone(every) ** 3).sum()
            for _ in range(3):
                (found,) = torch.autograd.grad(loss, share, create_graph=True)
                (expected,) = torch.autograd.grad(losses, every, create_graph=True)
                torch.testing.assert_close(found, expected[own])
                loss, losses = (found * along[own]).sum(), (expected * along).sum()
            code = traced(send, shares[own])
            assert "_c10d_functional.all_" in code
            assert "_c10d_functional.wait_tensor" in code


@check
def what_differs_between_ranks_is_named() -> None:
    """Catches a hang, or garbage, where ranks disagree: every rank is told, and goes on."""
    last = dist.get_world_size() - 1
    odd, dtypes = dist.get_rank() == last, (torch.float32, torch.float64)
    cases: list[tuple[str, Callable[[], Any]]] = [
        (
            rf"shape of x without dim 1 .* \(3,\) on rank 0 and \(4,\) on rank {last}",
            lambda: distributed.ema(torch.ones(3 + odd, 5), 0.1),
        ),
        (
            f"dtype of x .* torch.float32 on rank 0 and torch.float64 on rank {last}",
            lambda: distributed.ema(torch.ones(5, dtype=dtypes[odd]), 0.1),
        ),
        (
            f"dimensions of x .* 1 on rank 0 and 2 on rank {last}",
            lambda: distributed.ema(torch.ones([(5,), (5, 5)][odd]), 0.1, dim=0),
        ),
        (
            f"initial_state .* False on rank 0 and True on rank {last}",
            lambda: distributed.ema(torch.ones(5), 0.1, initial_state=0.0 if odd else None),
        ),
        (
            f"requires a gradient .* False on rank 0 and True on rank {last}",
            lambda: distributed.ema(torch.ones(5, requires_grad=odd), 0.1),
        ),
        (
            f"alpha requires a gradient .* False on rank 0 and True on rank {last}",
            lambda: distributed.ema(
                torch.ones(5, requires_grad=True), torch.tensor(0.1, requires_grad=odd)
            ),
        ),
        (
            f"function called .* ema on rank 0 and linear_recurrence on rank {last}",
            lambda: (
                distributed.linear_recurrence(0.1, torch.ones(5))
                if odd
                else distributed.ema(torch.ones(5), 0.1)
            ),
        ),
        (
            f"dtype of b .* torch.float32 on rank 0 and torch.float64 on rank {last}",
            lambda: distributed.linear_recurrence(0.1, torch.ones(5, dtype=dtypes[odd])),
        ),
        (
            "no sample on any rank and initial_state is None",
            lambda: distributed.ema(torch.ones(3, 0), 0.1, return_state=True),
        ),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(distributed.ema(torch.ones(5), 0.1), torch.ones(5))


def weights(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Weights between 0 and 1, most of them small, now and then 0 and 1 themselves."""
    alpha = signal(*shape, seed=4).sigmoid() ** 4
    pick = signal(*shape, seed=5)
    return torch.where(pick > 2, 1.0, torch.where(pick < -2, 0.0, alpha)).to(dtype)


def ratios(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers between -1 and 1, most of them near 1, now and then 0: a reset."""
    a = 1 - 2 * signal(*shape, seed=4).sigmoid() ** 4
    return torch.where(signal(*shape, seed=5) > 2, 0.0, a).to(dtype)


@check
def weights_that_vary_in_time() -> None:
    """Catches a product of the wrong steps, the shift of the adjoint's weights, and a piece of
    alpha that belongs to another rank."""
    cases = itertools.product(CUTS, (False, True), (False, True))
    for k, (sizes, reverse, with_state) in enumerate(cases):
        own = lengths(*sizes)
        x, alpha = 3 + signal(2, sum(own), seed=1), weights(*((), (1,), (2,))[k % 3], sum(own))
        compare(x, alpha, own, state=signal(2, seed=2) if with_state else None, reverse=reverse)


@check
def every_dtype_and_dim_of_weights_that_vary() -> None:
    """Catches a product in a half type, and a time axis of alpha counted from the front."""
    own = lengths(9, 40, 0, 17)
    for dtype, dim in itertools.product(DTYPES, (0, 1, 2)):
        shape = [3, 4, 5]
        shape[dim] = sum(own)
        x = signal(*shape, dtype=dtype)
        layout = list(LAYOUTS)[(dim + DTYPES.index(dtype)) % len(LAYOUTS)]
        for drop in range(3):
            sizes = [1 if i == drop != dim else size for i, size in enumerate(shape)]
            compare(x, weights(*sizes, dtype=dtype), own, dim=dim, layout=layout)


@check
def recurrences() -> None:
    """Catches a start of x[0] where 0 is due, and a or b expanded on one rank only."""
    cases = itertools.product(CUTS, (False, True), (False, True))
    for k, (sizes, reverse, with_state) in enumerate(cases):
        own = lengths(*sizes)
        b = signal(2, sum(own), seed=1)
        a = (0.99, torch.tensor([[0.999], [-0.7]]).double(), ratios(sum(own)), ratios(2, sum(own)))
        state = signal(2, seed=2) if with_state else None
        for coefficient in (a[k % 4], a[(k + 2) % 4]):
            compare_recurrence(coefficient, b, own, state=state, reverse=reverse)


@check
def every_dtype_and_dim_of_a_recurrence() -> None:
    """Catches a state rounded to a half type, and rows mixed up between two layouts."""
    own = lengths(9, 40, 0, 17)
    for dtype, dim, reverse in itertools.product(DTYPES, (0, 1, 2), (False, True)):
        shape = [3, 4, 5]
        shape[dim] = sum(own)
        layout = list(LAYOUTS)[(dim + 2 * reverse) % len(LAYOUTS)]
        a, b = ratios(*shape, dtype=dtype), signal(*shape, dtype=dtype)
        compare_recurrence(a, b, own, dim=dim, reverse=reverse, layout=layout)


@check
def both_of_a_recurrence_broadcast() -> None:
    """Catches b's gradient in the shape that a gave it, and a b that is constant in time."""
    own = lengths(9, 40, 3, 17)
    steps = own[dist.get_rank()]
    a, b = cut(ratios(2, 1, sum(own)), own).requires_grad_(), signal(3, 1).requires_grad_()
    y = distributed.linear_recurrence(a, b)
    assert y.shape == (2, 3, steps)
    grad_a, grad_b = torch.autograd.grad(y.sum(), (a, b))
    y, a, grads = whole(y), ratios(2, 1, sum(own)), (whole(grad_a), sum(each(grad_b)), None)
    bounds.check_recurrence(y, a, b, label="sharded recurrence")
    bounds.check_recurrence_backward(grads, torch.ones_like(y), a, b, label="sharded recurrence")


@check
def coefficients_per_step_aggregated_in_parts() -> None:
    """Catches a part with the coefficients of another, and a product that leaves one out."""
    own = lengths(130, 77, 0, 64)
    for dtype, reverse in itertools.product((torch.float32, torch.float64), (False, True)):
        x = 3 + signal(2, sum(own), dtype=dtype)
        for samples in (32, 20):
            with parts_of(samples):
                compare(x, weights(2, sum(own)), own, state=signal(2, seed=2), reverse=reverse)
                compare_recurrence(ratios(sum(own)), x, own, reverse=reverse)
                compare_recurrence(0.98, x, own, state=signal(2, seed=2), reverse=reverse)


@check
def products_beyond_float64() -> None:
    """Catches 2 ** 1500 taken for infinity where the state that it meets is 1e-200, 0.5 ** 1500
    taken for 0 where it is 1e300, and a product that a zero or an infinity ends wrongly."""
    own = lengths(1500, 700, 4, 10)
    total = sum(own)
    zeros = torch.zeros(1, total, dtype=torch.float64)
    there_and_back = torch.full((total,), 2.0, dtype=torch.float64)
    there_and_back[1500:] = 0.5
    steep = torch.ones(total, dtype=torch.float64)
    steep[:20], steep[20:40] = 1e25, 1e-25
    half = torch.full((1, 1), 0.5, dtype=torch.float64)
    for a, start in (
        (there_and_back, 1e-300),
        (-there_and_back, 1e-300),
        (there_and_back, 0.0),
        (1 / there_and_back, 1e300),
        (steep, 1e-300),
        (half, 1e300),
        (half, torch.inf),
        (1 / half, 0.0),
    ):
        state = torch.tensor([start], dtype=torch.float64)
        piece = piece_of(a, zeros, own, -1).detach()
        y = whole(distributed.linear_recurrence(piece, cut(zeros, own), initial_state=state))
        bounds.check_recurrence(y, a, zeros, initial_state=state, label="sharded beyond float64")
        assert (y[0, 1499:1501] != 0).all() == (start != 0)
    # what comes before a reset is forgotten if it is finite, and NaN otherwise
    for value in (3.0, torch.inf, torch.nan):
        b, a = torch.zeros(1, total, dtype=torch.float64), torch.full((total,), 0.5).double()
        b[0, 3], a[1502] = value, 0.0
        y = whole(distributed.linear_recurrence(cut(a, own), cut(b, own)))
        bounds.check_recurrence(y, a, b, label="sharded reset")


@check
def an_aggregate_beyond_float32() -> None:
    """Catches an infinite aggregate, which is nobody's y, where the carry that it meets brings it
    back: inf - inf."""
    own = lengths(3, 2, 4, 4)
    a, b = torch.ones(sum(own)), torch.zeros(1, sum(own))
    b[0, 0], a[3:5], b[0, 3] = 2.0**33, 2.0**66, -(2.0**99)  # 2 ** 66 * 2 ** 33 - 2 ** 99 = 0
    for reverse in (False, True):
        if reverse:
            own, a, b = own[::-1], a.flip(0), b.flip(1)
        y, state = distributed.linear_recurrence(
            cut(a, own), cut(b, own), reverse=reverse, return_state=True
        )
        assert torch.equal(whole(y), ema_ext.linear_recurrence(a, b, reverse=reverse))
        assert state == 0


@check
def the_first_sample_may_be_infinite() -> None:
    """Catches 0 * inf at the first sample, which is copied, whatever its weight."""
    own = lengths(0, 4, 4, 4)
    x = torch.ones(1, sum(own))
    x[0, 0] = torch.inf
    for alpha in (0.0, torch.zeros(sum(own)), torch.zeros(1)):
        y = whole(distributed.ema(cut(x, own), piece_of(alpha, x, own, -1)))
        assert (y == torch.inf).all()


DERIVATIVES: dict[str, tuple[Callable[..., Any], Any, bool, bool]] = {
    "ema, float alpha": (distributed.ema, 0.3, False, True),
    "ema, no start": (distributed.ema, torch.tensor(0.3).double(), False, False),
    "ema, per row, reverse": (distributed.ema, signal(2, 1).sigmoid(), True, True),
    "ema, per step": (distributed.ema, weights(2, 40), False, True),
    "ema, per step, no start, reverse": (distributed.ema, weights(40), True, False),
    "recurrence": (
        distributed.linear_recurrence,
        torch.tensor([[0.9], [-0.5]]).double(),
        True,
        True,
    ),
    "recurrence, per step": (distributed.linear_recurrence, ratios(2, 40), False, True),
    "recurrence, per step, reverse": (distributed.linear_recurrence, ratios(40), True, False),
}


@check
def every_order() -> None:
    """Catches a second derivative that is zero, stays within its rank, or asks the ranks for
    messages in different orders."""
    for cuts, (function, coefficient, reverse, with_state) in itertools.product(
        ((10, 17, 1, 12), (0, 30, 0, 10)), DERIVATIVES.values()
    ):
        own = lengths(*cuts)
        own[-1] += 40 - sum(own)
        x, state = signal(2, 40), signal(2, seed=2) if with_state else None
        # what all ranks have in common has no time of the sequence's: the state, a constant
        values = [("x", x), ("coefficient", coefficient), ("state", state)]
        tensors = [(name, v) for name, v in values if isinstance(v, Tensor)]

        def piece(name: str, value: Tensor, x: Tensor = x, own: list[int] = own) -> Tensor:
            return value.clone() if name == "state" else piece_of(value, x, own, -1).detach()

        def loss(f: Any, args: dict[str, Any], share: float, reverse: bool = reverse) -> Tensor:
            pair = args["x"], args["coefficient"]
            options = {"initial_state": args["state"], "return_state": True, "reverse": reverse}
            y, last = f(*(pair if f.__name__ == "ema" else pair[::-1]), **options)
            return y.square().sum() + share * last.pow(3).sum()

        ours = dict(values) | {n: piece(n, v).requires_grad_() for n, v in tensors}
        theirs = dict(values) | {n: v.clone().requires_grad_() for n, v in tensors}
        one = loss(function, ours, 1 / dist.get_world_size())
        other = loss(getattr(ema_ext, function.__name__), theirs, 1.0)
        for order in (1, 2, 3):
            found = torch.autograd.grad(one, [ours[n] for n, _ in tensors], create_graph=True)
            expected = torch.autograd.grad(
                other, [theirs[n] for n, _ in tensors], create_graph=True
            )
            one, other = torch.zeros(()), torch.zeros(())
            for (name, value), got, want in zip(tensors, found, expected, strict=True):
                time = None if name == "state" else -1
                joined, _ = Run.joined(got, value, x, time)
                # sums of at most 40 products for every order, each as good as a loop's
                error = (joined - want.detach()).abs().max() / want.detach().abs().max()
                assert error <= 6 * 40**order * bounds.unit(torch.float64), (order, name, error)
                # linear in the gradients, so that the ranks' shares of a shared one add up
                weight = signal(*value.shape, seed=order)
                one = one + (got * piece(name, weight)).sum()
                other = other + (want * weight).sum()


@check
def what_is_not_supported_raises() -> None:
    """Catches tangents of zero, a vmap over messages, and a graph that has lost its messages."""
    x = signal(2, 9)
    for function in (distributed.ema, lambda x, a: distributed.linear_recurrence(a, x)):
        for transform in (grad, jacrev):
            with pytest.raises(RuntimeError, match=r"functorch transforms|setup_context"):
                transform(lambda x, f=function: f(x, 0.5).sum())(x)
        with pytest.raises(RuntimeError, match=r"vmap|functorch"):
            vmap(lambda x, f=function: f(x, 0.5))(x)
        with pytest.raises(RuntimeError, match=r"jvp|forward"):
            jvp(lambda x, f=function: f(x, 0.5), (x,), (x,))
        with (
            forward_ad.dual_level(),
            pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"),
        ):
            function(forward_ad.make_dual(x, x), 0.5)
        torch._dynamo.reset()
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match=r"ema_ext\.distributed goes by the lengths"
        ):
            torch.compile(function, fullgraph=True, backend="eager")(x, 0.5)
        broken = torch.compile(lambda x, f=function: f(x + 1, 0.5) * 2, backend="eager")
        assert torch.equal(broken(x), function(x + 1, 0.5) * 2)


class Forecast(nn.Module):
    """Linear layers over channels around learned smoothings of each: (batch, channel, time)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight)
        alpha = torch.linspace(0.1, 0.5, channels, dtype=torch.float64)
        self.each = EMA(alpha, channels)
        self.all = EMA(torch.tensor(0.9, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.all(self.each(self.weight @ x))
        return y


def trained(model: nn.Module, x: Tensor, steps: int = 5) -> nn.Module:
    """A few steps of gradient descent on the error of a forecast by one sample."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x)[..., :-1] - x[..., 1:]).square().mean().backward()
        optimizer.step()
    return model


@check
def ddp_training_equals_training_alone() -> None:
    """Catches an alpha that DistributedDataParallel leaves out, or averages wrongly."""
    batch = 2
    x = signal(batch * dist.get_world_size(), 3, 40)
    shared = trained(nn.parallel.DistributedDataParallel(Forecast(3)), whole_rows(x, batch))
    alone = trained(Forecast(3), x)
    fresh = Forecast(3)
    # each of 5 steps rounds sums over the batch, of terms of the parameters' own size
    roundings = 5 * x.numel() * bounds.unit(torch.float64)
    for ours, expected, start in zip(
        shared.parameters(), alone.parameters(), fresh.parameters(), strict=True
    ):
        assert not torch.equal(expected, start)
        limit = roundings * expected.detach().abs().max()
        bounds.assert_within(ours, expected, limit, "ddp parameters")


def whole_rows(x: Tensor, batch: int) -> Tensor:
    """This rank's share of the batch."""
    return x.split(batch)[dist.get_rank()]


def average(x: Any, alpha: Any, state: Any) -> Any:
    return ema_ext.ema(x, alpha, dim=1, initial_state=state, return_state=True)


def recurrence(b: Any, a: Any, state: Any) -> Any:
    return ema_ext.linear_recurrence(a, b, dim=1, initial_state=state, return_state=True)


@check
def dtensors_sharded_by_row_need_no_communication() -> None:
    """Catches an operator that DTensor does not know, or runs on gathered tensors, or partially."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, state = signal(4, 20, 8), signal(4, 8, seed=2)
    constant, per_step = signal(1, 8, seed=1).sigmoid(), signal(4, 20, 8, seed=1).sigmoid()
    copied: list[Placement] = [Replicate()]
    factors, starts = (0.1, constant, constant[0, 0], per_step), (None, 0.5, state, state[0, 0])
    for function, dim, factor, start in itertools.product(
        (average, recurrence), (0, 2), factors, starts
    ):
        # the state has no dimension of time
        row = Shard(min(dim, 1)) if start is state else copied[0]
        own = Shard(dim) if factor is per_step else copied[0]
        shared = [
            distribute_tensor(value, mesh, [placement]).requires_grad_()
            if isinstance(value, Tensor)
            else value
            for value, placement in zip((x, factor, start), (Shard(dim), own, row), strict=True)
        ]
        with CommDebugMode() as traffic:
            results = function(*shared)
            wanted = [value for value in shared if isinstance(value, Tensor)]
            given = [result.detach() for result in results]
            gradients = torch.autograd.grad(results, wanted, given)
        assert not traffic.get_total_counts()
        y, last = (result.detach().full_tensor() for result in results)
        found = (gradient.full_tensor() for gradient in gradients)
        to_x, to_factor, to_start = (next(found) if isinstance(v, Tensor) else None for v in shared)
        assert_same(last, y[:, -1])
        options = {"dim": 1, "initial_state": start, "label": "dtensor"}
        if function is average:
            options["roundings"] = bounds.VARYING if factor is per_step else bounds.KERNEL
            bounds.check_forward(y, x, factor, **options)
            grads = to_x, to_factor, to_start
            bounds.check_backward(grads, y, x, factor, grad_state=last, **options)
        else:
            bounds.check_recurrence(y, factor, x, **options)
            grads = to_factor, to_x, to_start
            bounds.check_recurrence_backward(grads, y, factor, x, grad_state=last, **options)


@check
def dtensors_sharded_along_time_are_refused() -> None:
    """Catches pieces scanned each from its own start, and coefficients gathered without a word."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, weight = signal(4, 20, 8), signal(20, 1).sigmoid()
    whole_x, cut_x = (distribute_tensor(x, mesh, [p]) for p in (Replicate(), Shard(1)))
    cut_weight = distribute_tensor(weight, mesh, [Shard(0)])
    pattern = r"{} is sharded along dim {}.* ema_ext\.distributed takes .*{}\.to_local"
    for message, call in (
        (pattern.format("x", 1, "x"), lambda: average(cut_x, 0.1, None)),
        (pattern.format("alpha", 0, "alpha"), lambda: average(whole_x, cut_weight, None)),
        (pattern.format("b", 1, "b"), lambda: recurrence(cut_x, 0.1, None)),
        (pattern.format("a", 0, "a"), lambda: recurrence(whole_x, cut_weight, None)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for name, call in (
        ("x", lambda: distributed.ema(cut_x, 0.1)),
        ("alpha", lambda: distributed.ema(x, cut_weight, dim=1)),
        ("b", lambda: distributed.linear_recurrence(0.1, cut_x)),
        ("initial_state", lambda: distributed.ema(x, 0.1, initial_state=cut_weight)),
    ):
        with pytest.raises(TypeError, match=rf"{name} must be .*DTensor.*{name}\.to_local"):
            call()
    pieces = cut_x.to_local(), cut_weight.to_local()
    y = distributed.ema(*pieces, dim=1, group=mesh.get_group())
    bounds.check_forward(whole(y, 1), x, weight, dim=1, roundings=bounds.VARYING, label="dtensor")


@pytest.mark.parametrize("name", [function.__name__ for function in CHECKS])
def test_in_processes(name: str, world: dict[str, str]) -> None:
    """Each check's own docstring says what it catches."""
    assert not world[name], world[name]


def test_without_a_group() -> None:
    """Catches an assertion of torch's where one sentence of ours is due."""
    for call in (distributed.ema, distributed.linear_recurrence):
        with pytest.raises(RuntimeError, match="init_process_group"):
            call(torch.ones(3), torch.ones(3))


def fails(rank: int, world: int, folder: str, hangs: bool, backward: bool) -> None:
    """The last rank dies, or hangs, after one call; the others see how their next pass ends."""
    ranks.join_group(rank, world, folder, seconds=2)
    x = torch.ones(3, requires_grad=True)
    y = distributed.ema(x, 0.1)
    if rank == world - 1:
        time.sleep(30 if hangs else 0)
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        y.sum().backward() if backward else distributed.ema(x, 0.1)
    assert time.monotonic() - began < 15
    (Path(folder) / f"{rank} was told").touch()
    os._exit(0)  # without the group's own farewell, which would wait for the others


@pytest.mark.parametrize(
    ("hangs", "backward"),
    [(False, False), (True, False), (False, True)],
    ids=["dies", "hangs", "dies before backward"],
)
def test_a_failing_rank_gives_the_others_an_error(
    hangs: bool, backward: bool, tmp_path: Path
) -> None:
    """Catches a wait without end, and one that does not honour the group's timeout."""
    context = ranks.start(fails, (3, str(tmp_path), hangs, backward), 3)
    told = [tmp_path / f"{rank} was told" for rank in range(2)]
    try:
        deadline = time.monotonic() + 60
        while not all(path.exists() for path in told):
            assert time.monotonic() < deadline, "the others still wait"
            context.join(timeout=0.1)
    finally:
        for process in context.processes:
            process.kill()
