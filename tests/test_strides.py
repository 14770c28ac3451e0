"""Any strides in, those of torch.empty_like out; for x, for the gradient, for alpha and state."""

from __future__ import annotations

import bounds
import pytest
import torch
from cases import DTYPES, LAYOUTS, signal

from ema_ext import ema


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_layouts(dim: int, dtype: torch.dtype, layout: str) -> None:
    """Catches a stride taken for another, a stray read, and y laid out unlike x."""
    x = LAYOUTS[layout](signal(6, 33, 20, dtype=dtype))
    for reverse in (False, True):
        y = ema(x, 0.2, dim=dim, reverse=reverse)
        bounds.check_forward(y, x, 0.2, dim=dim, reverse=reverse)
        assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_backward(layout: str, grad_layout: str, dim: int) -> None:
    """Catches a backward that takes the gradient's strides for those of x."""
    x = LAYOUTS[layout](signal(4, 9, 10, dtype=torch.float32)).requires_grad_()
    grad_y = LAYOUTS[grad_layout](signal(4, 9, 10, dtype=torch.float32, seed=1))
    alpha = torch.tensor(0.2, requires_grad=True)
    grads = torch.autograd.grad(ema(x, alpha, dim=dim), (x, alpha), grad_y)
    bounds.check_backward((*grads, None), grad_y, x, alpha, dim=dim)
    (grad_x,) = torch.autograd.grad(ema(x, 0.2, dim=dim), x, grad_y)
    bounds.check_backward((grad_x, None, None), grad_y, x, 0.2, dim=dim)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("expanded", [0, 1, 2])
def test_expanded(expanded: int, dim: int) -> None:
    """Catches a result that inherits a stride of 0, and a gradient of sum() (expanded itself)."""
    shape = [5, 6, 7]
    shape[expanded] = 1
    x = signal(*shape).expand(5, 6, 7).requires_grad_()
    y = ema(x, 0.3, dim=dim)
    bounds.check_forward(y, x, 0.3, dim=dim)
    assert y.stride() == torch.empty_like(x).stride()
    (grad_x,) = torch.autograd.grad(y.sum(), x)
    bounds.check_backward((grad_x, None, None), torch.ones(5, 6, 7), x, 0.3, dim=dim)


def test_overlapping_windows() -> None:
    """Catches a layout normalised by its storage: windows share their samples."""
    x = signal(50).unfold(0, 16, 3)
    bounds.check_forward(ema(x, 0.3), x, 0.3)
    bounds.check_forward(ema(x, 0.3, dim=0), x, 0.3, dim=0)


def test_lazily_negated_view() -> None:
    """Catches the memory read past torch's negative bit."""
    x = torch.complex(signal(4, 30), -signal(4, 30)).conj().imag
    assert x.is_neg()
    bounds.check_forward(ema(x, 0.3), x.resolve_neg(), 0.3)


def test_strided_alpha_and_state() -> None:
    """Catches alpha or initial_state read as if contiguous."""
    x = signal(3, 4, 30)
    alpha = signal(8, 6).sigmoid().T[::2, ::2].unsqueeze(-1)
    state = signal(8, 6, seed=1).T[::2, ::2]
    y = ema(x, alpha, initial_state=state)
    bounds.check_forward(y, x, alpha, initial_state=state)


def test_input_is_left_alone() -> None:
    """Catches a scan in place, or a state written through to the caller's tensor."""
    x, s = signal(3, 40), signal(3, seed=1)
    kept = x.clone(), s.clone()
    y, state = ema(x, 0.3, initial_state=s, return_state=True)
    y.zero_()
    state.zero_()
    assert torch.equal(x, kept[0])
    assert torch.equal(s, kept[1])
