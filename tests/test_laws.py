"""The laws of the recurrence, on arguments that hypothesis draws: tests/conftest.py for how many.

Where a law compares two results of the kernels, each may be off by its bound, and the two differ by
the sum of both; a law that says "the same bits" says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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

from ema_ext import _library, ema

DEVICES = ["cpu"]
if torch.cuda.is_available() and _library.cuda_unavailable_reason() is None:
    DEVICES.append("cuda")


def expanded(x: Tensor) -> Tensor:
    """Its first rows in place of all others; a tensor of time alone stays."""
    return x.select(0, 0).expand(x.shape) if x.dim() > 1 and len(x) else x


ALL_LAYOUTS = {**LAYOUTS, "expanded": expanded}


@dataclass(frozen=True)
class Call:
    """Arguments of ema."""

    x: Tensor
    alpha: Any
    dim: int
    initial_state: Any
    reverse: bool
    layout: str

    @property
    def options(self) -> dict[str, Any]:
        return {"dim": self.dim, "initial_state": self.initial_state, "reverse": self.reverse}

    def run(self, x: Tensor | None = None) -> Tensor:
        return ema(self.x if x is None else x, self.alpha, **self.options)

    def bound(self, x: Tensor | None = None) -> oracle.Array:
        return bounds.pointwise_bound(self.x if x is None else x, self.alpha, **self.options)

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
def calls(draw: Any, *, least: int = 0, states: bool = True, learned: bool = False) -> Call:
    """Any call on few samples; `least` samples in a row; `learned`: alpha is a tensor."""
    rows = draw(st.lists(st.integers(1, 9), max_size=3))
    length = draw(st.one_of(st.integers(least, 40), st.integers(least, 300)))
    dim = draw(st.integers(0, len(rows)))
    shape = (*rows[:dim], length, *rows[dim:])
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**32))
    layout, device = draw(st.sampled_from(list(ALL_LAYOUTS))), draw(st.sampled_from(DEVICES))
    mean = draw(st.sampled_from([0.0, 3.0, 1000.0]))
    x = ALL_LAYOUTS[layout]((normal(seed, *shape) + mean).to(device, dtype))

    def broadcast(sizes: tuple[int, ...]) -> tuple[int, ...]:
        kept = tuple(size if draw(st.booleans()) else 1 for size in sizes)
        return kept[draw(st.integers(0, len(kept))) :]

    alpha: Any = draw(st.floats(1e-5, 1.0))
    if learned or draw(st.booleans()):
        weights = normal(seed + 1, *broadcast((*rows[:dim], 1, *rows[dim:]))).sigmoid() * alpha
        alpha = weights.to(device, draw(st.sampled_from(DTYPES)))
    state: Any = None
    if states and draw(st.booleans()):
        # in the dtype that states are kept in, or one that is exact in it
        wide = bounds.accumulate_dtype(dtype)
        kept = draw(st.sampled_from([wide, torch.float32, torch.bfloat16]))
        state = normal(seed + 2, *broadcast(tuple(rows))).to(device, kept)
    start = draw(st.sampled_from([dim, dim - len(shape)]))
    return Call(x, alpha, start, state, draw(st.booleans()), layout)


@given(calls())
def test_the_oracle_in_every_layout(call: Call) -> None:
    """Catches a shape, stride, dim, dtype, form of alpha or of the state nobody thought of."""
    y = call.run()
    bounds.check_forward(y, call.x, call.alpha, **call.options, label="laws")
    assert y.dtype == call.x.dtype
    assert y.stride() == torch.empty_like(call.x).stride()


@given(calls(learned=True), st.integers(0, 99), st.sampled_from(list(LAYOUTS)))
def test_the_oracle_backward(call: Call, seed: int, layout: str) -> None:
    """Catches the same in the gradients, where the gradient has a layout of its own."""
    grad_y = LAYOUTS[layout](normal(seed, *call.x.shape).to(call.x))
    inputs = [call.x.detach().requires_grad_(), call.alpha.clone().requires_grad_()]
    state = call.initial_state
    if state is not None:
        state = state.clone().requires_grad_()
        inputs.append(state)
    y = ema(*inputs[:2], dim=call.dim, initial_state=state, reverse=call.reverse)
    grads = [*torch.autograd.grad(y, inputs, grad_y), None][:3]
    bounds.check_backward(tuple(grads), grad_y, call.x, call.alpha, **call.options, label="laws")


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
    cut = int(where * call.x.shape[call.dim])
    first, then = call.x.split([cut, call.x.shape[call.dim] - cut], call.dim)
    if call.reverse:
        first, then = then, first
    outputs, state = [], call.initial_state
    for piece in (first, then):
        if piece.shape[call.dim] > 0:
            options = {**call.options, "initial_state": state}
            y, state = ema(piece, call.alpha, **options, return_state=True)
            outputs.append(y)
    whole = torch.cat(outputs[::-1] if call.reverse else outputs, call.dim)
    bounds.check_forward(whole, call.x, call.alpha, **call.options, label="chunks")


@given(calls(states=False), st.floats(-3e4, 3e4))
def test_constant_input_is_a_fixed_point(call: Call, value: float) -> None:
    """Catches weights that do not sum to 1; without a start they would need a long run-up."""
    x = call.with_values(torch.full(call.x.shape, value, dtype=torch.float64))
    bounds.assert_within(call.run(x), x, call.bound(x), "fixed point")


@given(calls(states=False), st.booleans())
def test_alpha_one_is_the_identity_and_alpha_zero_holds(call: Call, tensor: bool) -> None:
    """Catches 1 - alpha that is not exactly 0, or not exactly 1. The same bits are due."""
    one, zero = (torch.tensor(v) if tensor else v for v in (1.0, 0.0))
    assert torch.equal(ema(call.x, one, **call.options), call.x)
    first = call.x.narrow(call.dim, -1 if call.reverse else 0, min(1, call.x.shape[call.dim]))
    assert torch.equal(ema(call.x, zero, **call.options), first.expand(call.x.shape))


@given(calls(least=1), st.integers(0, 99))
def test_the_backward_is_the_transpose(call: Call, seed: int) -> None:
    """Catches <g, S x> != <S' g, x>: a backward that is a gradient of something else."""
    grad_y = normal(seed, *call.x.shape).to(call.x)
    x = call.x.detach().requires_grad_()
    state = call.initial_state
    inputs = [x]
    if state is not None:
        state = state.clone().requires_grad_()
        inputs.append(state)
    y = ema(x, call.alpha, dim=call.dim, initial_state=state, reverse=call.reverse)
    grads = torch.autograd.grad(y, inputs, grad_y)
    of_grads = bounds.gradient_bounds(grad_y, call.x, call.alpha, **call.options)
    g, exact = oracle.longdouble(grad_y), [oracle.longdouble(v) for v in inputs]
    forward = (g * oracle.longdouble(y)).sum()
    backward = sum((oracle.longdouble(d) * v).sum() for d, v in zip(grads, exact, strict=True))
    room = (np.abs(g) * call.bound()).sum() + (np.abs(exact[0]) * of_grads.x).sum()
    if state is not None:
        room += (np.abs(exact[1]) * of_grads.initial_state).sum()
    room += 4 * oracle.UNIT * g.size * (np.abs(g) * np.abs(oracle.longdouble(y))).sum()
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
    other = replace(call, reverse=not call.reverse)
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
    bounds.check_forward(y, spoilt, call.alpha, **call.options, label="laws non-finite")
    reached = torch.zeros_like(values, dtype=torch.bool)
    index[dim] = slice(None, n + 1) if call.reverse else slice(n, None)
    reached[tuple(index)] = True
    assert torch.equal(y[~reached], clean[~reached])


@pytest.fixture
def _restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_restored_threads")
@settings(max_examples=settings().max_examples // 4)
@given(
    st.sampled_from([(150_000,), (2, 140_001), (300, 201), (40, 20, 90), (5, 9000)]),
    st.data(),
)
def test_any_number_of_threads(shape: tuple[int, ...], data: Any) -> None:
    """Catches a race, or an order of sums that threads decide. The same bits are due."""
    dim = data.draw(st.integers(0, len(shape) - 1))
    dtype = data.draw(st.sampled_from(DTYPES))
    reverse = data.draw(st.booleans())
    layout = data.draw(st.sampled_from(list(ALL_LAYOUTS)))
    x = ALL_LAYOUTS[layout](normal(0, *shape).to(dtype)).detach().requires_grad_()
    alpha = torch.tensor(data.draw(st.sampled_from([1e-4, 0.1, 0.9])), requires_grad=True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, state = ema(x, alpha, dim=dim, reverse=reverse, return_state=True)
        grads = torch.autograd.grad(y.float().square().sum() + state.sum(), (x, alpha))
        results.append((y, state, *grads))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)
