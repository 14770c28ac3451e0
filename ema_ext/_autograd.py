"""The derivatives of ``ema``, to any order, all of them scans by the native operators.

With c = 1 - alpha and the adjoint state lambda, which runs against the scan,

    lambda[n] = g[n] + c * lambda[n+1],                     g the gradient of y,

the gradients are (Blelloch 1990 gives the scan; the adjoint is the transposed recurrence)

    grad_x[n]          = alpha * lambda[n]
    grad_initial_state = c * lambda[0]
    grad_alpha         = sum over n of lambda[n] * (x[n] - y[n-1]),    y[-1] = initial_state.

Without an initial state the average starts at x[0]: y[-1] = x[0], and grad_initial_state falls to
x[0], which makes grad_x[0] = lambda[0]. A gradient of the last state is added to g of the last
sample. In reverse, "first" and "last" change places.

``initial_state`` comes here in the accumulate dtype and the shape of x without ``dim``;
``dim`` is non-negative.

Forward mode uses that y is linear in x and initial_state: their tangents run through the same scan,
and that of alpha adds a linear_recurrence driven by tangent * (x[n] - y[n-1]).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import Function, forward_ad

from ema_ext import _ops

Context = Any  # torch's FunctionCtx; its attributes are made by those who set them


class Rule:
    """One differentiable function: how to compute it and what it needs for its derivatives."""

    compute: Callable[..., Any]
    remember: Callable[..., None]  # (ctx, arguments, output)
    backward: Callable[..., Any]  # (ctx, *gradients)
    jvp: Callable[..., Any]  # (ctx, *tangents)


def transforms_active() -> bool:
    """Whether a torch.func transform or forward mode is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def traced() -> bool:
    """Whether forward mode or torch.compile wants the function rather than the bare operator.

    Raises RuntimeError where torch would give wrong derivatives without a word.
    """
    if torch.compiler.is_dynamo_compiling():
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "ema_ext: torch.func transforms inside torch.compile are not supported; "
                "apply the transform outside of it, or do not compile this part"
            )
        return True
    return forward_ad._current_level >= 0


def function(rule: type[Rule]) -> Callable[..., Any]:
    """The function that ``rule`` describes.

    It is two autograd Functions: a plain one, which costs a third and is what torch.compile takes,
    and one with setup_context, jvp and vmap for torch.func and forward mode.
    """

    def forward(ctx: Context, *arguments: Any) -> Any:
        output = rule.compute(*arguments)
        rule.remember(ctx, arguments, output)
        return output

    plain: Any = type(
        rule.__name__,
        (Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(rule.backward)},
    )
    transformed: Any = type(
        rule.__name__,
        (Function,),
        {
            "forward": staticmethod(rule.compute),
            "setup_context": staticmethod(rule.remember),
            "backward": staticmethod(rule.backward),
            "jvp": staticmethod(rule.jvp),
            "generate_vmap_rule": True,
        },
    )

    # What Function.apply looks at before this one, for 1 us a call, is looked at below.
    quick = super(Function, plain).apply

    def apply(*arguments: Any) -> Any:
        if transforms_active():
            return transformed.apply(*arguments)
        return (plain.apply if torch.compiler.is_dynamo_compiling() else quick)(*arguments)

    return apply


class FloatEMA(Rule):
    """ema with a Python float as alpha: linear in x and initial_state, hence nothing is saved.

    Arguments: x, alpha, initial_state, dim, reverse, return_state.
    """

    @staticmethod
    def compute(
        x: Tensor,
        alpha: float,
        initial_state: Tensor | None,
        dim: int,
        reverse: bool,
        return_state: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        op = _ops.ema_with_state if return_state else _ops.ema
        return op(x, alpha, initial_state, dim, reverse)

    @staticmethod
    def remember(ctx: Context, arguments: tuple[Any, ...], _: Any) -> None:
        _, alpha, initial_state, dim, reverse, ctx.return_state = arguments
        ctx.problem = alpha, initial_state is not None, dim, reverse

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor, grad_state: Tensor | None = None) -> Any:
        adjoint = float_adjoint if torch.is_grad_enabled() else _ops.ema_backward
        grad_x, grad_initial_state = adjoint(grad_y, grad_state, *ctx.problem)
        has_initial_state = ctx.problem[1]
        return grad_x, None, grad_initial_state if has_initial_state else None, None, None, None

    @staticmethod
    def jvp(ctx: Context, x: Tensor, _: None, initial_state: Tensor | None, *__: None) -> Any:
        alpha, _, dim, reverse = ctx.problem
        return float_ema(x, alpha, initial_state, dim, reverse, ctx.return_state)


class FloatAdjoint(Rule):
    """The transposed linear map of float_ema; its own transpose is float_ema again.

    Arguments: grad_y, grad_state, alpha, has_initial_state, dim, reverse.
    """

    @staticmethod
    def compute(grad_y: Tensor, grad_state: Tensor | None, *problem: Any) -> tuple[Tensor, Tensor]:
        return _ops.ema_backward(grad_y, grad_state, *problem)

    @staticmethod
    def remember(ctx: Context, arguments: tuple[Any, ...], _: Any) -> None:
        _, grad_state, *ctx.problem = arguments
        ctx.has_grad_state = grad_state is not None

    @staticmethod
    def backward(ctx: Context, u: Tensor, w: Tensor) -> Any:
        alpha, has_initial_state, dim, reverse = ctx.problem
        start = w if has_initial_state else None
        result = float_ema(u, alpha, start, dim, reverse, ctx.has_grad_state)
        y, state = result if ctx.has_grad_state else (result, None)
        return y, state, None, None, None, None

    @staticmethod
    def jvp(ctx: Context, grad_y: Tensor, grad_state: Tensor | None, *_: None) -> Any:
        return float_adjoint(grad_y, grad_state, *ctx.problem)


class TensorEMA(Rule):
    """ema with a tensor as alpha; keeps x only where alpha wants a derivative.

    Arguments: x, alpha, initial_state, dim, reverse, return_state.
    """

    @staticmethod
    def compute(
        x: Tensor,
        alpha: Tensor,
        initial_state: Tensor | None,
        dim: int,
        reverse: bool,
        return_state: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        op = _ops.ema_with_state_tensor if return_state else _ops.ema_tensor
        return op(x, alpha, initial_state, dim, reverse)

    @staticmethod
    def remember(ctx: Context, arguments: tuple[Any, ...], _: Any) -> None:
        x, alpha, initial_state, *ctx.problem = arguments
        kept = x if ctx.needs_input_grad[1] or transforms_active() else None
        ctx.save_for_backward(kept, alpha, initial_state)
        ctx.save_for_forward(kept, alpha, initial_state)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor, grad_state: Tensor | None = None) -> Any:
        x, alpha, initial_state = ctx.saved_tensors
        dim, reverse, _ = ctx.problem
        differentiable = torch.is_grad_enabled() and grad_y.shape[dim] > 0
        gradients = composed_backward if differentiable else fused_backward
        grad_x, grad_alpha, grad_initial_state = gradients(
            grad_y, grad_state, x, alpha, initial_state, dim, reverse
        )
        return (
            grad_x,
            None if x is None else grad_alpha,
            None if initial_state is None else grad_initial_state,
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(
        ctx: Context, x_t: Tensor, alpha_t: Tensor | None, initial_state_t: Tensor | None, *_: None
    ) -> Any:
        if eager_transforms.JVP_NESTING > 1:  # torch would drop the inner tangent's own tangent
            raise RuntimeError(
                "ema_ext: forward mode over forward mode with a tensor alpha is not supported; "
                "use reverse mode for one of the two, for instance torch.func.hessian"
            )
        x, alpha, initial_state = ctx.saved_tensors
        dim, reverse, return_state = ctx.problem
        result = tensor_ema(x_t, alpha, initial_state_t, *ctx.problem)
        if alpha_t is None or x.shape[dim] == 0:
            return result
        drive = (alpha_t * step(x, alpha, initial_state, dim, reverse)).to(accumulate_dtype(x))
        through_alpha = linear_recurrence(1 - alpha.double(), drive, dim, reverse)
        y_t, state_t = result if return_state else (result, None)
        y_t = y_t + through_alpha.to(x.dtype)
        if not return_state:
            return y_t
        return y_t, state_t + through_alpha.select(dim, ends(x.shape[dim], reverse)[1])


class LinearRecurrence(Rule):
    """y[n] = a * y[n-1] + b[n] from y[-1] = 0, a constant in time; y has the dtype of b.

    Its derivatives are made of itself and of elementwise products, hence there are all orders.
    Arguments: a, b, dim, reverse.
    """

    @staticmethod
    def compute(a: Tensor, b: Tensor, dim: int, reverse: bool) -> Tensor:
        return _ops.linear_recurrence(a, b, None, dim, reverse)

    @staticmethod
    def remember(ctx: Context, arguments: tuple[Any, ...], output: Any) -> None:
        a, _, *ctx.direction = arguments
        ctx.save_for_backward(a, output)
        ctx.save_for_forward(a, output)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> Any:
        a, y = ctx.saved_tensors
        dim, reverse = ctx.direction
        grad_b = linear_recurrence(a, grad_y, dim, not reverse)
        grad_a = None
        if ctx.needs_input_grad[0]:
            products = grad_b * previous(y, None, dim, reverse)
            grad_a = products.sum_to_size(a.shape).to(a.dtype)
        return grad_a, grad_b, None, None

    @staticmethod
    def jvp(ctx: Context, a_t: Tensor, b_t: Tensor, *_: None) -> Any:
        a, y = ctx.saved_tensors
        drive = b_t + (a_t * previous(y, None, *ctx.direction)).to(b_t.dtype)
        return linear_recurrence(a, drive, *ctx.direction)


def fused_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor | None,
    alpha: Tensor,
    initial_state: Tensor | None,
    dim: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients of TensorEMA in one pass; that of alpha means nothing where x is None."""
    # x is read for alpha's gradient alone: where nobody wants that, any tensor of its shape will do
    x = grad_y if x is None else x
    return _ops.ema_backward_tensor(grad_y, grad_state, x, alpha, initial_state, dim, reverse)


def composed_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor | None,
    alpha: Tensor,
    initial_state: Tensor | None,
    dim: int,
    reverse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of TensorEMA out of differentiable parts; the length is at least 1."""
    dtype = accumulate_dtype(grad_y)
    first, last = ends(grad_y.shape[dim], reverse)
    g = grad_y.to(dtype)
    if grad_state is not None:
        g = g.select_scatter(g.select(dim, last) + grad_state, dim, last)
    c = 1 - alpha.double()  # in half precision 1 - 0.001 would be 1
    adjoint = linear_recurrence(c, g, dim, not reverse)

    grad_x = alpha.to(dtype) * adjoint
    grad_alpha = grad_initial_state = None
    if initial_state is None:
        grad_x = grad_x.select_scatter(adjoint.select(dim, first), dim, first)
    else:
        grad_initial_state = (c.to(dtype) * adjoint.narrow(dim, first, 1)).squeeze(dim)
    if x is not None:
        products = adjoint * step(x, alpha, initial_state, dim, reverse)
        grad_alpha = products.sum_to_size(alpha.shape).to(alpha.dtype)
    return grad_x.to(grad_y.dtype), grad_alpha, grad_initial_state


def step(x: Tensor, alpha: Tensor, initial_state: Tensor | None, dim: int, reverse: bool) -> Tensor:
    """x[n] - y[n-1], the derivative of y[n] by alpha at that step, in the accumulate dtype."""
    x = x.to(accumulate_dtype(x))
    y = tensor_ema(x, alpha, initial_state, dim, reverse, False)
    first, _ = ends(x.shape[dim], reverse)
    start = x.select(dim, first) if initial_state is None else initial_state
    return x - previous(y, start, dim, reverse)


def ends(length: int, reverse: bool) -> tuple[int, int]:
    """The indices of the first and of the last sample that the scan meets."""
    return (length - 1, 0) if reverse else (0, length - 1)


def previous(y: Tensor, start: Tensor | None, dim: int, reverse: bool) -> Tensor:
    """y[n-1] for every n in the order of the scan; ``start``, or 0, before the first."""
    first = torch.zeros_like(y.narrow(dim, 0, 1)) if start is None else start.unsqueeze(dim)
    kept = y.shape[dim] - 1
    if reverse:
        return torch.cat([y.narrow(dim, 1, kept), first], dim)
    return torch.cat([first, y.narrow(dim, 0, kept)], dim)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x's state."""
    return _ops.ACCUMULATE_DTYPE[x.dtype]


float_ema = function(FloatEMA)
float_adjoint = function(FloatAdjoint)
tensor_ema = function(TensorEMA)
linear_recurrence = function(LinearRecurrence)
