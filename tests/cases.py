"""The inputs that several test files share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

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


def quarters(*shape: int, seed: int = 0) -> Tensor:
    """1/4, 1/2 or 3/4: sums of products of some twelve of these are exact in float64, in any order,
    so that what is computed from few of them must have the same bits however it is computed.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 4, shape, generator=generator).double() / 4


def assert_same(actual: Any, expected: Any) -> None:
    """No element of the two, tensors or nests of tensors, differs; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(3), torch.zeros(5)], layout=layout)


def csr() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(3).to_sparse_csr()


def quantized(*shape: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(shape), 0.1, 0, torch.qint8)


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
