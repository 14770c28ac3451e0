"""The versions of the recurrence that the kernels are checked against, in plain torch.

All compute `y[n] = (1 - alpha) * y[n-1] + alpha * x[n]`, `y[0] = x[0]`, except `wma_window`, which
is another filter that goes by the same name. They come from a PyTorch forum thread
(https://discuss.pytorch.org/t/for-loop-slows-training-down/167667), each made complete.

======================== ============== ============ ==============================================
version                  work per row   memory       fails at
======================== ============== ============ ==============================================
`ema_loop`               L steps        L            speed; small alpha in float32
`ema_matmul`             L**2           L**2         long rows; a NaN corrupts outputs before it
`EMAConv`                L * taps       L            small alpha; learning alpha; forgets NaN
`wma_window`             L * period     L            being an EMA
======================== ============== ============ ==============================================
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["EMAConv", "ema_loop", "ema_matmul", "weight_matrix", "wma_window"]


def ema_loop(
    x: Tensor,
    alpha: float | Tensor,
    *,
    dim: int = -1,
    initial_state: float | Tensor | None = None,
) -> Tensor:
    """The for-loop: the specification of `ema_ext.ema`.

    Out of place, so that autograd differentiates it in x, alpha and initial_state. Costs several
    torch calls a sample; autograd keeps every step. float16 and bfloat16 are computed in float32
    and rounded once at the end. Each step rounds three times, so in float32 the error grows as
    1 / alpha: about four digits are lost at alpha = 1e-5.

    Args:
        x: float tensor of at least one dimension.
        alpha: weight of the new sample; a float in [0, 1], or a tensor that expands to x's shape,
            whose values are not checked. 1 - alpha is formed in float64.
        dim: the dimension of time.
        initial_state: y[-1], expanding to the shape of x without `dim`; None starts at y[0] = x[0].

    Returns:
        y, of x's shape and dtype.

    Raises:
        TypeError: x is no float tensor.
        ValueError: alpha out of range, or a shape that does not expand.
        IndexError: dim out of range.
    """
    _check_signal(x)
    dtype = _accumulate_dtype(x)
    steps = x.to(dtype).movedim(dim, 0)
    factor = _factor(alpha, x.device)
    weight = _expand("alpha", factor.to(dtype), x.shape).movedim(dim, 0).unbind(0)
    keep = _expand("alpha", (1 - factor).to(dtype), x.shape).movedim(dim, 0).unbind(0)
    state: Tensor | None = None
    if initial_state is not None:
        start = torch.as_tensor(initial_state, dtype=dtype, device=x.device)
        state = _expand("initial_state", start, steps.shape[1:])
    outputs = []
    for sample, w, k in zip(steps.unbind(0), weight, keep, strict=True):
        state = sample if state is None else k * state + w * sample
        outputs.append(state)
    if not outputs:
        return x.clone()
    return torch.stack(outputs).to(x.dtype).movedim(0, dim)


def weight_matrix(length: int, alpha: float | Tensor) -> Tensor:
    """The weights W of `y = W x`: W[n, k] = alpha (1 - alpha)**(n - k), W[n, 0] = (1 - alpha)**n.

    Its top left block is the matrix of a shorter length.

    Args:
        length: number of samples.
        alpha: a float in [0, 1] or a 0-dim tensor, in which the matrix is differentiable.

    Returns:
        A float64 tensor of shape (length, length), zero above the diagonal.
    """
    factor = _factor(alpha)
    if factor.dim():
        raise ValueError(
            f"alpha must be a float or a 0-dim tensor, got shape {tuple(factor.shape)}"
        )
    n = torch.arange(length, device=factor.device, dtype=torch.float64)
    powers = (1 - factor) ** (n[:, None] - n).clamp(min=0)
    scale = torch.where(n == 0, torch.ones_like(factor), factor)
    return (scale * powers).tril()


def ema_matmul(x: Tensor, alpha: float | Tensor, *, weights: Tensor | None = None) -> Tensor:
    """The weight matrix times x, along the last dimension.

    length**2 weights in memory: 40 GB of float32 at 100 000 samples, and several times that while
    they are made in float64. The zeros above the diagonal meet every later sample, so a NaN or an
    infinity makes outputs NaN *before* it too. Differentiable in x and alpha. float16 and bfloat16
    are multiplied in float32.

    Args:
        x: float tensor of shape (..., length).
        alpha: a float in [0, 1] or a 0-dim tensor. Not read where `weights` is given.
        weights: `weight_matrix(n, alpha)` of any n >= length, made once and sliced here.

    Returns:
        y, of x's shape and dtype.
    """
    _check_signal(x)
    length, dtype = x.shape[-1], _accumulate_dtype(x)
    if weights is None:
        weights = weight_matrix(length, alpha)
    elif weights.dim() != 2 or min(weights.shape) < length:
        raise ValueError(
            f"weights must be at least ({length}, {length}) for x of length {length}, "
            f"got {tuple(weights.shape)}"
        )
    block = weights[:length, :length].to(x.device, dtype)
    return (x.to(dtype) @ block.T).to(x.dtype)


class EMAConv(nn.Module):
    """A causal conv1d with the kernel alpha (1 - alpha)**k, along the last dimension.

    The kernel stops at `taps`, the first k with (1 - alpha)**k < eps, or at `max_length`: samples
    further back are left out, and (1 - alpha)**taps is their share of the weight. So it forgets a
    NaN after `taps` samples, which the recurrence never does. taps grows as 1 / alpha (175 at
    alpha = 0.1 and 1.8 million at 1e-5, with the default eps), the work as length * taps. The
    kernel is a buffer: alpha cannot be learned. Differentiable in x.

    Args:
        alpha: a float in [0, 1].
        eps: share of the weight that may be left out, in (0, 1).
        max_length: upper limit to the taps; with max_length >= length nothing else is left out.
    """

    kernel: Tensor
    first: Tensor

    def __init__(self, alpha: float, eps: float = 1e-8, max_length: int | None = None) -> None:
        super().__init__()
        _factor(alpha)
        if not 0 < eps < 1:
            raise ValueError(f"eps must be in (0, 1), got {eps}")
        if max_length is None and alpha == 0:
            raise ValueError("alpha = 0 never forgets: its kernel needs max_length, got None")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.alpha = alpha
        self.taps = _taps(alpha, eps, max_length)
        powers = (1 - alpha) ** torch.arange(self.taps, dtype=torch.float64)
        self.register_buffer("kernel", alpha * powers, persistent=False)
        self.register_buffer("first", (1 - alpha) * powers, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """y of x's shape and dtype, for x of shape (..., length)."""
        _check_signal(x)
        if not x.numel():
            return x.clone()
        dtype, taps = _accumulate_dtype(x), min(self.taps, x.shape[-1])
        rows = x.to(dtype).reshape(-1, 1, x.shape[-1])
        kernel = self.kernel[:taps].flip(0).to(x.device, dtype)
        y = functional.conv1d(functional.pad(rows, (taps - 1, 0)), kernel[None, None])
        # The kernel gives x[0] the weight alpha c**n; as y[0] = x[0] it has all of c**n.
        head = self.first[:taps].to(x.device, dtype) * rows[..., :1]
        y = y + functional.pad(head, (0, x.shape[-1] - taps))
        return y.reshape(x.shape).to(x.dtype)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, taps={self.taps}"


def wma_window(x: Tensor, period: int) -> Tensor:
    """The thread's `sync_EMA`: a linearly weighted moving average. Not an EMA.

    y[n] = sum_k (m - k) x[n-k] / (1 + ... + m) over the last m = min(n + 1, period) samples: a
    ramp-up of growing windows, then TA-Lib's WMA. No window depends on a sample before it, so
    nothing is remembered beyond `period`. The ramp-up is taken from a running sum.

    Args:
        x: float tensor of shape (..., length).
        period: the window, at least 1.

    Returns:
        y, of x's shape and dtype; float16 and bfloat16 are computed in float32.
    """
    _check_signal(x)
    if period < 1:
        raise ValueError(f"period must be at least 1, got {period}")
    values = x.to(_accumulate_dtype(x))
    ramp = torch.arange(1, period + 1, device=x.device, dtype=values.dtype)
    head = values[..., : period - 1]
    counts = ramp[: head.shape[-1]]
    y = (head * counts).cumsum(-1) / counts.cumsum(-1)
    if x.shape[-1] >= period:
        y = torch.cat([y, values.unfold(-1, period, 1) @ (ramp / ramp.sum())], dim=-1)
    return y.to(x.dtype)


def _taps(alpha: float, eps: float, max_length: int | None) -> int:
    """The first k with (1 - alpha)**k < eps, found from the logarithms, at most max_length."""
    taps = math.inf
    if alpha == 1:
        taps = 1
    elif alpha > 0:
        taps = math.floor(math.log(eps) / math.log1p(-alpha)) + 1
    if max_length is not None:
        taps = min(taps, max_length)
    return int(taps)


def _check_signal(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must have a floating dtype, got {x.dtype}: cast it to float")
    if not x.dim():
        raise ValueError("x must have at least one dimension, got shape ()")


def _factor(alpha: float | Tensor, device: torch.device | None = None) -> Tensor:
    """alpha in float64, a float checked."""
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise TypeError(f"alpha must have a floating dtype, got {alpha.dtype}")
        return alpha.to(device or alpha.device, torch.float64)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    return torch.tensor(alpha, dtype=torch.float64, device=device)


def _expand(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} does not expand to {tuple(shape)}"
        ) from None


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
