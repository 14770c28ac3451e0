"""torch.func, forward mode and torch.compile: as the for-loop gives it, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bounds
import pytest
import torch
from cases import signal
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves

from ema_ext import ema, linear_recurrence
from ema_ext.reference import ema_loop

# torch's own, on the first use of forward mode
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)

Filter = Callable[..., Tensor]


def energy(f: Filter) -> Callable[..., Tensor]:
    """A scalar with second derivatives in every argument."""
    return lambda *arguments: f(*arguments).square().sum()


def smooth(f: Filter) -> Callable[..., Any]:
    """f with a tensor alpha and a state."""
    return lambda x, alpha, s: f(x, alpha, initial_state=s)


def fixed(f: Filter) -> Callable[..., Any]:
    """f with a float alpha, whatever alpha is given."""
    return lambda x, _, s: f(x, 0.3, initial_state=s)


ALL = (0, 1, 2)
TRANSFORMS: dict[str, Callable[[Filter], Callable[..., Any]]] = {
    "grad": lambda f: grad(energy(smooth(f)), ALL),
    "grad, float alpha": lambda f: grad(energy(fixed(f)), (0, 2)),
    "jvp": lambda f: lambda *args: jvp(smooth(f), args, args),
    "jvp, float alpha": lambda f: lambda *args: jvp(fixed(f), args, args),
    "jvp of x alone": lambda f: lambda x, a, s: jvp(lambda x: smooth(f)(x, a, s), (x,), (x,)),
    "jvp, no state": lambda f: lambda x, a, s: jvp(f, (x, a), (x, a)),  # noqa: ARG005
    "jvp, reverse": lambda f: (
        lambda *args: jvp(lambda x, a, s: f(x.flip(1), a, initial_state=s), args, args)
    ),
    "jacrev": lambda f: jacrev(smooth(f), ALL),
    "jacfwd": lambda f: jacfwd(smooth(f), ALL),
    "jacfwd, float alpha": lambda f: jacfwd(fixed(f), (0, 2)),
    "hessian": lambda f: hessian(energy(smooth(f)), ALL),
    "hessian, float alpha": lambda f: hessian(energy(fixed(f)), (0, 2)),
    "reverse over reverse": lambda f: jacrev(jacrev(energy(smooth(f)), ALL), ALL),
    "reverse over forward": lambda f: jacrev(jacfwd(energy(smooth(f)), ALL), ALL),
    "forward over forward, float alpha": lambda f: jacfwd(jacfwd(energy(fixed(f)), (0, 2)), (0, 2)),
    "vmap": lambda f: vmap(smooth(f), (0, None, 0)),
    "vmap over the last dim": lambda f: vmap(lambda x, a: f(x, a), (1, None), 1),
    "vmap of grad": lambda f: vmap(grad(energy(smooth(f)), ALL), (0, None, 0)),
}


def relative(got: Any, want: Any) -> float:
    """The largest difference as a share of the largest value."""
    pairs = list(zip(tree_leaves(got), tree_leaves(want), strict=True))
    scale = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / scale


@pytest.mark.parametrize("name", TRANSFORMS)
def test_as_the_loop(name: str) -> None:
    """Catches a rule that is missing, has a wrong sign, or forgets an argument."""
    x, alpha, s = signal(3, 5), torch.tensor(0.3).double(), signal(3, seed=1)
    arguments = (x, alpha) if name.startswith("vmap over") else (x, alpha, s)
    got = TRANSFORMS[name](ema)(*arguments)
    want = TRANSFORMS[name](ema_loop)(*arguments)
    # Each derivative is a sum of at most 15 outputs times 5 steps of at most LOOP's roundings.
    assert relative(got, want) <= 15 * 5 * 2 * bounds.LOOP.base * bounds.unit(torch.float64)


@pytest.mark.parametrize("batched", [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("shape", [(), (4, 1), (3, 1, 1)])
def test_vmap_over_either_argument(batched: Any, shape: tuple[int, ...]) -> None:
    """Catches an alpha aligned with vmap's dimension; its gradient has its own shape."""
    x = signal(*([2] if batched[0] == 0 else []), 3, 4, 9)
    alpha = signal(*([2] if batched[1] == 0 else []), *shape, seed=1).sigmoid()
    got = vmap(grad(energy(ema), (0, 1)), batched)(x, alpha)
    each = [
        grad(energy(ema), (0, 1))(
            x[i] if batched[0] == 0 else x, alpha[i] if batched[1] == 0 else alpha
        )
        for i in range(2)
    ]
    for values, singles in zip(got, zip(*each, strict=True), strict=True):
        assert torch.equal(values, torch.stack(singles))


@pytest.mark.parametrize("alpha", [0.3, torch.tensor(0.3).double()])
@pytest.mark.parametrize("reverse", [False, True])
def test_forward_and_batched_modes(reverse: bool, alpha: float | Tensor) -> None:
    """Catches a tangent of zeros, or one that disagrees with the gradient, of y or of the state."""
    inputs = [signal(2, 4).requires_grad_(), signal(2, seed=1).requires_grad_()]
    if isinstance(alpha, Tensor):
        inputs.append(alpha.clone().requires_grad_())

    def call(x: Tensor, s: Tensor, weight: Any = alpha) -> Any:
        return ema(x, weight, initial_state=s, reverse=reverse, return_state=True)

    assert gradcheck(
        call,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert gradgradcheck(call, inputs, check_fwd_over_rev=True, check_batched_grad=True)


def test_forward_over_forward_with_a_tensor_alpha_is_refused() -> None:
    """Catches what torch computes there: the inner tangent taken for a constant, silently."""
    x, alpha = signal(3, 5), torch.tensor(0.3).double()
    with pytest.raises(RuntimeError, match="forward mode over forward mode"):
        jacfwd(jacfwd(lambda alpha: ema(x, alpha)))(alpha)


@pytest.fixture
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("learned", [False, True])
def test_compiled(learned: bool) -> None:
    """Catches a graph break, a fake kernel of another shape, a backward that cannot be traced."""
    inputs = [signal(3, 5).requires_grad_(), signal(3, seed=1).requires_grad_()]
    if learned:
        inputs.append(torch.tensor(0.3).double().requires_grad_())

    def call(x: Tensor, s: Tensor, alpha: float | Tensor = 0.3) -> tuple[Tensor, Tensor]:
        return ema(x, alpha, dim=0, initial_state=s[:2].sum(), return_state=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = compiled(*inputs), call(*inputs)
    assert all(map(torch.equal, got, want))
    gradients = [
        torch.autograd.grad(y.square().sum() + state.sum(), inputs) for y, state in (got, want)
    ]
    assert all(map(torch.equal, *gradients))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "f",
    [
        lambda x: ema(x, 0.3),
        lambda x: ema(x, torch.tensor(0.3)),
        lambda x: ema(x, x.sigmoid()),
        lambda x: linear_recurrence(0.3, x),
        lambda x: linear_recurrence(x, x),
    ],
    ids=["float", "tensor", "per step", "recurrence", "recurrence per step"],
)
@pytest.mark.parametrize(
    "transform",
    [lambda f: lambda x: jvp(f, (x,), (x,)), lambda f: grad(energy(f)), vmap, jacfwd, jacrev],
    ids=["jvp", "grad", "vmap", "jacfwd", "jacrev"],
)
def test_transforms_inside_compile_are_refused(transform: Callable[..., Any], f: Any) -> None:
    """Catches the zeros that a compiled transform of a custom function gives, without a word."""
    compiled = torch.compile(transform(f), fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"transforms inside torch\.compile"):
        compiled(signal(3, 5))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("alpha", [0.3, torch.tensor(0.3).double()])
def test_transforms_of_compiled_functions_are_the_plain_ones(alpha: float | Tensor) -> None:
    """Catches a transform that sees a graph traced without it: a compiled function inside it."""

    def plain(x: Tensor) -> Tensor:
        return ema(x, alpha)

    compiled, x = torch.compile(plain, backend="aot_eager"), signal(3, 5)
    for transform in (
        lambda f: grad(energy(f)), vmap, jacfwd, jacrev, lambda f: lambda x: jvp(f, (x,), (x,))[1]
    ):  # fmt: skip
        assert torch.equal(transform(compiled)(x), transform(plain)(x))


@pytest.mark.parametrize("shape", [(), (3, 1), (5,), (3, 5)])
@pytest.mark.parametrize("over", [0, 1, 2])
def test_vmap_over_one_argument(over: int, shape: tuple[int, ...]) -> None:
    """Catches an argument that is batched only where another one is."""
    values = [signal(3, 5), signal(*shape, seed=1).sigmoid(), signal(3, seed=2)]
    many = signal(4, *values[over].shape, seed=3)
    values[over] = many.sigmoid() if over == 1 else many
    dims = tuple(0 if i == over else None for i in range(3))
    for f in (smooth(ema), smooth(lambda x, a, **s: linear_recurrence(a, x, **s))):
        got = vmap(f, dims)(*values)
        each = [f(*(v[k] if i == over else v for i, v in enumerate(values))) for k in range(4)]
        assert torch.equal(got, torch.stack(each))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_vmap_counts_the_dimensions_that_it_leaves(requires_grad: bool) -> None:
    """Catches a dim, the default one too, that comes to stand for vmap's own dimension."""
    x = signal(4, 5).requires_grad_(requires_grad)
    with pytest.raises(IndexError, match="dim"):
        torch.vmap(lambda row: ema(row, 0.5, dim=-2))(x)
    with pytest.raises(ValueError, match="x"):
        torch.vmap(lambda number: ema(number, 0.5))(x[0])
    with pytest.raises(RuntimeError, match="dim"):
        torch.vmap(lambda row: torch.ops.ema_ext.ema(row, 0.5, None, -2, False))(x)
    with pytest.raises(RuntimeError, match="dim"):
        torch.vmap(lambda row: torch.ops.ema_ext.ema(row, 0.5, -2))(x)
