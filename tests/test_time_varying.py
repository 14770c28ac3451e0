"""An alpha per step: every shape that it may have, held to the oracle, and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import backends
import bounds
import pytest
import torch
from bounds import VARYING
from cases import DTYPES, LAYOUTS, LENGTHS, assert_same, quarters, signal
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from ema_ext import ema, linear_recurrence
from ema_ext.reference import ema_loop

# torch's own, on the first use of forward mode
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)


def weights(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> Tensor:
    """Weights between 0 and 1, small ones too, and now and then 0 and 1 themselves."""
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.rand(shape, generator=generator, dtype=torch.float64)
    pick = torch.rand(shape, generator=generator)
    alpha = torch.where(pick < 0.5, alpha * 1e-3, alpha)
    return torch.where(pick > 0.98, 1.0, torch.where(pick > 0.96, 0.0, alpha)).to(dtype)


def shapes(size: tuple[int, ...], dim: int) -> Iterator[tuple[int, ...]]:
    """Shapes of alpha that vary along dim: the whole, per step, and without each other axis."""
    yield size
    yield tuple(n if d == dim else 1 for d, n in enumerate(size))
    for other in range(len(size)):
        if other != dim:
            yield tuple(1 if d == other else n for d, n in enumerate(size))
    if dim == len(size) - 1:
        yield size[dim:]


def check_gradients(x: Tensor, alpha: Tensor, **options: Any) -> None:
    """Forward and every first gradient of one call, held to the oracle."""
    inputs = [x.detach().requires_grad_(), alpha.detach().requires_grad_()]
    state = options.get("initial_state")
    if isinstance(state, Tensor):
        options["initial_state"] = state.detach().requires_grad_()
        inputs.append(options["initial_state"])
    y, last = ema(*inputs[:2], return_state=True, **options)
    bounds.check_forward(y, x, alpha, roundings=VARYING, label="varying", **options)
    grad_y = signal(*y.shape, dtype=y.dtype, seed=7)
    grad_state = signal(*last.shape, dtype=last.dtype, seed=8)
    grads = torch.autograd.grad((y, last), inputs, (grad_y, grad_state))
    for grad, value in zip(grads, inputs, strict=True):
        assert grad.shape == value.shape
        assert grad.dtype == value.dtype
    grads = (*grads, None)[:3]
    bounds.check_backward(
        grads, grad_y, x, alpha, grad_state=grad_state, roundings=VARYING, label="varying",
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length: int, dtype: torch.dtype) -> None:
    """Catches a tail that is skipped, and a stretch or chunk that starts from the wrong y."""
    x, alpha = 3 + signal(3, length, dtype=dtype), weights(3, length, dtype=dtype)
    y = ema(x, alpha)
    bounds.check_forward(y, x, alpha, roundings=VARYING, label="varying")
    if length:
        assert torch.equal(y[:, 0], x[:, 0])
        check_gradients(x, alpha, initial_state=signal(3, dtype=dtype, seed=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_every_broadcast(dim: int, reverse: bool, dtype: torch.dtype) -> None:
    """Catches a coefficient of another row, and a gradient summed over the wrong axes."""
    size = tuple(70 if d == dim else n for d, n in enumerate((3, 5, 2)))
    x = signal(*size, dtype=dtype)
    for shape in shapes(size, dim):
        for wide in (dtype, torch.float64):
            check_gradients(x, weights(*shape, dtype=wide), dim=dim, reverse=reverse)
    state = torch.tensor(0.5, dtype=torch.float64)
    check_gradients(x, weights(*size), dim=dim, reverse=reverse, initial_state=state)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 33, 65, 130])
def test_rows_side_by_side(width: int) -> None:
    """Catches a block of rows that reads or writes beyond its last one."""
    x = signal(2, 300, width, dtype=torch.float32)
    check_gradients(x, weights(2, 300, width), dim=1)
    check_gradients(x, weights(300, 1), dim=1, reverse=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """Catches a stride taken from another operand; what lies between the samples is NaN."""
    x, alpha = signal(4, 3, 129, dtype=dtype), weights(4, 3, 129, dtype=dtype)
    for dim in (1, 2):
        lay = LAYOUTS[layout]
        for laid in ((lay(x), alpha), (x, lay(alpha))):
            y = ema(*laid, dim=dim)
            bounds.check_forward(y, x, alpha, dim=dim, roundings=VARYING, label="varying")
        check_gradients(lay(x), lay(alpha), dim=dim)


def test_the_first_sample_is_copied() -> None:
    """Catches a first sample that has been added to 0: a negative zero loses its sign."""
    for shape, dim in (((2, 40), 1), ((40, 20), 0)):
        y = ema(torch.full(shape, -0.0), weights(*shape), dim=dim)
        assert bool(y.select(dim, 0).signbit().all())


def test_a_constant_spelt_out_is_the_constant() -> None:
    """Catches an alpha that is taken from the wrong step: here all are the same."""
    x = signal(3, 1000)
    for alpha in (0.0, 0.0625, 0.5, 1.0):
        y = ema(x, torch.full((1000,), alpha))
        bounds.check_forward(y, x, alpha, roundings=VARYING, label="varying")
        assert torch.equal(ema(x, torch.tensor([alpha]).expand(3, 1000)), y)


def test_a_state_continues_the_average() -> None:
    """Catches a state that is not the last sample before it was rounded."""
    for dtype in DTYPES:
        x, alpha = signal(2, 900, dtype=dtype), weights(900)
        y, state = ema(x[:, :500], alpha[:500], return_state=True)
        rest, end = ema(x[:, 500:], alpha[500:], initial_state=state, return_state=True)
        whole, last = ema(x, alpha, return_state=True)
        bounds.check_forward(
            torch.cat([y, rest], 1), x, alpha, roundings=VARYING, label="varying chunks"
        )
        assert torch.equal(last.to(dtype), whole[:, -1])
        assert end.dtype == bounds.accumulate_dtype(dtype)


def test_small_weights_are_not_rounded() -> None:
    """Catches 1 - alpha formed in float32 (off by 6e-4 of alpha = 1e-4) or in half (it is 1)."""
    for dtype in (torch.float32, torch.bfloat16):
        x, alpha = 5 + signal(1, 100_000, dtype=dtype), torch.full((100_000,), 1e-4, dtype=dtype)
        y = ema(x, alpha, initial_state=0.0)
        bounds.check_forward(
            y, x, alpha, initial_state=0.0, roundings=VARYING, label="varying long"
        )


@pytest.mark.parametrize("where", [0, 3, 100, 500, 899])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_samples_as_in_the_loop(value: float, where: int) -> None:
    """Catches what is not finite reaching back, another row, or turning from infinity to NaN."""
    for shape, dim in (((2, 900), 1), ((900, 20), 0)):
        x, alpha = signal(*shape), weights(*shape).clamp(0.01, 0.9)
        x.select(dim, where)[1] = value
        alpha.select(dim, min(where + 60, 899))[1] = 0.0  # 0 times infinity
        y = ema(x, alpha, dim=dim)
        bounds.check_forward(y, x, alpha, dim=dim, roundings=VARYING, label="varying")


def test_overflowing_products_of_weights() -> None:
    """Catches a product of coefficients that overflows where the recurrence does not: alpha = 1
    forgets, and the large weights beside it meet a y of 0."""
    x = torch.zeros(1, 600)
    x[0, 300:] = 1
    alpha = torch.full((600,), 1e30)
    alpha[250:] = 0.5
    # 1 - 2^-k, which float64 holds to more bits than float32 shows
    assert torch.equal(ema(x, alpha), ema_loop(x, alpha.double()).float())


@pytest.mark.parametrize("shape", [(2, 6), (6,), (1, 6)])
@pytest.mark.parametrize("reverse", [False, True])
def test_derivatives(reverse: bool, shape: tuple[int, ...]) -> None:
    """Catches a wrong first or second derivative, one input at a time."""
    x, alpha, s = signal(2, 6), torch.rand(shape).double() * 0.8 + 0.1, signal(2, seed=1)

    def with_state(x: Tensor, alpha: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return ema(x, alpha, initial_state=s, reverse=reverse, return_state=True)

    for free in range(3):
        inputs = [t.clone().requires_grad_(i == free) for i, t in enumerate((x, alpha, s))]
        assert gradcheck(with_state, inputs, check_forward_ad=True)
        assert gradgradcheck(with_state, inputs)
        if free < 2:
            assert gradgradcheck(lambda x, a: ema(x, a, reverse=reverse), inputs[:2])


def test_no_start_has_no_first_weight() -> None:
    """Catches a gradient to the first alpha, which the average without a state never uses."""
    x, alpha = signal(2, 5), torch.full((2, 5), 0.5, dtype=torch.float64, requires_grad=True)
    ema(x, alpha).sum().backward()
    assert alpha.grad is not None
    assert torch.equal(alpha.grad[:, 0], torch.zeros(2, dtype=torch.float64))


def test_transforms() -> None:
    """Catches a missing batching rule, or a forward mode that forgets an argument."""
    x, alpha, s = quarters(3, 5), quarters(5, seed=1), quarters(3, seed=2)

    def smooth(f: Any) -> Any:
        return lambda x, alpha, s: f(x, alpha, initial_state=s)

    def energy(f: Any) -> Any:
        return lambda *arguments: smooth(f)(*arguments).square().sum()

    assert_same(*(jvp(smooth(f), (x, alpha, s), (x, alpha, s)) for f in (ema, ema_loop)))
    assert_same(*(jacrev(smooth(f), (0, 1, 2))(x, alpha, s) for f in (ema, ema_loop)))
    assert_same(*(jacfwd(smooth(f), (0, 1, 2))(x, alpha, s) for f in (ema, ema_loop)))
    assert_same(*(hessian(energy(f), (0, 1, 2))(x, alpha, s) for f in (ema, ema_loop)))
    many, batch = quarters(4, 5, seed=3), quarters(4, 3, 5, seed=4)
    for batched, dims in (((x, many), (None, 0)), ((batch, alpha), (0, None)), ((batch, many), 0)):
        assert_same(*(vmap(lambda x, a, f=f: f(x, a), dims)(*batched) for f in (ema, ema_loop)))
    assert_same(*(vmap(jacrev(lambda a, f=f: f(x, a)))(many) for f in (ema, ema_loop)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled() -> None:
    """Catches a graph break, a wrong fake kernel, and a new graph for every length."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ema, fullgraph=True, dynamic=True, backend=graphs)
    for length in (7, 12, 30):
        inputs = [signal(3, length).requires_grad_(), weights(length).requires_grad_()]
        got, want = compiled(*inputs), ema(*inputs)
        assert torch.equal(got, want)
        pairs = zip(*(torch.autograd.grad(y.sum(), inputs) for y in (got, want)), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    assert graphs.frame_count == 1


@pytest.mark.parametrize(("shape", "dim"), [((40, 3000), 1), ((3, 3000, 40), 1), ((1, 800_000), 1)])
def test_the_same_bits_from_any_number_of_threads(shape: tuple[int, ...], dim: int) -> None:
    """Catches a result or a sum over rows whose order depends on the threads."""
    # for rows that are cut, in float64 and with a long memory: nothing is rounded or reset away
    dtype, scale = (torch.float64, 1e-4) if shape[0] == 1 else (torch.float32, 1.0)
    x = signal(*shape, dtype=dtype)
    per_step = scale * weights(*(n if d == dim else 1 for d, n in enumerate(shape)), dtype=dtype)
    for alpha in (per_step, scale * weights(*shape, dtype=dtype)):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            inputs = [x.clone().requires_grad_(), alpha.clone().requires_grad_()]
            y = ema(*inputs, dim=dim)
            found.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
        torch.set_num_threads(2)
        for others in found[1:]:
            assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize("scale", [1e-3, 1e-6])
def test_long_rows_are_cut(scale: float) -> None:
    """Catches a segment that starts from the wrong y, at either side of a cut, and a map of it that
    is wrong by a share of its ratio: only the smaller weights leave any of that."""
    length = 2 * 65536 + 300
    x = 5 + signal(length, dtype=torch.float32)
    alpha = weights(length, dtype=torch.float32) * scale
    check_gradients(x, alpha, initial_state=torch.tensor(2.0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_cut_rows_that_are_not_finite(value: float) -> None:
    """Catches a segment's product of coefficients that meets an infinity, or has become one."""
    length = 8 * 65536
    for where in (7, 65535, 65536, 100_000, length - 1):
        for weight in (1e-3, 3e30):  # the latter meets zeros only, and overflows with them
            x = signal(length, dtype=torch.float32) if weight < 1 else torch.zeros(length)
            alpha = torch.full((length,), weight)
            alpha[90_000:] = 1e-3
            x[where] = value
            found = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(ema(x, alpha))
            torch.set_num_threads(2)
            assert torch.equal(*(y.view(torch.int32) for y in found))
            assert bool(found[0][:where].isfinite().all())
            assert not bool(found[0][where:].isfinite().any())


@pytest.mark.skipif(
    backends.cuda_kernels, reason="a documented limit of the CUDA kernels: docs/cuda.md"
)
def test_a_y_that_overflowed_stays_infinite() -> None:
    """Catches a y that overflows within a stretch or a segment whose map is finite, and so is
    passed over by what comes after: on one thread, or only on several."""
    length = 8 * 65536
    for up, down in ((100, 120), (100, 2000), (65_530, 65_535), (65_530, 65_545), (7, 400_000)):
        a = torch.ones(length, dtype=torch.float64)
        a[up], a[down] = 1e10, 1e-10
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = linear_recurrence(a, torch.zeros_like(a), initial_state=1e300)
            assert bool((y[:up] == 1e300).all())
            assert bool(y[up:].isinf().all())
        torch.set_num_threads(2)


def test_nothing_broadcast_is_copied() -> None:
    """Catches alpha or x expanded in memory: an expanded x has strides of 0."""
    x = signal(1, 500).expand(64, 500)
    check_gradients(x, weights(500))
    assert torch.equal(ema(x, weights(500)), ema(x.contiguous(), weights(500)))


def test_the_operators_refuse_what_does_not_fit() -> None:
    """Catches a direct call that would read out of bounds."""
    op = torch.ops.ema_ext
    x, alpha = signal(2, 5), weights(5)
    with pytest.raises(RuntimeError, match="alpha has 4 samples in place of 5"):
        op.ema(x, weights(4), None, 1, False)
    with pytest.raises(RuntimeError, match="y must have x's shape"):
        op.ema_backward(x, None, x, alpha, x[:1], None, 1, False)
    with pytest.raises(RuntimeError, match="alpha must be constant in time"):
        op.ema_backward(x, None, x, alpha, None, 1, False)
    with pytest.raises(RuntimeError, match="alpha must vary in time"):
        op.ema_backward(x, None, x, weights(1), x, None, 1, False)
    with pytest.raises(RuntimeError, match="over terms of size"):
        op.sum_to(x, weights(3))
