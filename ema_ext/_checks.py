"""What the public functions accept: every error a user can cause is raised here.

Messages name the argument and both values: the one given and the one expected.
"""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ema_ext import _library, _ops
from ema_ext._autograd import expand


def input_tensor(name: str, value: Any) -> Tensor:
    """A dense floating-point tensor on a device that this build has kernels for."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    _floating_and_dense(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name} must have at least 1 dimension, got a 0-dim tensor")
    _supported_device(name, value.device)
    return value


def dimension(dim: Any, x: Tensor) -> int:
    """``dim`` counted from the front."""
    try:
        index = operator.index(dim)
    except TypeError:
        raise TypeError(f"dim must be an int, got {type(dim).__name__}") from None
    if not -x.dim() <= index < x.dim():
        raise IndexError(
            f"dim out of range (expected to be in range of [{-x.dim()}, {x.dim() - 1}], "
            f"but got {index})"
        )
    return index % x.dim()


def smoothing_weight(alpha: Any, x: Tensor) -> float | Tensor:
    """alpha as a float in [0, 1], or as a tensor that expands to x."""
    weight = _number_or_tensor("alpha", alpha, x)
    if isinstance(weight, float):
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], got {weight}")
        return weight
    if not _expands(weight.shape, x.shape):
        raise ValueError(
            f"alpha of shape {tuple(weight.shape)} does not expand to x of shape {tuple(x.shape)}"
            + _missing_time_axis("alpha", weight, x)
        )
    return weight


def recurrence(a: Any, b: Any) -> tuple[Tensor, Tensor, torch.Size]:
    """a and b of a linear recurrence, and the shape that they broadcast to."""
    if not isinstance(b, Tensor):
        raise TypeError(f"b must be a torch.Tensor, got {type(b).__name__}")
    _floating_and_dense("b", b)
    _supported_device("b", b.device)
    factor = _number_or_tensor("a", a, b, "b")
    if isinstance(factor, float):
        factor = torch.tensor(factor, dtype=torch.float64)
    if factor.device != b.device:
        factor = factor.to(b.device)
    try:
        shape = b.shape
        if factor.shape != shape:
            shape = torch.broadcast_shapes(factor.shape, shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(
            f"a of shape {tuple(factor.shape)} and b of shape {tuple(b.shape)} do not broadcast"
            + _missing_time_axis("a", factor, b)
            + _missing_time_axis("b", b, factor)
        ) from None
    if not shape:
        raise ValueError("a and b must have at least 1 dimension, got 0-dim tensors")
    return factor, b, shape


def start_state(initial_state: Any, x: Tensor, dim: int, name: str = "x") -> Tensor | None:
    """initial_state as a tensor that expands to x, called ``name``, without ``dim``, or None."""
    if initial_state is None:
        return None
    state = _number_or_tensor("initial_state", initial_state, x, name)
    if isinstance(state, float):
        return torch.tensor(state, dtype=torch.float64)
    shape = state_shape(x, dim)
    if not _expands(state.shape, shape):
        raise ValueError(
            f"initial_state of shape {tuple(state.shape)} does not expand to {shape}, "
            f"the shape of {name if name == 'x' else 'a and b'} without dim {dim}"
        )
    return state


def state_shape(x: Tensor, dim: int) -> tuple[int, ...]:
    """The shape of x without ``dim``."""
    return (*x.shape[:dim], *x.shape[dim + 1 :])


def expand_state(state: Tensor, x: Tensor, dim: int) -> Tensor:
    """The checked state in the accumulate dtype and full shape; autograd undoes both."""
    dtype, shape = _ops.ACCUMULATE_DTYPE[x.dtype], state_shape(x, dim)
    state = state.to(x.device)
    return state.to(dtype) if state.shape == shape else expand(state, dtype, *shape)


def _number_or_tensor(name: str, value: Any, x: Tensor, x_name: str = "x") -> float | Tensor:
    if isinstance(value, Tensor):
        _floating_and_dense(name, value)
        if value.device != x.device and not (value.dim() == 0 and value.device.type == "cpu"):
            raise RuntimeError(
                f"{name} is on {value.device} but {x_name} is on {x.device}; "
                f"only a 0-dim tensor on the cpu may be on another device than {x_name}"
            )
        return value
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{name} must be a float or a torch.Tensor, got {type(value).__name__}")


def _floating_and_dense(name: str, tensor: Tensor) -> None:
    if tensor.dtype.is_complex:
        raise TypeError(f"{name} must be real, got {tensor.dtype}")
    if tensor.dtype not in _ops.ACCUMULATE_DTYPE:
        supported = ", ".join(str(dtype) for dtype in _ops.ACCUMULATE_DTYPE)
        raise TypeError(
            f"{name} must be one of {supported}, got {tensor.dtype}; "
            f"cast to float first, for instance {name}.float()"
        )
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} must be a dense tensor (torch.strided), got {layout}")


def _supported_device(name: str, device: torch.device) -> None:
    if device.type in ("cpu", "meta"):
        return
    if device.type == "cuda":
        reason = _library.cuda_unavailable_reason()
        if reason is None:
            return
        raise RuntimeError(f"{name} is on {device}, but {reason}")
    raise RuntimeError(
        f"{name} is on {device}, but ema_ext has no kernels for {device.type}; "
        f"move it first, for instance {name}.cpu()"
    )


def _expands(shape: torch.Size, target: tuple[int, ...]) -> bool:
    if len(shape) > len(target):
        return False
    aligned = target[len(target) - len(shape) :]
    return all(have in (1, want) for have, want in zip(shape, aligned, strict=True))


def _missing_time_axis(name: str, alpha: Tensor, x: Tensor) -> str:
    """A hint for alpha given per channel or per row of x, without the last dimension of x."""
    if alpha.dim() == 0 or alpha.shape != x.shape[-1 - alpha.dim() : -1]:
        return ""
    return f"; did you mean {name}[{':, ' * alpha.dim()}None]?"
