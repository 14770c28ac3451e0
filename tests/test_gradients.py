"""Gradients to x, alpha and initial_state: their values, and derivatives of any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bounds
import pytest
import torch
from cases import DTYPES, LENGTHS, signal
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from ema_ext import ema


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length(length: int, reverse: bool, dtype: torch.dtype) -> None:
    """Catches a carry lost between tiles of the reverse scan or of the sum over time."""
    x = (1 + signal(3, length, dtype=dtype)).requires_grad_()
    grad_y = signal(3, length, dtype=dtype, seed=1)
    s = signal(3, seed=2).requires_grad_()
    for value in (1e-3, 0.3):
        alpha = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        y = ema(x, alpha, initial_state=s, reverse=reverse)
        bounds.check_backward(
            grad(y, (x, alpha, s), grad_y),
            *(grad_y, x, alpha),
            initial_state=s,
            reverse=reverse,
        )
        y = ema(x, value, initial_state=s, reverse=reverse)
        grad_x, grad_s = grad(y, (x, s), grad_y)
        bounds.check_backward(
            (grad_x, None, grad_s),
            *(grad_y, x, value),
            initial_state=s,
            reverse=reverse,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_every_dim_without_a_state(dim: int, dtype: torch.dtype) -> None:
    """Catches a first sample that gets alpha of its gradient: as the start it gets all."""
    x = signal(4, 5, 6, dtype=dtype).requires_grad_()
    grad_y = signal(4, 5, 6, dtype=dtype, seed=1)
    alpha = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    for reverse in (False, True):
        grads = grad(ema(x, alpha, dim=dim, reverse=reverse), (x, alpha), grad_y)
        bounds.check_backward((*grads, None), grad_y, x, alpha, dim=dim, reverse=reverse)


ALPHA_SHAPES = [(), (1,), (4, 1), (3, 1, 1), (3, 4, 1), (1, 1, 1)]
STATE_SHAPES = [(), (4,), (3, 4), (3, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_shape", STATE_SHAPES)
@pytest.mark.parametrize("alpha_shape", ALPHA_SHAPES)
def test_gradients_in_the_argument_own_shape(
    alpha_shape: tuple[int, ...], state_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Catches a broadcast argument whose gradient is not summed, or comes in x's dtype."""
    x = signal(3, 4, 20, dtype=torch.float32).requires_grad_()
    grad_y = signal(3, 4, 20, dtype=torch.float32, seed=1)
    alpha = signal(*alpha_shape, seed=2).sigmoid().to(dtype).requires_grad_()
    s = signal(*state_shape, dtype=dtype, seed=3).requires_grad_()
    grads = grad(ema(x, alpha, initial_state=s), (x, alpha, s), grad_y)
    for argument, gradient in zip((x, alpha, s), grads, strict=True):
        assert gradient.shape == argument.shape
        assert gradient.dtype == argument.dtype
    bounds.check_backward(grads, grad_y, x, alpha, initial_state=s)


@pytest.mark.parametrize("used", ["y", "state", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_through_the_returned_state(dtype: torch.dtype, used: str) -> None:
    """Catches an undefined gradient of the output that nobody used, and one that is dropped."""
    x = signal(3, 20, dtype=dtype).requires_grad_()
    s = signal(3, seed=1).requires_grad_()
    grad_y = signal(3, 20, dtype=dtype, seed=2) if used != "state" else torch.zeros_like(x)
    grad_state = signal(3, seed=3).to(bounds.accumulate_dtype(dtype))
    for alpha in (0.3, torch.tensor(0.3, dtype=torch.float64, requires_grad=True)):
        y, state = ema(x, alpha, initial_state=s, return_state=True)
        outputs = {"y": [(y, grad_y)], "state": [(state, grad_state)]}
        outputs["both"] = outputs["y"] + outputs["state"]
        wanted = [x, s] if isinstance(alpha, float) else [x, s, alpha]
        grads = grad([o for o, _ in outputs[used]], wanted, [g for _, g in outputs[used]])
        bounds.check_backward(
            (grads[0], None if isinstance(alpha, float) else grads[2], grads[1]),
            *(grad_y, x, alpha),
            initial_state=s,
            grad_state=None if used == "y" else grad_state,
        )


def test_fixed_tensor_alpha() -> None:
    """Catches a gradient of x that depends on whether alpha wants one too."""
    x, grad_y = signal(3, 50).requires_grad_(), signal(3, 50, seed=1)
    alpha = signal(3, 1, seed=2).sigmoid()
    bounds.check_backward(
        (*grad(ema(x, alpha), x, grad_y), None, None), grad_y, x, alpha, label="fixed alpha"
    )
    (first,) = grad(ema(x, alpha), x, grad_y, create_graph=True)
    bounds.check_backward((first, None, None), grad_y, x, alpha, label="fixed alpha composed")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_create_graph_changes_no_gradient(
    with_state: bool, reverse: bool, dtype: torch.dtype
) -> None:
    """Catches a mistake of the composed backward in the first order, where the fused one is right.

    It rounds as a loop may: products in the accumulate dtype after the scan, sums over time in it.
    """
    x = signal(3, 4, 70, dtype=dtype).requires_grad_()
    # so small that 1 - alpha, formed in a half type, would be 1
    alpha = (signal(4, 1, seed=1).sigmoid() / 500).to(dtype).requires_grad_()
    s = signal(3, 4, seed=2).requires_grad_() if with_state else None
    grad_y = signal(3, 4, 70, dtype=dtype, seed=3)
    inputs = [x, alpha] if s is None else [x, alpha, s]
    y, state = ema(x, alpha, initial_state=s, reverse=reverse, return_state=True)
    grad_state = torch.ones_like(state)
    grads = grad((y, state), inputs, (grad_y, grad_state), create_graph=True)
    assert all(gradient.requires_grad for gradient in grads)
    bounds.check_backward(
        (grads[0], grads[1], None if s is None else grads[2]),
        *(grad_y, x, alpha),
        initial_state=s,
        reverse=reverse,
        grad_state=grad_state,
        roundings=bounds.LOOP,
        label="composed",
    )


Call = Callable[[Tensor, Any, Any], Any]


def check_derivatives(call: Call, x: Tensor, alpha: Any, s: Any) -> None:
    """gradcheck and gradgradcheck, one input at a time."""
    arguments = (x, alpha, s)
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor):

            def alone(value: Tensor, i: int = i) -> Any:
                return call(*(value if i == j else other for j, other in enumerate(arguments)))

            wanted = argument.clone().requires_grad_()
            assert gradcheck(alone, (wanted,), check_undefined_grad=True)
            assert gradgradcheck(alone, (wanted,))


@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("shape", "dim"), [((5,), 0), ((1,), 0), ((2, 3, 4), 1), ((3, 1, 2), 1), ((2, 2, 4), -1)]
)
def test_first_and_second_order(
    shape: tuple[int, ...], dim: int, reverse: bool, return_state: bool
) -> None:
    """Catches a second derivative that is zero, or forgets how alpha and x enter the first."""
    x = signal(*shape)
    without_time = list(shape)
    del without_time[dim]
    constant = [1 if i == dim % len(shape) else size for i, size in enumerate(shape)]

    def call(x: Tensor, alpha: Any, s: Any) -> Any:
        return ema(x, alpha, dim=dim, initial_state=s, reverse=reverse, return_state=return_state)

    for alpha in (0.3, torch.tensor(0.3).double(), signal(*constant, seed=1).sigmoid()):
        for s in (None, signal(seed=2), signal(*without_time, seed=3)):
            check_derivatives(call, x, alpha, s)


def test_second_order_through_views() -> None:
    """Catches strides mixed up in the double backward; an expanded x sums its gradient."""

    def call(x: Tensor, alpha: Any, s: Any) -> Any:
        return ema(x.mT[:, ::2].expand(2, 3, 4), alpha, dim=1, initial_state=s)

    check_derivatives(call, signal(8, 3), torch.tensor(0.3).double(), signal(2, 4))
    check_derivatives(call, signal(8, 3), 0.3, None)


@pytest.mark.parametrize("alpha", [0.3, torch.tensor(0.3).double()])
def test_mixed_second_order(alpha: float | Tensor) -> None:
    """Catches the cross terms between x, alpha and initial_state, which one input alone lacks."""
    x, s = signal(2, 4).requires_grad_(), signal(2, seed=1).requires_grad_()
    if isinstance(alpha, float):
        assert gradgradcheck(lambda x, s: ema(x, alpha, initial_state=s), (x, s))
    else:
        weight = alpha.clone().requires_grad_()
        assert gradgradcheck(lambda x, a, s: ema(x, a, initial_state=s), (x, weight, s))


def test_third_order() -> None:
    """Catches a double backward that is itself a dead end."""
    x, alpha = signal(2, 4).requires_grad_(), torch.tensor(0.3).double().requires_grad_()

    def second(x: Tensor, alpha: Tensor) -> Tensor:
        (first,) = grad(ema(x, alpha).square().sum(), alpha, create_graph=True)
        return first

    assert gradgradcheck(second, (x, alpha))


def test_published_derivatives() -> None:
    """Catches a derivative of the other convention."""
    x = torch.tensor([1, 2, 4, 8], dtype=torch.float64)
    alpha = torch.tensor(1 / 3, dtype=torch.float64, requires_grad=True)
    (plain,) = grad(ema(x, alpha).sum(), alpha)
    (square,) = grad(ema(x, alpha).square().sum(), alpha, create_graph=True)
    (second,) = grad(square, alpha)
    for value, expected in (
        (plain, 12.333333333333334),
        (square, 83.85185185185185),
        (second, 76.96296296296296),
    ):
        # four samples with terms of one sign: a few roundings of the result, and its last digit
        bound = 16 * torch.finfo(torch.float64).eps * expected
        bounds.assert_within(value, expected, bound, "published derivative")


@pytest.mark.parametrize("length", [0, 1])
def test_short_series(length: int) -> None:
    """Catches an index at the end of nothing; alpha's gradient is then zero, not missing."""
    x = signal(2, length).requires_grad_()
    alpha = torch.tensor(0.3).double().requires_grad_()
    for create_graph in (False, True):
        grad_x, grad_alpha = grad(ema(x, alpha).sum(), (x, alpha), create_graph=create_graph)
        assert torch.equal(grad_x, torch.ones_like(x))
        assert grad_alpha == 0


@pytest.mark.parametrize("alpha", [0.3, torch.tensor(0.3)])
def test_state_passes_through_an_empty_series(alpha: float | Tensor) -> None:
    """Catches the gradient of a state that no sample moved."""
    s = signal(seed=1).requires_grad_()
    _, state = ema(torch.zeros(2, 0), alpha, initial_state=s, return_state=True)
    (grad_s,) = grad(state.sum(), s)
    assert grad_s == 2


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("alpha", [0.3, torch.tensor(0.3, requires_grad=True)])
def test_double_backward_runs_the_kernels(alpha: float | Tensor) -> None:
    """Catches a second order that falls back to a loop: its operators would grow with length."""

    def operators(length: int) -> list[str]:
        x = signal(2, length, dtype=torch.float32).requires_grad_()
        with Operators() as run:
            (first,) = grad(ema(x, alpha).square().sum(), x, create_graph=True)
            grad(first.square().sum(), x)
        return run.names

    short, long = operators(10), operators(100)
    assert short == long
    assert sum(name.startswith("ema_ext.") for name in short) >= 3


def test_inputs_changed_in_place() -> None:
    """Catches a backward that silently reads the changed x: torch's own error is due."""
    x, alpha = signal(2, 9), torch.tensor(0.3, requires_grad=True)
    y = ema(x, alpha)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
