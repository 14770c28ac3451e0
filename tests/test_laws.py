"""The laws of the recurrence, on arguments that hypothesis draws: tests/conftest.py for how many.

Where a law compares two results of the kernels, each may be off by its bound, and the two differ by
the sum of both; a law that says "the same bits" says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import bounds
import numpy as np
import oracle
import pytest
import torch
from cases import DTYPES, LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import _ema_ext
from ema_ext import _library, ema, linear_recurrence

DEVICES = ["cpu"]
if torch.cuda.is_available() and _library.cuda_unavailable_reason() is None:
    DEVICES.append("cuda")

#: Those that a call may be forced to (_ema_ext.force_cpu_strategy); "" leaves it the choice.
STRATEGIES = ("", "rows", "lanes", "cut")

THREADS = torch.get_num_threads()


def expanded(x: Tensor) -> Tensor:
    """Its first rows in place of all others; a tensor of time alone stays."""
    return x.select(0, 0).expand(x.shape) if x.dim() > 1 and len(x) else x


ALL_LAYOUTS = {**LAYOUTS, "expanded": expanded}


@dataclass(frozen=True)
class Call:
    """Arguments of ema, or of linear_recurrence: then alpha is its a, and x its b."""

    op: str
    x: Tensor
    alpha: Any
    dim: int
    initial_state: Any
    reverse: bool
    layout: str
    strategy: str
    threads: int

    @property
    def options(self) -> dict[str, Any]:
        return {"dim": self.dim, "initial_state": self.initial_state, "reverse": self.reverse}

    @property
    def varies(self) -> bool:
        """Whether alpha has a value per sample."""
        axis = self.dim % self.x.dim() - self.x.dim()
        return (
            isinstance(self.alpha, Tensor)
            and self.alpha.dim() >= -axis
            and self.alpha.shape[axis] != 1
        )

    def steps(self, begin: int, count: int) -> Any:
        """Alpha's values of these samples."""
        if not self.varies:
            return self.alpha
        return self.alpha.narrow(self.dim % self.x.dim() - self.x.dim(), begin, count)

    @property
    def rounded(self) -> dict[str, Any]:
        """How the bounds count, as an option of theirs."""
        stepwise = self.op != "ema" and self.x.dtype == torch.float64
        constant = bounds.STEPWISE if stepwise else bounds.KERNEL
        return {"roundings": bounds.VARYING if self.varies else constant}

    @contextmanager
    def forced(self) -> Iterator[None]:
        """As many threads, and the strategy."""
        _ema_ext.force_cpu_strategy(self.strategy)
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            _ema_ext.force_cpu_strategy("")
            torch.set_num_threads(THREADS)

    def run(self, x: Tensor | None = None, **options: Any) -> Any:
        x = self.x if x is None else x
        alpha, options = options.pop("alpha", self.alpha), {**self.options, **options}
        with self.forced():
            if self.op == "ema":
                return ema(x, alpha, **options)
            return linear_recurrence(alpha, x, **options)

    def bound(self, x: Tensor | None = None) -> oracle.Array:
        x = self.x if x is None else x
        if self.op == "ema":
            return bounds.pointwise_bound(x, self.alpha, **self.options, **self.rounded)
        return bounds.recurrence_bound(self.alpha, x, **self.options, **self.rounded)

    def check(self, y: Tensor, label: str = "laws", x: Tensor | None = None) -> None:
        x = self.x if x is None else x
        expected = (
            oracle.ema(x, self.alpha, **self.options)
            if self.op == "ema"
            else oracle.linear_recurrence(self.alpha, x, **self.options)
        )
        bounds.assert_within(y, expected, self.bound(x), f"{label} {self.op} y")
        if self.op == "ema" and not self.varies:
            limit = bounds.row_bound(expected, y.dtype, self.dim, self.initial_state)
            bounds.assert_within(y, expected, limit, f"{label} {self.op} y by row")

    def gradients(
        self, grad_y: Tensor, grad_state: Tensor | None, **how: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """To x, alpha and initial_state, if they are tensors."""
        arguments = [self.x, self.alpha, self.initial_state]
        leaves = [
            value.detach().requires_grad_() if isinstance(value, Tensor) else value
            for value in arguments
        ]
        state = {"return_state": True} if grad_state is not None else {}
        result = self.run(leaves[0], alpha=leaves[1], initial_state=leaves[2], **state)
        wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        outputs, through = ((result,), (grad_y,)) if not state else (result, (grad_y, grad_state))
        with self.forced():
            grads = iter(torch.autograd.grad(outputs, wanted, through, **how))
        found = [next(grads) if isinstance(leaf, Tensor) else None for leaf in leaves]
        return found[0], found[1], found[2]  # type: ignore[return-value]

    def gradient_bounds(
        self, grad_y: Tensor, grad_state: Tensor | None = None, **rounded: Any
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The gradients due to x, alpha and initial_state, and by how much each may be off."""
        options = {**self.options, "grad_state": grad_state, **self.rounded, **rounded}
        if self.op != "ema":
            exact, within = bounds.recurrence_gradients(grad_y, self.alpha, self.x, **options)
            return (exact[1], exact[0], exact[2]), (within[1], within[0], within[2])
        off = bounds.gradient_bounds(grad_y, self.x, self.alpha, **options)
        del options["roundings"]
        due = oracle.ema_backward(grad_y, self.x, self.alpha, **options)
        return (due.x, due.alpha, due.initial_state), (off.x, off.alpha, off.initial_state)

    def check_gradients(
        self, grads: Any, grad_y: Tensor, grad_state: Tensor | None, label: str
    ) -> None:
        due, off = self.gradient_bounds(grad_y, grad_state)
        names = ("x", "alpha", "initial_state")
        for name, grad, want, limit in zip(names, grads, due, off, strict=True):
            if grad is not None:
                # a sum over rows and samples may leave the range of a half
                bounds.assert_within_range(
                    grad, np.asarray(want), np.asarray(limit), f"{label} {self.op} grad {name}"
                )

    def with_values(self, values: Tensor) -> Tensor:
        """Other samples in the layout of x."""
        return ALL_LAYOUTS[self.layout](values.to(self.x))


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def integers(seed: int, *shape: int) -> Tensor:
    """Sums and doubles of these are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).double()


@st.composite
def calls(
    draw: Any,
    *,
    least: int = 0,
    states: bool = True,
    learned: bool = False,
    ops: tuple[str, ...] = ("ema", "linear_recurrence"),
    varying: bool = True,
) -> Call:
    """Any call on few samples; `least` samples in a row; `learned`: alpha is a tensor."""
    op = draw(st.sampled_from(ops))
    rows = draw(st.lists(st.integers(1, 9), max_size=3))
    length = draw(st.one_of(st.integers(least, 40), st.integers(least, 300)))
    dim = draw(st.integers(0, len(rows)))
    shape = (*rows[:dim], length, *rows[dim:])
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**32))
    layout, device = draw(st.sampled_from(list(ALL_LAYOUTS))), draw(st.sampled_from(DEVICES))
    mean = draw(st.sampled_from([0.0, 3.0, 1000.0] if op == "ema" else [0.0, 3.0]))
    x = ALL_LAYOUTS[layout]((normal(seed, *shape) + mean).to(device, dtype))

    def broadcast(sizes: tuple[int, ...]) -> tuple[int, ...]:
        kept = tuple(size if draw(st.booleans()) else 1 for size in sizes)
        return kept[draw(st.integers(0, len(kept))) :]

    alpha: Any = draw(st.floats(1e-5, 1.0))
    if learned or draw(st.booleans()):
        steps = length if varying and draw(st.booleans()) else 1
        weights = normal(seed + 1, *broadcast((*rows[:dim], steps, *rows[dim:]))).sigmoid() * alpha
        alpha = weights.to(device, draw(st.sampled_from(DTYPES)))
        if alpha.dim() > 0:
            alpha = ALL_LAYOUTS[draw(st.sampled_from(list(ALL_LAYOUTS)))](alpha)
    state: Any = None
    if states and draw(st.booleans()):
        # in the dtype that states are kept in, or one that is exact in it
        wide = bounds.accumulate_dtype(dtype)
        kept = draw(st.sampled_from([wide, torch.float32, torch.bfloat16, None]))
        state = normal(seed + 2, *broadcast(tuple(rows) if kept else ())).to(device, kept or wide)
        state = state if kept else state.item()
    start = draw(st.sampled_from([dim, dim - len(shape)]))
    reverse, strategy = draw(st.booleans()), draw(st.sampled_from(STRATEGIES))
    threads = draw(st.integers(1, 3))
    return Call(op, x, alpha, start, state, reverse, layout, strategy, threads)


def states_like(call: Call, seed: int) -> Tensor:
    """A gradient of the state."""
    shape = list(call.x.shape)
    del shape[call.dim]
    return normal(seed, *shape).to(call.x.device, bounds.accumulate_dtype(call.x.dtype))


@given(calls())
def test_the_oracle_in_every_layout(call: Call) -> None:
    """Catches a shape, stride, dim, dtype, form of alpha or of the state nobody thought of, and a
    strategy that is wrong where it is not chosen.
    """
    y = call.run()
    call.check(y)
    assert y.dtype == call.x.dtype
    assert y.stride() == torch.empty_like(call.x).stride()


@given(calls(learned=True), st.integers(0, 99), st.sampled_from(list(LAYOUTS)), st.booleans())
def test_the_oracle_backward(call: Call, seed: int, layout: str, last: bool) -> None:
    """Catches the same in the gradients, where the gradient has a layout of its own."""
    grad_y = LAYOUTS[layout](normal(seed, *call.x.shape).to(call.x))
    # without samples there is none to return, or the one that was given
    last = last and (call.x.shape[call.dim] > 0 or isinstance(call.initial_state, Tensor))
    grad_state = states_like(call, seed + 1) if last else None
    call.check_gradients(call.gradients(grad_y, grad_state), grad_y, grad_state, "laws")


@given(calls(least=1, learned=True), st.integers(0, 99))
def test_differentiable_gradients_are_the_gradients(call: Call, seed: int) -> None:
    """Catches a composed backward, taken where gradients are differentiated again, that is that of
    another function. It multiplies lambda by y[n-1] as a coefficient per sample does, but may take
    both from a kernel that rounds 16 times where 7 are counted.
    """
    call = replace(call, x=call.x.double(), alpha=call.alpha.double())
    grad_y = normal(seed, *call.x.shape).to(call.x)
    due, off = call.gradient_bounds(grad_y, roundings=bounds.VARYING)
    grads = call.gradients(grad_y, None, create_graph=True)
    for got, want, limit in zip(grads, due, off, strict=True):
        if got is not None:
            bounds.assert_within(got, want, 3 * limit, "composed")


@given(calls(states=False), st.integers(0, 99), st.sampled_from([-2.0, -1.0, 0.5, 2.0]))
def test_linear_in_x(call: Call, seed: int, factor: float) -> None:
    """Catches a sample that enters twice, or a constant that does not scale."""
    x, z = integers(seed, *call.x.shape), integers(seed + 1, *call.x.shape)
    parts = [call.with_values(values) for values in (x, z, x + factor * z)]
    y, w, both = (call.run(part) for part in parts)
    of_y, of_w, of_both = (call.bound(part) for part in parts)
    expected = oracle.longdouble(y) + factor * oracle.longdouble(w)
    bounds.assert_within(both, expected, of_both + of_y + abs(factor) * of_w, "linear")


@given(calls(least=1), st.floats(0, 1))
def test_concatenation(call: Call, where: float) -> None:
    """Catches a state that is not all that the future needs of the past, split anywhere."""
    length = call.x.shape[call.dim]
    cut = int(where * length)
    pieces = [(0, cut), (cut, length - cut)]
    outputs, state = [], call.initial_state
    for begin, count in reversed(pieces) if call.reverse else pieces:
        if count > 0:
            x = call.x.narrow(call.dim, begin, count)
            part = call.steps(begin, count)
            y, state = call.run(x, alpha=part, initial_state=state, return_state=True)
            outputs.append(y)
    call.check(torch.cat(outputs[::-1] if call.reverse else outputs, call.dim), "chunks")


@given(calls(states=False, ops=("ema",)), st.floats(-3e4, 3e4))
def test_constant_input_is_a_fixed_point(call: Call, value: float) -> None:
    """Catches weights that do not sum to 1; without a start they would need a long run-up."""
    x = call.with_values(torch.full(call.x.shape, value, dtype=torch.float64))
    bounds.assert_within(call.run(x), x, call.bound(x), "fixed point")


@given(calls(states=False), st.booleans())
def test_identity_and_hold(call: Call, tensor: bool) -> None:
    """Catches 1 - alpha that is not exactly 0, or not exactly 1. The same bits are due."""
    one, zero = (torch.tensor(v) if tensor else v for v in (1.0, 0.0))
    if call.op == "ema":
        assert torch.equal(call.run(alpha=one), call.x)
        length = call.x.shape[call.dim]
        first = call.x.narrow(call.dim, max(0, length - 1) * call.reverse, min(1, length))
        assert torch.equal(call.run(alpha=zero), first.expand(call.x.shape))
    else:
        assert torch.equal(call.run(alpha=zero), call.x)
        held = call.run(torch.zeros_like(call.x), alpha=one, initial_state=3)
        assert torch.equal(held, torch.full_like(call.x, 3))


@given(calls(least=1), st.integers(0, 99))
def test_the_backward_is_the_transpose(call: Call, seed: int) -> None:
    """Catches <g, S x> != <S' g, x>: a backward that is a gradient of something else."""
    if isinstance(call.initial_state, float):
        call = replace(call, initial_state=torch.tensor(call.initial_state, dtype=torch.float64))
    grad_y = normal(seed, *call.x.shape).to(call.x)
    y, (grad_x, _, grad_start) = call.run(), call.gradients(grad_y, None)
    _, (off_x, _, off_start) = call.gradient_bounds(grad_y)
    linear = [(grad_x, call.x, off_x)]
    if grad_start is not None:
        linear.append((grad_start, call.initial_state, off_start))
    g = oracle.longdouble(grad_y)
    forward, size = (g * oracle.longdouble(y)).sum(), np.abs(g * oracle.longdouble(y)).sum()
    backward, room = oracle.longdouble(0.0), (np.abs(g) * call.bound()).sum()
    for grad, value, off in linear:
        exact = oracle.longdouble(value)
        backward += (oracle.longdouble(grad) * exact).sum()
        size += np.abs(oracle.longdouble(grad) * exact).sum()
        room += (np.abs(exact) * off).sum()
    room += 2 * oracle.UNIT * g.size * size  # of these sums themselves
    assert abs(forward - backward) <= bounds.SCALE * room


@given(calls(), st.randoms(use_true_random=False))
def test_rows_keep_to_themselves(call: Call, random: Any) -> None:
    """Catches a row that depends on its neighbours or its place: the same bits are due."""
    if call.x.dim() == 1:
        return
    dim = call.dim % call.x.dim()
    axis = 1 if dim == 0 else 0
    order = list(range(call.x.shape[axis]))
    random.shuffle(order)

    def permuted(value: Any, axis: int) -> Any:
        at = axis - ndim + value.dim() if isinstance(value, Tensor) else -1
        return value[(slice(None),) * at + (order,)] if at >= 0 and value.shape[at] > 1 else value

    ndim = call.x.dim()
    x = call.x.clone(memory_format=torch.contiguous_format)
    y = call.run(x)
    alpha = permuted(call.alpha, axis)
    ndim -= 1
    state = permuted(call.initial_state, axis - (axis > dim))
    other = replace(call, alpha=alpha, initial_state=state).run(
        x.index_select(axis, torch.tensor(order))
    )
    assert torch.equal(other, y.index_select(axis, torch.tensor(order)))


@given(calls(), st.sampled_from(list(LAYOUTS)))
def test_layouts_agree(call: Call, layout: str) -> None:
    """Catches a layout that changes more than last bits."""
    here, there = oracle.longdouble(call.run()), call.run(LAYOUTS[layout](call.x))
    bounds.assert_within(there, here, 2 * call.bound(), "two layouts")


@given(calls())
def test_reverse_is_flipped_time(call: Call) -> None:
    """Catches an end of the row that is treated otherwise in reverse: the same bits are due."""
    x = call.x.clone(memory_format=torch.contiguous_format)
    alpha = call.alpha
    if call.varies:
        alpha = alpha.flip(call.dim % x.dim() - x.dim())
    other = replace(call, reverse=not call.reverse, alpha=alpha)
    assert torch.equal(other.run(x.flip(call.dim)).flip(call.dim), call.run(x))


@given(calls())
def test_a_number_and_a_tensor_of_it_agree(call: Call) -> None:
    """Catches an alpha that is rounded on one of the two ways: the same bits are due."""
    value = call.alpha if isinstance(call.alpha, float) else 0.3
    one = replace(call, alpha=value).run()
    assert torch.equal(one, replace(call, alpha=torch.tensor(value, dtype=torch.float64)).run())


@given(
    calls(least=1),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_bad_sample_goes_forward_only(call: Call, bad: float, row: float, when: float) -> None:
    """Catches a NaN that reaches another row or an earlier sample: there the same bits are due."""
    values = call.x.clone(memory_format=torch.contiguous_format)
    by_row = values.movedim(call.dim, -1)
    rows = by_row.flatten(0, -2) if values.dim() > 1 else by_row[None]
    i, n = int(row * len(rows)), int(when * rows.shape[1])
    clean = call.run(values)
    index = list(np.unravel_index(i, by_row.shape[:-1]) if values.dim() > 1 else ())
    dim = call.dim % values.dim()
    index.insert(dim, n)
    spoilt = values.clone()
    spoilt[tuple(int(k) for k in index)] = bad
    y = call.run(spoilt)
    call.check(y, "non-finite", spoilt)
    reached = torch.zeros_like(values, dtype=torch.bool)
    index[dim] = slice(None, n + 1) if call.reverse else slice(n, None)
    if call.varies:  # whose chunk is done again, and so has other last bits
        index[dim] = slice(None)
    reached[tuple(index)] = True
    assert torch.equal(y[~reached], clean[~reached])


@settings(max_examples=settings().max_examples // 4)
@given(
    st.sampled_from([(150_000,), (2, 140_001), (300, 201), (40, 20, 90), (5, 9000)]),
    st.sampled_from(["ema", "linear_recurrence"]),
    st.sampled_from([("",), ("rows", "cut")]),
    st.data(),
)
def test_any_number_of_threads(
    shape: tuple[int, ...], op: str, strategies: tuple[str, ...], data: Any
) -> None:
    """Catches a race, or an order of sums that threads decide, or a row that has other bits where
    it is cut. The same bits are due.
    """
    dim = data.draw(st.integers(0, len(shape) - 1))
    dtype = data.draw(st.sampled_from(DTYPES))
    layout, reverse = data.draw(st.sampled_from(list(ALL_LAYOUTS))), data.draw(st.booleans())
    x = ALL_LAYOUTS[layout](normal(0, *shape).to(dtype))
    steps = shape[dim] if data.draw(st.booleans()) else 1
    weight = data.draw(st.sampled_from([1e-4, 0.1, 0.9]))
    alpha = torch.full((steps, *(1 for _ in shape[dim + 1 :])), weight)
    if op == "linear_recurrence":
        alpha = 1 - alpha
    grad_y = normal(1, *shape).to(dtype)
    results = []
    for strategy in strategies:
        for threads in (1, 2, 3):
            call = Call(op, x, alpha, dim, None, reverse, layout, strategy, threads)
            grad_state = states_like(call, 2)
            y, state = call.run(return_state=True)
            results.append((y, state, *call.gradients(grad_y, grad_state)[:2]))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


def test_strategies_by_name() -> None:
    """Catches a strategy that is forced on nobody because its name is misspelt."""
    with pytest.raises(ValueError, match="'rows', 'lanes', 'cut'"):
        _ema_ext.force_cpu_strategy("lane")
