"""The moving average as a layer whose smoothing can be learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ema_ext.functional import ema
from ema_ext.smoothing import number_or_tensor


class EMA(nn.Module):
    r"""Exponential moving average along one dimension, with one alpha or one per channel.

    .. math:: y_n = (1 - \alpha)\, y_{n-1} + \alpha\, x_n, \qquad y_0 = x_0

    ``alpha`` is the weight of the new sample, as in :func:`ema_ext.ema`.

    Args:
        alpha: the smoothing factor, or its start if it is learned: a number, or a floating-point
            tensor of shape ``()``, or ``(num_channels,)`` if that is given. Strictly inside (0, 1)
            if learnable, otherwise in [0, 1].
        num_channels: the size of x along ``channel_dim``, for one alpha per channel.
        channel_dim: the dimension of the channels; without num_channels it has no meaning.
        dim: the dimension of time.
        learnable: hold the logit, log(alpha / (1 - alpha)), as the parameter ``logit``, which may
            take any value; otherwise hold alpha as the buffer ``fixed_alpha``. Both are in
            ``state_dict``.

    ``module.half()`` and ``module.to(torch.bfloat16)`` leave the logit in float32, since a half
    type has no room for the small steps by which alpha is learned, and no dtype that the module is
    cast to changes ``fixed_alpha``, which is float64: 0.999 would be 1 in bfloat16.

    Raises:
        TypeError: alpha is neither a real number nor a floating-point tensor; num_channels,
            channel_dim or dim is no int.
        ValueError: alpha lies outside its interval or has another shape; num_channels is below 1;
            channel_dim and dim are the same.

    Example:
        >>> smooth = EMA(0.1, num_channels=3)
        >>> smooth(torch.randn(8, 3, 1000)).shape
        torch.Size([8, 3, 1000])
    """

    fixed_alpha: Tensor

    def __init__(
        self,
        alpha: float | Tensor = 0.1,
        num_channels: int | None = None,
        *,
        channel_dim: int = -2,
        dim: int = -1,
        learnable: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("channel_dim", channel_dim), ("dim", dim)):
            _check_int(name, value)
        if num_channels is not None:
            _check_int("num_channels", num_channels)
            if num_channels < 1:
                raise ValueError(f"num_channels must be at least 1, got {num_channels}")
            if channel_dim == dim:
                raise ValueError(f"channel_dim and dim must differ, got {dim} for both")
        self.num_channels = num_channels
        self.channel_dim = channel_dim
        self.dim = dim
        self.learnable = learnable
        start = _start(alpha, () if num_channels is None else (num_channels,), learnable)
        if learnable:
            wanted = alpha.dtype if isinstance(alpha, Tensor) else torch.get_default_dtype()
            self.logit = nn.Parameter(start.logit().to(torch.promote_types(wanted, torch.float32)))
        else:
            self.register_buffer("fixed_alpha", start)

    @property
    def alpha(self) -> Tensor:
        """The current smoothing factor: float64, of shape () or (num_channels,)."""
        return self.logit.double().sigmoid() if self.learnable else self.fixed_alpha

    def forward(
        self, x: Tensor, initial_state: float | Tensor | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``ema(x, self.alpha, dim=self.dim, ...)``, each channel with its own alpha.

        Args:
            x: float16, bfloat16, float32 or float64 tensor, of size num_channels along channel_dim.
            initial_state: the average before the first sample, as in :func:`ema_ext.ema`.
            return_state: return ``(y, state)``: the state is the initial_state that goes on.

        Returns:
            ``y`` of x's shape and dtype, or ``(y, state)``.

        Raises:
            ValueError: x has another number of channels, or the same dimension for channels and
                time.
            IndexError: x has no dimension channel_dim.
            Otherwise as :func:`ema_ext.ema`.
        """
        alpha = self.alpha
        if self.num_channels is not None and isinstance(x, Tensor):
            alpha = self._along_channels(alpha, x)
        return ema(x, alpha, dim=self.dim, initial_state=initial_state, return_state=return_state)

    def extra_repr(self) -> str:
        """The arguments, with alpha as it is now: its least and largest value over channels."""
        channels = f"num_channels={self.num_channels}, channel_dim={self.channel_dim}, "
        alpha = self.alpha.detach()
        now = "?" if alpha.is_meta else _interval(float(alpha.min()), float(alpha.max()))
        return (
            f"alpha={now}, {'' if self.num_channels is None else channels}"
            f"dim={self.dim}, learnable={self.learnable}"
        )

    def _along_channels(self, alpha: Tensor, x: Tensor) -> Tensor:
        """alpha as a view that broadcasts against x."""
        shape = tuple(x.shape)
        if not -x.dim() <= self.channel_dim < x.dim():
            raise IndexError(
                f"channel_dim out of range (expected to be in range of [{-x.dim()}, "
                f"{x.dim() - 1}], but got {self.channel_dim})"
            )
        channel = self.channel_dim % x.dim()
        if -x.dim() <= self.dim < x.dim() and channel == self.dim % x.dim():
            raise ValueError(
                f"channel_dim {self.channel_dim} and dim {self.dim} are the same dimension of x, "
                f"of shape {shape}"
            )
        if shape[channel] != self.num_channels:
            raise ValueError(
                f"x of shape {shape} has {shape[channel]} channels along channel_dim "
                f"{self.channel_dim}, but num_channels is {self.num_channels}"
            )
        return alpha.view(-1, *[1] * (x.dim() - 1 - channel))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EMA:
        """Moves the module as every other, but never rounds the logit or alpha: see the class."""
        own = self.logit if self.learnable else self.fixed_alpha

        def unrounded(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor is not own and tensor is not own.grad:
                return moved
            kept = torch.promote_types(moved.dtype, torch.float32) if self.learnable else own.dtype
            return moved if moved.dtype == kept else tensor.to(moved.device, kept)

        super()._apply(unrounded, recurse)  # type: ignore[no-untyped-call]
        return self


def _check_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def _start(alpha: Any, shape: tuple[int, ...], learnable: bool) -> Tensor:
    """alpha, checked, as a new float64 tensor of the given shape."""
    value = number_or_tensor("alpha", alpha)
    if isinstance(value, float):
        _check_interval(value, value, learnable)
        return torch.full(shape, value, dtype=torch.float64)
    if not value.is_floating_point():
        raise TypeError(f"alpha must be floating-point, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"alpha must be a float or of shape {shape}, got {tuple(value.shape)}")
    start = value.detach().to(torch.float64, copy=True)
    if not start.is_meta:
        _check_interval(float(start.min()), float(start.max()), learnable)
    return start


def _check_interval(low: float, high: float, learnable: bool) -> None:
    if learnable and not 0.0 < low <= high < 1.0:
        raise ValueError(
            f"alpha must lie strictly inside (0, 1) to be learnable, got {_interval(low, high)}"
        )
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {_interval(low, high)}")


def _interval(low: float, high: float) -> str:
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
