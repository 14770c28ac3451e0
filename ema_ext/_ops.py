"""The native operators under short names, what they return for tensors without data, and vmap.

The operators are registered by the compiled library; csrc/ops.cpp holds their schemas and their
contract. They expect checked arguments: an ``alpha`` and ``initial_state`` that broadcast.
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
ema_samples: Op = _namespace.ema.Samples
ema_tensor: Op = _namespace.ema.Tensor
ema_with_state: Op2 = _namespace.ema_with_state.default
ema_with_state_tensor: Op2 = _namespace.ema_with_state.Tensor
ema_backward: Op2 = _namespace.ema_backward.default
ema_backward_samples: Op = _namespace.ema_backward.Samples
ema_backward_tensor: Op3 = _namespace.ema_backward.Tensor
ema_backward_varying: Op3 = _namespace.ema_backward.Varying
linear_recurrence: Op = _namespace.linear_recurrence.default
linear_recurrence_with_state: Op2 = _namespace.linear_recurrence_with_state.default
linear_recurrence_backward: Op3 = _namespace.linear_recurrence_backward.default
sum_to: Op = _namespace.sum_to.default

#: Without the Python frame in front of an operator, a tenth of a small call. torch.compile cannot
#: trace these.
ema_directly: Op = getattr(ema_samples, "_op", ema_samples)
ema_backward_directly: Op = getattr(ema_backward_samples, "_op", ema_backward_samples)


def _empty_state(x: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    del shape[dim]
    return x.new_empty(shape, dtype=ACCUMULATE_DTYPE[x.dtype])


def _check_samples(x: Tensor, dim: int) -> None:
    """What the kernels check of samples, of tensors that do not get there."""
    if x.dtype not in ACCUMULATE_DTYPE:
        raise RuntimeError(f"x must be float32, float64, float16 or bfloat16, and is {x.dtype}")
    _check_dim(dim, x.dim())


def _check_dim(dim: int, rank: int) -> None:
    if not -rank <= dim < rank:
        raise RuntimeError(f"dim must lie in [{-rank}, {rank}), and is {dim}")


def _same_device(x: Tensor, *companions: float | Tensor | None) -> None:
    # A meta companion brings a direct call with a real x here.
    for companion in companions:
        if isinstance(companion, Tensor) and companion.dim() > 0 and companion.device != x.device:
            raise RuntimeError(f"x is on {x.device} and another argument on {companion.device}")


def _fake_ema(
    x: Tensor, alpha: float | Tensor, initial_state: Tensor | None, dim: int, reverse: bool
) -> Tensor:
    _check_samples(x, dim)
    _same_device(x, alpha, initial_state)
    return torch.empty_like(x)


def _fake_samples(x: Tensor, alpha: float, dim: int = -1, reverse: bool = False) -> Tensor:
    _check_samples(x, dim)
    return torch.empty_like(x)


def _fake_ema_with_state(
    x: Tensor, alpha: float | Tensor, initial_state: Tensor | None, dim: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    _check_samples(x, dim)
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
    _check_samples(grad_y, dim)
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
    _check_samples(grad_y, dim)
    _same_device(grad_y, grad_state, x, alpha, initial_state)
    grad_alpha = alpha.new_empty(alpha.shape)
    return torch.empty_like(grad_y), grad_alpha, _empty_state(grad_y, dim)


def _fake_ema_backward_varying(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    alpha: Tensor,
    y: Tensor,
    initial_state: Tensor | None,
    dim: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _same_device(grad_y, y)
    return _fake_ema_backward_tensor(grad_y, grad_state, x, alpha, initial_state, dim, reverse)


def _fake_linear_recurrence(
    a: Tensor, b: Tensor, initial_state: Tensor | None, dim: int, reverse: bool
) -> Tensor:
    _check_samples(b, dim)
    _same_device(b, a, initial_state)
    return torch.empty_like(b)


def _fake_linear_recurrence_with_state(
    a: Tensor, b: Tensor, initial_state: Tensor | None, dim: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    _check_samples(b, dim)
    _same_device(b, a, initial_state)
    return torch.empty_like(b), _empty_state(b, dim)


def _fake_linear_recurrence_backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    a: Tensor,
    y: Tensor,
    initial_state: Tensor | None,
    dim: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_samples(grad_y, dim)
    _same_device(grad_y, grad_state, a, y, initial_state)
    return a.new_empty(a.shape), torch.empty_like(grad_y), _empty_state(grad_y, dim)


def _fake_sum_to(terms: Tensor, like: Tensor) -> Tensor:
    _same_device(terms, like)
    return like.new_empty(like.shape)


_FAKES: dict[str, Callable[..., object]] = {
    "ema": _fake_ema,
    "ema.Samples": _fake_samples,
    "ema.Tensor": _fake_ema,
    "ema_with_state": _fake_ema_with_state,
    "ema_with_state.Tensor": _fake_ema_with_state,
    "ema_backward": _fake_ema_backward,
    "ema_backward.Samples": _fake_samples,
    "ema_backward.Tensor": _fake_ema_backward_tensor,
    "ema_backward.Varying": _fake_ema_backward_varying,
    "linear_recurrence": _fake_linear_recurrence,
    "linear_recurrence_with_state": _fake_linear_recurrence_with_state,
    "linear_recurrence_backward": _fake_linear_recurrence_backward,
    "sum_to": _fake_sum_to,
}
for _operator, _fake in _FAKES.items():
    torch.library.register_fake(f"ema_ext::{_operator}", _fake)


#: What each argument is, to torch.vmap, which adds a dimension at the front, and to DTensor: "x"
#: has all dimensions, "alpha" broadcasts to x, "state" expands to x without time, "dim" counts
#: dimensions.
ROLES = {
    "ema": ("x", "", "state", "dim", ""),
    "ema.Samples": ("x", "", "dim", ""),
    "ema.Tensor": ("x", "alpha", "state", "dim", ""),
    "ema_with_state": ("x", "", "state", "dim", ""),
    "ema_with_state.Tensor": ("x", "alpha", "state", "dim", ""),
    "ema_backward": ("x", "state", "", "", "dim", ""),
    "ema_backward.Samples": ("x", "", "dim", ""),
    "ema_backward.Tensor": ("x", "state", "x", "alpha", "state", "dim", ""),
    "ema_backward.Varying": ("x", "state", "x", "alpha", "x", "state", "dim", ""),
    "linear_recurrence": ("alpha", "x", "state", "dim", ""),
    "linear_recurrence_with_state": ("alpha", "x", "state", "dim", ""),
    "linear_recurrence_backward": ("x", "state", "alpha", "x", "state", "dim", ""),
    "sum_to": ("x", "alpha"),
}

# Which result has the shape of the "alpha".
_GRAD_ALPHA = {
    "ema_backward.Tensor": 1,
    "ema_backward.Varying": 1,
    "linear_recurrence_backward": 0,
    "sum_to": 0,
}


def _batched(value: Tensor, at: int | None, size: int, rank: int) -> Tensor:
    """``value`` with vmap's dimension, from ``at`` or made, in front of ``rank`` others."""
    value = value.expand(size, *value.shape) if at is None else value.movedim(at, 0)
    ones = [1] * (rank + 1 - value.dim())
    return value.reshape(size, *ones, *value.shape[1:])


def _batching_rule(operator: str) -> Callable[..., Any]:
    name, _, overload = operator.partition(".")
    op = getattr(getattr(_namespace, name), overload or "default")

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        roles = ROLES[operator][: len(arguments)]  # the others keep their defaults
        x, at = arguments[roles.index("x")], in_dims[roles.index("x")]
        ranks = {"x": x.dim() - (at is not None)}
        ranks |= {"alpha": ranks["x"], "state": ranks["x"] - 1}
        if "dim" in ROLES[operator]:  # or it would count vmap's own dimension
            _check_dim(arguments[roles.index("dim")] if "dim" in roles else -1, ranks["x"])
        batched = [
            _batched(value, at, info.batch_size, ranks[role])
            if isinstance(value, Tensor)
            else (value + 1 if role == "dim" and value >= 0 else value)
            for value, at, role in zip(arguments, in_dims, roles, strict=True)
        ]
        results = op(*batched)
        several = isinstance(results, tuple)
        if operator in _GRAD_ALPHA:
            alpha, at = arguments[roles.index("alpha")], in_dims[roles.index("alpha")]
            shape = [size for i, size in enumerate(alpha.shape) if i != at]
            results = list(results) if several else [results]
            own = _GRAD_ALPHA[operator]
            results[own] = results[own].reshape(info.batch_size, *shape)
            results = tuple(results) if several else results[0]
        return results, (0,) * len(results) if several else 0

    return rule


for _operator in ROLES:
    torch.library.register_vmap(f"ema_ext::{_operator}", _batching_rule(_operator))

# Autograd looks out for gradients that get lost in operators that it knows nothing of, which takes
# a microsecond a call. These two run within a Function, or where no gradient is wanted.
_torch_library: Any = torch.library
_unwatched = _torch_library.Library("ema_ext", "IMPL")
for _operator in ("ema.Samples", "ema_backward.Samples"):
    _unwatched.impl(_operator, _torch_library.fallthrough_kernel, "Autograd")
