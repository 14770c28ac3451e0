"""The inputs that several test files share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

#: Empty, single, and both sides of every power of two that a vector or a tile may have, then two
#: lengths of many tiles that are no multiple of any.
LENGTHS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 4097)


def signal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal noise around 0, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def transposed(x: Tensor) -> Tensor:
    """The last dimension has the largest stride."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def sliced(x: Tensor) -> Tensor:
    """Every second element of a tensor that is NaN elsewhere: a stray read shows."""
    wide = x.new_full([2 * size for size in x.shape], torch.nan)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


def offset(x: Tensor) -> Tensor:
    """Contiguous, but one element off every alignment, with NaN on both sides."""
    buffer = x.new_full([x.numel() + 2], torch.nan)
    return buffer[1:-1].view(x.shape).copy_(x)


def row_gaps(x: Tensor) -> Tensor:
    """Contiguous rows with a gap of one NaN between them."""
    wide = x.new_full([*x.shape[:-1], x.shape[-1] + 1], torch.nan)
    return wide[..., :-1].copy_(x)


#: The same values under other strides.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.clone,
    "transposed": transposed,
    "sliced": sliced,
    "offset": offset,
    "row_gaps": row_gaps,
}
