"""The native operators under short names, what they return for tensors without data, and vmap.

The operators are registered by the compiled library; csrc/ops.cpp holds their schemas and their
contract. They expect checked arguments: a non-negative ``dim``, and an ``alpha`` and
``initial_state`` that broadcast.
"""

# ruff: noqa: ARG001 - a fake takes all the arguments of its operator

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ema_ext import _library

_library.load()

#: dtype of x -> dtype of the state and of every sum. Its keys are the dtypes that the kernels take.
ACCUMULATE_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}

Op = Callable[..., Tensor]
Op2 = Callable[..., tuple[Tensor, Tensor]]
Op3 = Callable[..., tuple[Tensor, Tensor, Tensor]]

_namespace = torch.ops.ema_ext
ema: Op = _namespace.ema.default
ema_tensor: Op = _namespace.ema.Tensor
ema_with_state: Op2 = _namespace.ema_with_state.default
ema_with_state_tensor: Op2 = _namespace.ema_with_state.Tensor
ema_backward: Op2 = _namespace.ema_backward.default
ema_backward_tensor: Op3 = _namespace.ema_backward.Tensor
linear_recurrence: Op = _namespace.linear_recurrence.default


def _empty_state(x: Tensor, dim: int) -> Tensor:
    shape = [*x.shape[:dim], *x.shape[dim + 1 :]]
    return x.new_empty(shape, dtype=ACCUMULATE_DTYPE[x.dtype])


def _same_device(x: Tensor, *companions: float | Tensor | None) -> None:
    # A meta companion brings a direct call with a real x here.
    for companion in companions:
        if isinstance(companion, Tensor) and companion.dim() > 0 and companion.device != x.device:
            raise RuntimeError(f"x is on {x.device} and another argument on {companion.device}")


def _fake_ema(
    x: Tensor, alpha: float | Tensor, initial_state: Tensor | None, dim: int, reverse: bool
) -> Tensor:
    _same_device(x, alpha, initial_state)
    return torch.empty_like(x)


def _fake_ema_with_state(
    x: Tensor, alpha: float | Tensor, initial_state: Tensor | None, dim: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    _same_device(x, alpha, initial_state)
    return torch.empty_like(x), _empty_state(x, dim)


def _fake_ema_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    alpha: float,
    has_initial_state: bool,
    dim: int,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    _same_device(grad_y, grad_state)
    return torch.empty_like(grad_y), _empty_state(grad_y, dim)


def _fake_ema_backward_tensor(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    alpha: Tensor,
    initial_state: Tensor | None,
    dim: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _same_device(grad_y, grad_state, x, alpha, initial_state)
    grad_alpha = alpha.new_empty(alpha.shape)
    return torch.empty_like(grad_y), grad_alpha, _empty_state(grad_y, dim)


def _fake_linear_recurrence(
    a: Tensor, b: Tensor, initial_state: Tensor | None, dim: int, reverse: bool
) -> Tensor:
    _same_device(b, a, initial_state)
    return torch.empty_like(b)


_FAKES: dict[str, Callable[..., object]] = {
    "ema": _fake_ema,
    "ema.Tensor": _fake_ema,
    "ema_with_state": _fake_ema_with_state,
    "ema_with_state.Tensor": _fake_ema_with_state,
    "ema_backward": _fake_ema_backward,
    "ema_backward.Tensor": _fake_ema_backward_tensor,
    "linear_recurrence": _fake_linear_recurrence,
}
for _operator, _fake in _FAKES.items():
    torch.library.register_fake(f"ema_ext::{_operator}", _fake)


#: What each argument is, to torch.vmap, which adds a dimension at the front, and to DTensor: "x"
#: has all dimensions, "alpha" expands to x, "state" expands to x without time, "dim" counts
#: dimensions.
ROLES = {
    "ema": ("x", "", "state", "dim", ""),
    "ema.Tensor": ("x", "alpha", "state", "dim", ""),
    "ema_with_state": ("x", "", "state", "dim", ""),
    "ema_with_state.Tensor": ("x", "alpha", "state", "dim", ""),
    "ema_backward": ("x", "state", "", "", "dim", ""),
    "ema_backward.Tensor": ("x", "state", "x", "alpha", "state", "dim", ""),
    "linear_recurrence": ("alpha", "x", "state", "dim", ""),
}


def _batched(value: Tensor, at: int | None, size: int, rank: int) -> Tensor:
    """``value`` with vmap's dimension, from ``at`` or made, in front of ``rank`` others."""
    value = value.expand(size, *value.shape) if at is None else value.movedim(at, 0)
    ones = [1] * (rank + 1 - value.dim())
    return value.reshape(size, *ones, *value.shape[1:])


def _batching_rule(operator: str) -> Callable[..., Any]:
    roles = ROLES[operator]
    name, _, overload = operator.partition(".")
    op = getattr(getattr(_namespace, name), overload or "default")

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        x, at = arguments[roles.index("x")], in_dims[roles.index("x")]
        ranks = {"x": x.dim() - (at is not None)}
        ranks |= {"alpha": ranks["x"], "state": ranks["x"] - 1}
        batched = [
            _batched(value, at, info.batch_size, ranks[role])
            if isinstance(value, Tensor)
            else (value + 1 if role == "dim" else value)
            for value, at, role in zip(arguments, in_dims, roles, strict=True)
        ]
        results = op(*batched)
        if operator == "ema_backward.Tensor":
            grad_x, grad_alpha, grad_state = results
            alpha, at = arguments[roles.index("alpha")], in_dims[roles.index("alpha")]
            shape = [size for i, size in enumerate(alpha.shape) if i != at]
            results = grad_x, grad_alpha.reshape(info.batch_size, *shape), grad_state
        return results, (0,) * len(results) if isinstance(results, tuple) else 0

    return rule


for _operator in ROLES:
    torch.library.register_vmap(f"ema_ext::{_operator}", _batching_rule(_operator))
