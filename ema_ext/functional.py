"""The public functions: fast paths here, errors in _checks, derivatives in _autograd."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from ema_ext import _autograd, _checks, _ops, _sharding
from ema_ext._autograd import (
    direct_ema,
    ema_of_samples,
    float_ema,
    functorch_active,
    tensor_ema,
    traced,
)


@overload
def ema(
    x: Tensor,
    alpha: float | Tensor,
    *,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: Literal[False] = False,
) -> Tensor: ...


@overload
def ema(
    x: Tensor,
    alpha: float | Tensor,
    *,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def ema(
    x: Tensor,
    alpha: float | Tensor,
    *,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def ema(
    x: Tensor,
    alpha: float | Tensor,
    *,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Exponential moving average of a signal along one dimension.

    .. math:: y_n = (1 - \alpha)\, y_{n-1} + \alpha\, x_n, \qquad y_0 = x_0

    ``alpha`` is the weight of the new sample, as in ``pandas.Series.ewm(alpha=alpha,
    adjust=False).mean()``. This is neither the average of model weights
    (``torch.optim.swa_utils``) nor the bias-corrected average (pandas' ``adjust=True``), and
    ``alpha`` is not the weight of the past.

    Args:
        x: float16, bfloat16, float32 or float64 tensor of any shape with at least 1 dimension and
            of any strides; no copy of it is made.
        alpha: the weight of the new sample. A number in [0, 1]; or a floating-point tensor that
            expands to x's shape: ``()`` for one weight, ``alpha[:, None]`` for one per channel of a
            ``(batch, channel, time)`` x, ``(time,)`` for one per step, or x's own shape. One of
            size 1 (or nothing) along ``dim`` takes the faster path. Values of a tensor are not
            checked, and outside [0, 1] follow the recurrence. It may have another dtype than x,
            enters unrounded, and never changes the dtype of the result.
        dim: the dimension of time.
        initial_state: the average before the first sample: with it,
            :math:`y_0 = (1 - \alpha) s + \alpha x_0`. A number, or a floating-point tensor that
            expands to x's shape without ``dim``. None starts at the first sample itself.
        reverse: run from the last sample to the first: flip, ema, flip.
        return_state: return ``(y, state)``. ``state`` is the average after the last sample (the
            first one in reverse), of x's shape without ``dim``, in float32 for half types and
            otherwise in x's dtype. Passed on as ``initial_state``, it continues the average.

    Returns:
        ``y``, of x's shape and dtype and with the strides of ``torch.empty_like(x)``, or
        ``(y, state)``. For half types it is computed in float32 or wider, and rounded to the half
        type at the store alone. A NaN
        or an infinity reaches the later samples of its own row and no others. On one machine the
        result is bitwise the same from run to run and for any number of threads. Without samples
        ``y`` is empty, and ``state`` is ``initial_state``.

    Gradients of any order reach x, alpha and initial_state, each in its own shape and dtype, in
    reverse and in forward mode, under ``torch.func`` and ``torch.compile``. With a float alpha
    nothing of x's size is kept for the backward pass; one that varies along ``dim`` keeps x and y.

    Raises:
        TypeError: x is no dense tensor of the dtypes above; alpha or initial_state is neither
            a real number nor such a tensor; dim is no int.
        ValueError: a float alpha lies outside [0, 1]; alpha or initial_state does not expand;
            x has no dimension, or is a DTensor sharded along ``dim``; the state of an empty
            average without initial_state is asked for.
        IndexError: dim is out of range.
        RuntimeError: this build has no kernels for x's device; alpha or initial_state is on
            another device than x (a 0-dim tensor on the cpu may be); a ``torch.func`` transform
            is compiled; forward mode runs over forward mode with a tensor alpha.

    Example:
        >>> ema(torch.tensor([1.0, 2.0, 4.0, 8.0]), 0.5)
        tensor([1.0000, 1.5000, 2.7500, 5.3750])
    """
    # A call costs microseconds: the usual one passes these few looks and goes straight on; for
    # every other one, wrong ones included, _general takes its time.
    if (
        type(x) is Tensor
        and type(alpha) is float
        and 0.0 <= alpha <= 1.0
        and initial_state is None
        and not return_state
        and type(dim) is int
        and type(reverse) is bool
        and not is_dynamo_compiling()
        and forward_ad._current_level < 0
    ):
        try:
            if not (x.requires_grad and is_grad_enabled()):
                return ema_of_samples(x, alpha, dim, reverse)
            if not functorch_active():
                y: Tensor = direct_ema(x, (alpha, dim, reverse))
                return y
        except RuntimeError:
            pass  # about a dtype, dim, device or layout: _general names it, and meets others again
    return _general(x, alpha, dim, initial_state, reverse, return_state)


def _general(
    x: Any, alpha: Any, dim: Any, initial_state: Any, reverse: bool, return_state: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """ema for every kind of argument."""
    x = _checks.input_tensor("x", x)
    dim = _checks.dimension(dim, x)
    alpha = _checks.smoothing_weight(alpha, x)
    _sharding.prepare(dim, x=x, alpha=alpha)
    state = _checks.start_state(initial_state, x, dim)
    if state is not None and not isinstance(initial_state, Tensor):
        state = _sharding.beside(x, state)
    reverse = bool(reverse)

    if return_state and x.shape[dim] == 0:
        if state is None:
            raise ValueError(
                f"return_state: x of shape {tuple(x.shape)} has no sample along dim {dim} and "
                f"initial_state is None, so there is no state to return"
            )
        y = ema(x, alpha, dim=dim, reverse=reverse)
        return y, _checks.expand_state(state, x, dim).clone()

    arguments = [tensor for tensor in (x, alpha, state) if isinstance(tensor, Tensor)]
    required = any(tensor.requires_grad for tensor in arguments)
    if traced() or (required and is_grad_enabled()):
        if state is not None:
            state = _checks.expand_state(state, x, dim)
        compute = float_ema if isinstance(alpha, float) else tensor_ema
        result: Tensor | tuple[Tensor, Tensor] = compute(
            x, alpha, state, dim, reverse, return_state
        )
        return result
    if return_state:
        two = _ops.ema_with_state if isinstance(alpha, float) else _ops.ema_with_state_tensor
        return two(x, alpha, state, dim, reverse)
    one = _ops.ema if isinstance(alpha, float) else _ops.ema_tensor
    return one(x, alpha, state, dim, reverse)


@overload
def linear_recurrence(
    a: float | Tensor,
    b: Tensor,
    *,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_recurrence(
    a: float | Tensor,
    b: Tensor,
    *,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_recurrence(
    a: float | Tensor,
    b: Tensor,
    *,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_recurrence(
    a: float | Tensor,
    b: Tensor,
    *,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""First-order linear recurrence along one dimension, its coefficients given step by step.

    .. math:: y_n = a_n\, y_{n-1} + b_n, \qquad y_{-1} = 0

    It is what is under discounted sums, gated recurrent layers, resets (``a = 0``) and every
    weighted average of the past; `ema` is :math:`a = 1 - \alpha`, :math:`b = \alpha x`, without
    making either. The scan over pairs :math:`(a, b)` is that of Blelloch (1990).

    Args:
        a: the weight of the past. A real number, or a floating-point tensor that broadcasts with
            b: ``()``, ``a[:, None]`` for one per channel, ``(time,)`` for one per step, or the full
            shape. One of size 1 (or nothing) along ``dim`` takes the faster path. It may have
            another dtype than b, enters unrounded, and never changes the dtype of the result.
        b: what each step adds: a float16, bfloat16, float32 or float64 tensor of any strides that
            broadcasts with a. Neither is copied for it.
        dim: the dimension of time, in the shape that a and b broadcast to.
        initial_state: :math:`y_{-1}`. A number, or a floating-point tensor that expands to that
            shape without ``dim``. None is 0.
        reverse: run from the last step to the first: flip, recurrence, flip.
        return_state: return ``(y, state)``. ``state`` is y after the last step (the first one in
            reverse), without ``dim``, in float32 for half types and otherwise in b's dtype. Passed
            on as ``initial_state``, it continues the recurrence.

    Returns:
        ``y``, of the shape that a and b broadcast to and of b's dtype, or ``(y, state)``. The state
        runs in float32 or wider. What is not finite behaves as in the plain loop: in particular
        ``a = 0`` forgets a finite past, and 0 times infinity is NaN. The result is bitwise the
        same from run to run and for any number of threads. Without steps ``y`` is empty, and
        ``state`` is ``initial_state`` or 0.

    Gradients of any order reach a, b and initial_state, each in its own shape and dtype, in reverse
    and in forward mode, under ``torch.func`` and ``torch.compile``. y is kept for that of a.

    Raises:
        TypeError: b is no dense tensor of the dtypes above; a or initial_state is neither a real
            number nor such a tensor; dim is no int.
        ValueError: a and b do not broadcast, or have no dimension; initial_state does not expand.
        IndexError: dim is out of range.
        RuntimeError: this build has no kernels for b's device; a or initial_state is on another
            device than b (a 0-dim tensor on the cpu may be); a ``torch.func`` transform is
            compiled; forward mode runs over forward mode.

    Example:
        >>> linear_recurrence(torch.tensor([0.5, 0.5, 0.0, 2.0]), torch.ones(4))
        tensor([1.0000, 1.5000, 1.0000, 3.0000])
    """
    number = not isinstance(a, Tensor)
    a, b, shape = _checks.recurrence(a, b)
    arguments = [t for t in (a, b, initial_state) if isinstance(t, Tensor)]
    required = any(tensor.requires_grad for tensor in arguments)
    differentiable = traced() or (required and is_grad_enabled())
    if b.shape != shape:
        b = _autograd.expand(b, b.dtype, *shape) if differentiable else b.expand(shape)
    dim = _checks.dimension(dim, b)
    _sharding.prepare(dim, b=b, a=a)
    state = _checks.start_state(initial_state, b, dim, "b")
    if number:
        a = _sharding.beside(b, a)
    if state is not None and not isinstance(initial_state, Tensor):
        state = _sharding.beside(b, state)
    reverse = bool(reverse)
    if differentiable:
        if state is not None:
            state = _checks.expand_state(state, b, dim)
        result: Tensor | tuple[Tensor, Tensor] = _autograd.linear_recurrence(
            a, b, state, dim, reverse, bool(return_state)
        )
        return result
    op = _ops.linear_recurrence_with_state if return_state else _ops.linear_recurrence
    return op(a, b, state, dim, reverse)
