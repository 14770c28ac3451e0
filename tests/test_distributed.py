"""ema over a time axis sharded across 2, 3 and 4 processes is ema in one."""

from __future__ import annotations

import itertools
import os
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
from cases import DTYPES, LAYOUTS, signal
from ranks import cut, each, whole
from torch import Tensor, nn
from torch.distributed.tensor import (
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.debug import CommDebugMode

import ema_ext
from ema_ext import distributed
from ema_ext._autograd import varies

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
    expected = ema_ext.ema(x, 0.1).split(10, -1)[dist.get_rank(group)]
    torch.testing.assert_close(y, expected)


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of every message that this rank sends to all."""
    sent: list[int] = []
    gather = dist.all_gather_single

    def count(output: Tensor, message: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(message.nbytes)
        return gather(output, message, *args, **options)

    dist.all_gather_single = count
    try:
        yield sent
    finally:
        dist.all_gather_single = gather


@check
def traffic_is_independent_of_the_length() -> None:
    """Catches samples on the wire."""
    for length in (1, 10, 1000):
        x = torch.ones(5, length, requires_grad=True)
        with counted() as sent:
            y = distributed.ema(x, 0.1)
            y.sum().backward()
        assert sent == [16, 24 * 5, 8 * 5]


@check
def what_differs_between_ranks_is_named() -> None:
    """Catches a hang, or garbage, where ranks disagree: every rank is told, and goes on."""
    last = dist.get_world_size() - 1
    odd = dist.get_rank() == last
    cases: list[tuple[str, Callable[[], Any]]] = [
        (
            rf"shape of x without dim 1 .* \(3,\) on rank 0 and \(4,\) on rank {last}",
            lambda: distributed.ema(torch.ones(3 + odd, 5), 0.1),
        ),
        (
            f"dtype of x .* torch.float32 on rank 0 and torch.float64 on rank {last}",
            lambda: distributed.ema(torch.ones(5, dtype=[torch.float, torch.double][odd]), 0.1),
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
            "no sample on any rank and initial_state is None",
            lambda: distributed.ema(torch.ones(3, 0), 0.1, return_state=True),
        ),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(distributed.ema(torch.ones(5), 0.1), torch.ones(5))


class Forecast(nn.Module):
    """A linear layer over channels and a learned smoothing of each: (batch, channel, time)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight)
        self.logit = nn.Parameter(torch.linspace(-3, 0, channels, dtype=torch.float64)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return ema_ext.ema(self.weight @ x, self.logit.sigmoid())


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
    for ours, expected in zip(shared.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def whole_rows(x: Tensor, batch: int) -> Tensor:
    """This rank's share of the batch."""
    return x.split(batch)[dist.get_rank()]


@check
def dtensors_sharded_by_row_need_no_communication() -> None:
    """Catches an operator that DTensor does not know, or runs on gathered tensors, or partially."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, alpha, state = signal(4, 8, 20), signal(8, 1, seed=1).sigmoid(), signal(4, 8, seed=2)
    copied: list[Placement] = [Replicate()]
    for dim, a, s in itertools.product((0, 1), (0.1, alpha), (None, 0.5, state)):
        time = 2
        arguments = [value.clone().requires_grad_() if isinstance(value, Tensor) else value
                     for value in (x, a, s)]  # fmt: skip
        sharded = [
            distribute_tensor(value.detach(), mesh, placement).requires_grad_()
            if isinstance(value, Tensor)
            else value
            for value, placement in zip(
                arguments, ([Shard(dim)], copied, [Shard(dim)]), strict=True
            )
        ]
        leaves, shares = (
            [value for value in values if isinstance(value, Tensor)]
            for values in (arguments, sharded)
        )
        found = []
        for values, wanted in ((arguments, leaves), (sharded, shares)):
            with CommDebugMode() as traffic:
                y, last = ema_ext.ema(
                    values[0], values[1], dim=time, initial_state=values[2], return_state=True
                )
                gradients = torch.autograd.grad((y, last), wanted, (y.detach(), last.detach()))
            assert not traffic.get_total_counts()
            found.append([y, last, *gradients])
        for expected, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours.full_tensor(), expected)
    with pytest.raises(ValueError, match=r"sharded along dim 2.* ema_ext\.distributed"):
        ema_ext.ema(distribute_tensor(x, mesh, [Shard(2)]), 0.1)


@pytest.mark.parametrize("name", [function.__name__ for function in CHECKS])
def test_in_processes(name: str, world: dict[str, str]) -> None:
    """Each check's own docstring says what it catches."""
    assert not world[name], world[name]


def test_without_a_group() -> None:
    """Catches an assertion of torch's where one sentence of ours is due."""
    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed.ema(torch.ones(3), 0.1)


def fails(rank: int, world: int, folder: str, hangs: bool) -> None:
    """The last rank dies, or hangs, before the second call; the others see how that one ends."""
    ranks.join_group(rank, world, folder, seconds=2)
    x = torch.ones(3)
    distributed.ema(x, 0.1)
    if rank == world - 1:
        time.sleep(30 if hangs else 0)
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        distributed.ema(x, 0.1)
    assert time.monotonic() - began < 15
    (Path(folder) / f"{rank} was told").touch()
    os._exit(0)  # without the group's own farewell, which would wait for the others


@pytest.mark.parametrize("hangs", [False, True], ids=["dies", "hangs"])
def test_a_failing_rank_gives_the_others_an_error(hangs: bool, tmp_path: Path) -> None:
    """Catches a wait without end, and one that does not honour the group's timeout."""
    context = ranks.start(fails, (3, str(tmp_path), hangs), 3)
    told = [tmp_path / f"{rank} was told" for rank in range(2)]
    try:
        deadline = time.monotonic() + 60
        while not all(path.exists() for path in told):
            assert time.monotonic() < deadline, "the others still wait"
            context.join(timeout=0.1)
    finally:
        for process in context.processes:
            process.kill()
