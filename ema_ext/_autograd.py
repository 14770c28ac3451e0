"""The derivatives of ``ema`` and ``linear_recurrence``, to any order, by the native operators.

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
``dim`` is non-negative, but for a float alpha without states.

Forward mode uses that y is linear in x and initial_state: their tangents run through the same scan,
and that of alpha adds a linear_recurrence driven by tangent * (x[n] - y[n-1]).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._functorch import eager_transforms
from torch.autograd import Function, forward_ad
from torch.compiler import is_dynamo_compiling

from ema_ext import _ops

Context = Any  # torch's FunctionCtx; its attributes are made by those who set them


class Rule:
    """One differentiable function: how to compute it and what it needs for its derivatives."""

    compute: Callable[..., Any]
    remember: Callable[..., None]  # (ctx, arguments, output)
    backward: Callable[..., Any]  # (ctx, *gradients)
    jvp: Callable[..., Any]  # (ctx, *tangents)


#: Whether a torch.func transform is at work.
functorch_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def transforms_active() -> bool:
    """Whether a torch.func transform or forward mode is at work."""
    return functorch_active() or forward_ad._current_level >= 0


def traced() -> bool:
    """Whether forward mode or torch.compile wants the function rather than the bare operator.

    Raises RuntimeError where torch would give wrong derivatives without a word.
    """
    if is_dynamo_compiling():
        if functorch_active():
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
        return (plain.apply if is_dynamo_compiling() else quick)(*arguments)

    return apply


def save(ctx: Context, *tensors: Tensor | None) -> None:
    """Keep tensors for backward and jvp: torch's vmap takes both for the same."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


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
        adjoint = float_adjoint if is_grad_enabled() else _ops.ema_backward
        grad_x, grad_initial_state = adjoint(grad_y, grad_state, *ctx.problem)
        has_initial_state = ctx.problem[1]
        return grad_x, None, grad_initial_state if has_initial_state else None, None, None, None

    @staticmethod
    def jvp(ctx: Context, x: Tensor, _: None, initial_state: Tensor | None, *__: None) -> Any:
        alpha, _, dim, reverse = ctx.problem
        return float_ema(x, alpha, initial_state, dim, reverse, ctx.return_state)


class DirectEMA(Function):
    """float_ema without states, in as few microseconds as torch lets a Function take.

    Arguments: x, and (alpha, dim, reverse) as one, where every argument costs. Not for
    torch.compile, nor where transforms are active.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, problem: tuple[float, int, bool]) -> Tensor:
        ctx.problem = alpha, dim, reverse = problem
        # As ema_of_samples, whose frame would cost as much.
        if dim == -1 and not reverse:
            return _ops.ema_directly(x, alpha)
        return _ops.ema_directly(x, alpha, dim, reverse)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor) -> Any:
        alpha, dim, reverse = ctx.problem
        if is_grad_enabled():
            return float_adjoint(grad_y, None, alpha, False, dim, reverse)[0], None
        return _ops.ema_backward_samples(grad_y, alpha, dim, reverse), None

    @staticmethod
    def apply_node(ctx: Context, grad_y: Tensor) -> Any:
        """The same for the engine, not for compiled autograd."""
        if is_grad_enabled():
            return DirectEMA.backward(ctx, grad_y)
        alpha, dim, reverse = ctx.problem
        if dim == -1 and not reverse:
            return _ops.ema_backward_directly(grad_y, alpha), None
        return _ops.ema_backward_directly(grad_y, alpha, dim, reverse), None


# What the node's own apply looks at before `backward`, for 1 us a call, is a vjp that is not there.
node: Any = DirectEMA._backward_cls
node.apply = DirectEMA.apply_node
del node


def ema_of_samples(x: Tensor, alpha: float, dim: int, reverse: bool) -> Tensor:
    """The operator for plain tensors, outside of torch.compile.

    Its defaults take less time than arguments that are handed over.
    """
    if dim == -1 and not reverse:
        return _ops.ema_directly(x, alpha)
    return _ops.ema_directly(x, alpha, dim, reverse)


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
    """ema with a tensor as alpha.

    Keeps x, and y if alpha varies in time, only where alpha wants a derivative.
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
    def remember(ctx: Context, arguments: tuple[Any, ...], output: Any) -> None:
        x, alpha, initial_state, *ctx.problem = arguments
        dim, _, return_state = ctx.problem
        kept = x if ctx.needs_input_grad[1] or transforms_active() else None
        y = None
        if kept is not None and varies(alpha, x, dim):
            y = output[0] if return_state else output
        save(ctx, kept, alpha, initial_state, y)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor, grad_state: Tensor | None = None) -> Any:
        x, alpha, initial_state, y = ctx.saved_tensors
        dim, reverse, _ = ctx.problem
        if is_grad_enabled() and grad_y.shape[dim] > 0:
            gradients = composed_backward(grad_y, grad_state, x, alpha, initial_state, dim, reverse)
        else:
            gradients = fused_backward(grad_y, grad_state, x, y, alpha, initial_state, dim, reverse)
        grad_x, grad_alpha, grad_initial_state = gradients
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
        refuse_nested_forward("a tensor alpha")
        x, alpha, initial_state, _ = ctx.saved_tensors
        dim, reverse, return_state = ctx.problem
        result = tensor_ema(x_t, alpha, initial_state_t, *ctx.problem)
        if alpha_t is None or x.shape[dim] == 0:
            return result
        drive = (alpha_t * step(x, alpha, initial_state, dim, reverse)).to(accumulate_dtype(x))
        through_alpha = linear_recurrence(1 - alpha.double(), drive, None, dim, reverse, False)
        y_t, state_t = result if return_state else (result, None)
        y_t = y_t + through_alpha.to(x.dtype)
        if not return_state:
            return y_t
        return y_t, state_t + through_alpha.select(dim, ends(x.shape[dim], reverse)[1])


class LinearRecurrence(Rule):
    """y[n] = a[n] * y[n-1] + b[n] from initial_state or 0; b has the whole shape and y its dtype.

    Keeps y, which is there anyway, where a wants a derivative.
    Arguments: a, b, initial_state, dim, reverse, return_state.
    """

    @staticmethod
    def compute(
        a: Tensor,
        b: Tensor,
        initial_state: Tensor | None,
        dim: int,
        reverse: bool,
        return_state: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        op = _ops.linear_recurrence_with_state if return_state else _ops.linear_recurrence
        return op(a, b, initial_state, dim, reverse)

    @staticmethod
    def remember(ctx: Context, arguments: tuple[Any, ...], output: Any) -> None:
        a, _, initial_state, *ctx.problem = arguments
        kept = None
        if ctx.needs_input_grad[0] or transforms_active():
            kept = output[0] if ctx.problem[2] else output
        save(ctx, a, kept, initial_state)

    @staticmethod
    def backward(ctx: Context, grad_y: Tensor, grad_state: Tensor | None = None) -> Any:
        a, y, initial_state = ctx.saved_tensors
        dim, reverse, _ = ctx.problem
        if is_grad_enabled() and grad_y.shape[dim] > 0:
            gradients = composed_recurrence_backward(
                grad_y, grad_state, a, y, initial_state, dim, reverse
            )
        else:
            # y is read for a's gradient alone: where nobody wants that, any of its shape will do
            gradients = _ops.linear_recurrence_backward(
                grad_y, grad_state, a, grad_y if y is None else y, initial_state, dim, reverse
            )
        grad_a, grad_b, grad_initial_state = gradients
        return (
            None if y is None else grad_a,
            grad_b,
            None if initial_state is None else grad_initial_state,
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(
        ctx: Context,
        a_t: Tensor | None,
        b_t: Tensor | None,
        initial_state_t: Tensor | None,
        *_: None,
    ) -> Any:
        a, y, initial_state = ctx.saved_tensors
        dim, reverse, _ = ctx.problem
        drive = torch.zeros_like(y) if b_t is None else b_t
        if a_t is not None and y.shape[dim] > 0:
            refuse_nested_forward("a tensor a")
            through_a = a_t * previous(y, initial_state, dim, reverse)
            drive = drive + through_a.to(y.dtype)
        return linear_recurrence(a, drive, initial_state_t, *ctx.problem)


class Expand(Rule):
    """A tensor in another dtype, expanded to a shape; backward sums in a fixed order.

    Arguments: value, dtype, *shape.
    """

    @staticmethod
    def compute(value: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
        return value.to(dtype).expand(shape)

    @staticmethod
    def remember(ctx: Context, arguments: tuple[Any, ...], _: Any) -> None:
        value, *ctx.target = arguments
        save(ctx, value)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:
        (value,) = ctx.saved_tensors
        transposed = sum_to if is_grad_enabled() else _ops.sum_to
        return (transposed(grad, value.detach()), *(None for _ in ctx.target))

    @staticmethod
    def jvp(ctx: Context, value_t: Tensor, *_: None) -> Any:
        return expand(value_t, *ctx.target)


class SumTo(Rule):
    """Terms summed to the shape and dtype of another tensor: the transpose of Expand.

    Arguments: terms, like.
    """

    @staticmethod
    def compute(terms: Tensor, like: Tensor) -> Tensor:
        return _ops.sum_to(terms, like)

    @staticmethod
    def remember(ctx: Context, arguments: tuple[Any, ...], _: Any) -> None:
        terms, like = arguments
        ctx.target = terms.dtype, *terms.shape
        save(ctx, like)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Any:
        return expand(grad, *ctx.target), None

    @staticmethod
    def jvp(ctx: Context, terms_t: Tensor, _: Any) -> Any:
        (like,) = ctx.saved_tensors
        return sum_to(terms_t, like)


def fused_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    alpha: Tensor,
    initial_state: Tensor | None,
    dim: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients of TensorEMA in one pass; that of alpha means nothing where x is None."""
    # x and y are read for alpha's gradient alone: where nobody wants that, any tensor of their
    # shape will do
    x = grad_y if x is None else x
    if varies(alpha, grad_y, dim):
        y = grad_y if y is None else y
        return _ops.ema_backward_varying(
            grad_y, grad_state, x, alpha, y, initial_state, dim, reverse
        )
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
    first, _ = ends(grad_y.shape[dim], reverse)
    c = 1 - alpha.double()  # in half precision 1 - 0.001 would be 1
    adjoint = differentiable_adjoint(grad_y, grad_state, c, dim, reverse)

    grad_x = alpha.to(dtype) * adjoint
    grad_alpha = grad_initial_state = None
    if initial_state is None:
        grad_x = grad_x.select_scatter(adjoint.select(dim, first), dim, first)
    else:
        grad_initial_state = start_gradient(c.to(dtype), adjoint, dim, reverse)
    if x is not None:
        grad_alpha = sum_to(adjoint * step(x, alpha, initial_state, dim, reverse), alpha.detach())
    return grad_x.to(grad_y.dtype), grad_alpha, grad_initial_state


def composed_recurrence_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    a: Tensor,
    y: Tensor | None,
    initial_state: Tensor | None,
    dim: int,
    reverse: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The gradients of LinearRecurrence, likewise."""
    adjoint = differentiable_adjoint(grad_y, grad_state, a, dim, reverse)
    grad_a = grad_initial_state = None
    if initial_state is not None:
        grad_initial_state = start_gradient(a.to(adjoint.dtype), adjoint, dim, reverse)
    if y is not None:
        grad_a = sum_to(adjoint * previous(y, initial_state, dim, reverse), a.detach())
    return grad_a, adjoint.to(grad_y.dtype), grad_initial_state


def differentiable_adjoint(
    grad_y: Tensor, grad_state: Tensor | None, ratio: Tensor, dim: int, reverse: bool
) -> Tensor:
    """lambda[n] = g[n] + ratio[n+1] * lambda[n+1] in the accumulate dtype."""
    g = grad_y.to(accumulate_dtype(grad_y))
    if grad_state is not None:
        _, last = ends(g.shape[dim], reverse)
        g = g.select_scatter(g.select(dim, last) + grad_state, dim, last)
    if varies(ratio, g, dim):
        ratio = previous(ratio, None, dim - g.dim(), not reverse)
    adjoint: Tensor = linear_recurrence(ratio, g, None, dim, not reverse, False)
    return adjoint


def start_gradient(ratio: Tensor, adjoint: Tensor, dim: int, reverse: bool) -> Tensor:
    """ratio[0] * lambda[0]: the gradient to the initial state."""
    first, _ = ends(adjoint.shape[dim], reverse)
    if varies(ratio, adjoint, dim):
        ratio = ratio.narrow(dim - adjoint.dim(), first, 1)
    return (ratio * adjoint.narrow(dim, first, 1)).squeeze(dim)


def varies(coefficient: Tensor, x: Tensor, dim: int) -> bool:
    """Whether a coefficient that broadcasts to x has a time axis of its own."""
    axis = dim - x.dim()
    return coefficient.dim() >= -axis and coefficient.shape[axis] != 1


def refuse_nested_forward(what: str) -> None:
    """Raise where torch would drop the inner tangent's own tangent."""
    if eager_transforms.JVP_NESTING > 1:
        raise RuntimeError(
            f"ema_ext: forward mode over forward mode with {what} is not supported; "
            "use reverse mode for one of the two, for instance torch.func.hessian"
        )


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


#: Without what Function.apply looks at before this one, for 1 us a call.
direct_ema: Callable[..., Any] = super(Function, DirectEMA).apply
float_ema = function(FloatEMA)
float_adjoint = function(FloatAdjoint)
tensor_ema = function(TensorEMA)
linear_recurrence = function(LinearRecurrence)
expand = function(Expand)
sum_to = function(SumTo)
