"""linear_recurrence: any a and b that broadcast, held to the oracle, and every gradient."""

from __future__ import annotations

from typing import Any

import bounds
import pytest
import torch
from cases import DTYPES, LAYOUTS, LENGTHS, assert_same, quarters, signal
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from ema_ext import ema, linear_recurrence

# torch's own, on the first use of forward mode
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)

#: Shapes of a and b over (3, 5, time) and (3, time, 5): T stands for the time axis.
T = -1
BROADCASTS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((), (3, 5, T)),
    ((T,), (3, 5, T)),
    ((5, 1), (3, 5, T)),
    ((3, 1, T), (3, 5, T)),
    ((3, 5, T), (3, 5, T)),
    ((3, 5, T), (T,)),
    ((3, 5, T), (5, 1)),
    ((3, 5, T), ()),
    ((3, 1, 1), (5, T)),
    ((T, 1), (3, T, 5)),
    ((3, 1, 5), (3, T, 5)),
    ((3, T, 1), (T, 5)),
    ((3, T, 5), (3, T, 5)),
)


def ratios(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    """Numbers between -1 and 1, most of them near 1, now and then 0: a reset."""
    generator = torch.Generator().manual_seed(seed)
    a = 1 - torch.rand(shape, generator=generator, dtype=torch.float64) ** 3 * 2
    return torch.where(torch.rand(shape, generator=generator) > 0.97, 0.0, a).to(dtype)


def sized(shape: tuple[int, ...], length: int) -> tuple[int, ...]:
    return tuple(length if n == T else n for n in shape)


def loop(
    a: Tensor, b: Tensor, *, dim: int = -1, initial_state: Any = 0.0, reverse: bool = False
) -> Tensor:
    """The recurrence as it is written."""
    a, b = (t.movedim(dim, 0) for t in torch.broadcast_tensors(a, b))
    y, outputs = initial_state + torch.zeros_like(b[0]), []
    for n in range(len(a)) if not reverse else reversed(range(len(a))):
        y = a[n] * y + b[n]
        outputs.append(y)
    return torch.stack(outputs[::-1] if reverse else outputs).movedim(0, dim)


def check(a: Tensor, b: Tensor, **options: Any) -> None:
    """Forward and every first gradient of one call, held to the oracle."""
    inputs = [a.detach().requires_grad_(), b.detach().requires_grad_()]
    state = options.get("initial_state")
    if isinstance(state, Tensor):
        options["initial_state"] = state.detach().requires_grad_()
        inputs.append(options["initial_state"])
    y, last = linear_recurrence(*inputs[:2], return_state=True, **options)
    assert y.dtype == b.dtype
    assert last.dtype == bounds.accumulate_dtype(b.dtype)
    bounds.check_recurrence(y, a, b, **options)
    with torch.no_grad():
        assert torch.equal(linear_recurrence(a, b, **options), y)
    grad_y = signal(*y.shape, dtype=y.dtype, seed=7)
    grad_state = signal(*last.shape, dtype=last.dtype, seed=8)
    grads = torch.autograd.grad((y, last), inputs, (grad_y, grad_state))
    for grad, value in zip(grads, inputs, strict=True):
        assert grad.shape == value.shape
        assert grad.dtype == value.dtype
    grads = (*grads, None)[:3]
    bounds.check_recurrence_backward(grads, grad_y, a, b, grad_state=grad_state, **options)


def test_by_hand() -> None:
    """Catches a swapped argument: 2 = 1/2 * 2 + 1, then a reset, then growth."""
    a, b = torch.tensor([0.5, 0.5, 0.0, 2.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert linear_recurrence(a, b).tolist() == [1.0, 1.5, 1.0, 3.0]
    assert linear_recurrence(a, b, initial_state=2).tolist() == [2.0, 2.0, 1.0, 3.0]
    assert linear_recurrence(a, b, reverse=True).tolist() == [1.75, 1.5, 1.0, 1.0]
    assert linear_recurrence(2, b).tolist() == [1.0, 3.0, 7.0, 15.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length: int, dtype: torch.dtype) -> None:
    """Catches a tail that is skipped, and a stretch or chunk that starts from the wrong y."""
    a, b = ratios(3, length, dtype=dtype), signal(3, length, dtype=dtype)
    bounds.check_recurrence(linear_recurrence(a, b), a, b)
    if length:  # for 0 see test_without_steps
        check(a, b, initial_state=signal(3, seed=2))
        check(0.9 * a[:, :1], b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shapes", BROADCASTS, ids=str)
def test_every_broadcast(
    shapes: tuple[tuple[int, ...], ...], reverse: bool, dtype: torch.dtype
) -> None:
    """Catches a coefficient of another row, and a gradient summed over the wrong axes."""
    dim = -1 if any(T in shape[-1:] for shape in shapes) else -2
    a_shape, b_shape = (sized(shape, 70) for shape in shapes)
    for wide in (dtype, torch.float64):
        a, b = ratios(*a_shape, dtype=wide), signal(*b_shape, dtype=dtype)
        check(a, b, dim=dim, reverse=reverse)
        check(a, b, dim=dim, reverse=reverse, initial_state=signal(5 if dim == -2 else 1, seed=4))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    """Catches a stride taken from another operand; what lies between the samples is NaN."""
    a, b = ratios(4, 3, 129, dtype=torch.float32), signal(4, 3, 129, dtype=torch.float32)
    for dim in (1, 2):
        check(LAYOUTS[layout](a), b, dim=dim)
        check(a, LAYOUTS[layout](b), dim=dim)


def test_an_average_is_a_recurrence() -> None:
    """Catches a disagreement between the two functions: a = 1 - alpha, b = alpha x."""
    x, alpha = signal(3, 400), torch.rand(3, 400).double()
    start = signal(3, seed=1)
    y = linear_recurrence(1 - alpha, alpha * x, initial_state=start)
    bound = bounds.pointwise_bound(x, alpha, initial_state=start, roundings=bounds.VARYING)
    bounds.assert_within(y, ema(x, alpha, initial_state=start), 2 * bound, "average")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_state_continues_the_recurrence(dtype: torch.dtype) -> None:
    """Catches a state that is rounded to a half type, or is that of the wrong end."""
    a, b = ratios(900), signal(2, 900, dtype=dtype)
    for reverse in (False, True):
        cuts = [slice(500), slice(500, 900)]
        pieces, state = [], None
        for cut in cuts[::-1] if reverse else cuts:
            y, state = linear_recurrence(
                a[cut], b[:, cut], initial_state=state, reverse=reverse, return_state=True
            )
            pieces.append(y)
        whole = torch.cat(pieces[::-1] if reverse else pieces, 1)
        bounds.check_recurrence(whole, a, b, reverse=reverse, label="recurrence chunks")


def test_without_steps() -> None:
    """Catches an empty row that forgets its state, and gradients that are not 0 without steps."""
    a, b = torch.rand(0, requires_grad=True), torch.rand(3, 0, requires_grad=True)
    y, state = linear_recurrence(a, b, return_state=True)
    assert y.shape == (3, 0)
    assert state.tolist() == [0, 0, 0]
    start = torch.ones(3, requires_grad=True)
    y, state = linear_recurrence(a, b, initial_state=start, return_state=True)
    assert state.tolist() == [1, 1, 1]
    grads = torch.autograd.grad(y.sum() + 2 * state.sum(), (a, b, start))
    assert [tuple(g.shape) for g in grads] == [(0,), (3, 0), (3,)]
    assert grads[2].tolist() == [2, 2, 2]
    one = torch.rand(1, requires_grad=True)
    linear_recurrence(one, torch.rand(0, 4)).sum().backward()
    assert one.grad is not None
    assert one.grad.tolist() == [0]


@pytest.mark.parametrize("where", [0, 3, 100, 500, 899])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_as_in_the_loop(value: float, where: int) -> None:
    """Catches a NaN that reaches back or another row, and a zero that meets an infinity wrongly."""
    for shape, dim in (((3, 900), 1), ((900, 20), 0)):
        for operand in range(2):
            a, b = ratios(*shape).clamp(-0.9, 0.9), signal(*shape)
            (a, b)[operand].select(dim, where)[1] = value
            a.select(dim, min(where + 60, 899))[1] = 0.0
            bounds.check_recurrence(linear_recurrence(a, b, dim=dim), a, b, dim=dim)


def test_a_reset_forgets_any_finite_past() -> None:
    """Catches 0 times what a product of large coefficients has overflown to."""
    a, b = torch.full((600,), 3e38), torch.zeros(600)
    a[300], b[300:] = 0.0, 1.0
    a[301:] = 1.0  # and then counts, without rounding
    for dtype in (torch.float32, torch.float64):
        want = loop(a.double() ** 4, b.double()).to(dtype)
        assert torch.equal(linear_recurrence(a.double() ** 4, b.to(dtype)), want)


@pytest.mark.parametrize(
    ("a_shape", "b_shape"), [((2, 6), (2, 6)), ((6,), (2, 6)), ((2, 1), (2, 6)), ((2, 6), (6,))]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_derivatives(reverse: bool, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> None:
    """Catches a wrong first or second derivative, one input at a time."""
    values = ratios(*a_shape), signal(*b_shape), signal(2, seed=1)

    def call(a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return linear_recurrence(a, b, initial_state=s, reverse=reverse, return_state=True)

    for free in range(3):
        inputs = [t.clone().requires_grad_(i == free) for i, t in enumerate(values)]
        assert gradcheck(call, inputs, check_forward_ad=True)
        assert gradgradcheck(call, inputs)


def test_transforms() -> None:
    """Catches a missing batching rule, or a forward mode that forgets an argument."""
    a, b, s = quarters(5), quarters(3, 5, seed=1), quarters(3, seed=2)

    def full(f: Any) -> Any:
        return lambda a, b, s: f(a, b, initial_state=s)

    def energy(f: Any) -> Any:
        return lambda *arguments: full(f)(*arguments).square().sum()

    both = (linear_recurrence, loop)
    assert_same(*(jvp(full(f), (a, b, s), (a, b, s)) for f in both))
    assert_same(*(jvp(lambda a, f=f: f(a, b), (a,), (a,)) for f in both))
    assert_same(*(jacrev(full(f), (0, 1, 2))(a, b, s) for f in both))
    assert_same(*(jacfwd(full(f), (0, 1, 2))(a, b, s) for f in both))
    assert_same(*(hessian(energy(f), (0, 1, 2))(a, b, s) for f in both))
    assert_same(*(jacrev(jacrev(energy(f), (0, 1, 2)), (0, 1, 2))(a, b, s) for f in both))
    many, batch, states = quarters(4, 5), quarters(4, 3, 5, seed=1), quarters(4, 3, seed=2)
    for dims in ((0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)):
        values = [
            batched if d == 0 else one
            for d, batched, one in zip(dims, (many, batch, states), (a, b, s), strict=True)
        ]
        assert_same(*(vmap(full(f), dims)(*values) for f in both))
    assert_same(*(vmap(jacrev(lambda a, f=f: f(a, b)))(many) for f in both))
    with pytest.raises(RuntimeError, match="forward mode over forward mode with a tensor a"):
        jacfwd(jacfwd(lambda a: linear_recurrence(a, b)))(a)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled() -> None:
    """Catches a graph break, a wrong fake kernel, and a new graph for every length."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_recurrence, fullgraph=True, dynamic=True, backend=graphs)
    for length in (7, 12, 30):
        inputs = [t.requires_grad_() for t in (ratios(length), signal(3, length), signal(3))]
        got, want = (f(*inputs[:2], initial_state=inputs[2]) for f in (compiled, linear_recurrence))
        assert torch.equal(got, want)
        pairs = zip(*(torch.autograd.grad(y.sum(), inputs) for y in (got, want)), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("name", ["linear_recurrence", "linear_recurrence_with_state"])
def test_operators_keep_their_promises(name: str) -> None:
    """Catches a fake kernel of other shapes or strides, and a schema that hides a write."""
    op = getattr(torch.ops.ema_ext, name).default
    for b in (signal(3, 5), signal(5, 3).T):
        arguments = (ratios(5), b, signal(3), 1, False)
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
        backward = (b, signal(3), ratios(5), b, signal(3), 1, False)
        torch.library.opcheck(
            torch.ops.ema_ext.linear_recurrence_backward.default,
            backward,
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("swapped", [False, True])
def test_the_same_bits_from_any_number_of_threads(swapped: bool) -> None:
    """Catches a sum over rows or over time whose order depends on the threads."""
    narrow, wide = (3000,), (40, 3000)
    shapes = (wide, narrow) if swapped else (narrow, wide)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        inputs = [
            ratios(*shapes[0], dtype=torch.float32).requires_grad_(),
            signal(*shapes[1], dtype=torch.float32).requires_grad_(),
            torch.tensor(1.0, requires_grad=True),
        ]
        y = linear_recurrence(inputs[0], inputs[1], initial_state=inputs[2])
        found.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    torch.set_num_threads(2)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "b list": ({"b": [1.0]}, TypeError, "b must be a torch.Tensor, got list"),
    "b integer": ({"b": torch.ones(3, 5).long()}, TypeError, r"b must be one of .* b.float\(\)"),
    "b complex": ({"b": torch.ones(3, 5) * 1j}, TypeError, "b must be real, got torch.complex64"),
    "b sparse": ({"b": torch.ones(3, 5).to_sparse()}, TypeError, "b must be a dense tensor"),
    "a str": ({"a": "1"}, TypeError, "a must be a float or a torch.Tensor, got str"),
    "a bool": ({"a": True}, TypeError, "a must be a float or a torch.Tensor, got bool"),
    "a complex": ({"a": torch.ones(5) * 1j}, TypeError, "a must be real, got torch.complex64"),
    "a of another size": (
        {"a": torch.ones(4)},
        ValueError,
        r"a of shape \(4,\) and b of shape \(3, 5\) do not broadcast$",
    ),
    "a per row without a time axis": (
        {"a": torch.ones(3)},
        ValueError,
        r"a of shape \(3,\) .* do not broadcast; did you mean a\[:, None\]\?",
    ),
    "b per row without a time axis": (
        {"a": torch.ones(3, 5), "b": torch.ones(3)},
        ValueError,
        r"b of shape \(3,\) do not broadcast; did you mean b\[:, None\]\?",
    ),
    "a on another device": (
        {"a": torch.ones(5, device="meta")},
        RuntimeError,
        "a is on meta but b is on cpu",
    ),
    "no dimension": ({"a": 0.5, "b": torch.tensor(1.0)}, ValueError, "at least 1 dimension"),
    "dim": ({"dim": 2}, IndexError, r"dim out of range .* \[-2, 1\], but got 2"),
    "dim float": ({"dim": 1.0}, TypeError, "dim must be an int, got float"),
    "initial_state": (
        {"initial_state": torch.ones(2)},
        ValueError,
        r"initial_state of shape \(2,\) does not expand to \(3,\), the shape of a and b without",
    ),
    "initial_state on another device": (
        {"initial_state": torch.ones(3, device="meta")},
        RuntimeError,
        "initial_state is on meta but b is on cpu",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    """Catches a message that does not name the argument and both values, or a crash."""
    change, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        linear_recurrence(**{"a": torch.ones(5), "b": torch.ones(3, 5), **change})


def test_meta_tensors() -> None:
    """Catches a shape or dtype that depends on data."""
    y, state = linear_recurrence(
        torch.ones(5, device="meta"),
        torch.ones(3, 1, dtype=torch.half, device="meta"),
        return_state=True,
    )
    assert (y.shape, y.dtype) == ((3, 5), torch.half)
    assert (state.shape, state.dtype) == ((3,), torch.float32)
