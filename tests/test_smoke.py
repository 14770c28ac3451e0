"""The least that every build must do in every torch: the ops are registered, run and differentiate.

CI also runs this file with a library that was built beside another torch.
"""

from __future__ import annotations

import pytest
import torch

from ema_ext import ema

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("name", "overloads"),
    [
        ("ema", ["default", "Samples", "Tensor"]),
        ("ema_with_state", ["default", "Tensor"]),
        ("ema_backward", ["default", "Samples", "Tensor", "Varying"]),
        ("linear_recurrence", ["default"]),
        ("linear_recurrence_with_state", ["default"]),
        ("linear_recurrence_backward", ["default"]),
        ("sum_to", ["default"]),
    ],
)
def test_ops_are_registered(name: str, overloads: list[str]) -> None:
    """Catches an operator whose static registration the linker dropped."""
    assert getattr(torch.ops.ema_ext, name).overloads() == overloads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halving_is_exact(dtype: torch.dtype) -> None:
    """Catches tensors misread across the ABI: every value here is exact in every dtype."""
    x = torch.tensor([[22.0, 34.0, 22.0, 18.0], [4.0, 0.0, 8.0, 8.0]], dtype=dtype)
    expected = torch.tensor([[22.0, 28.0, 25.0, 21.5], [4.0, 2.0, 5.0, 6.5]], dtype=dtype)
    assert ema(x, 0.5).equal(expected)
    assert ema(x, torch.tensor([[0.5], [0.5]])).equal(expected)
    assert ema(x.T, 0.5, dim=0).equal(expected.T)
    y, state = ema(x, 0.5, return_state=True)
    assert y.equal(expected)
    assert state.tolist() == [21.5, 6.5]


def test_gradients_are_the_documented_ones() -> None:
    """Catches a backward that reaches the wrong kernel or the wrong argument."""
    x = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(1 / 2, dtype=torch.float64, requires_grad=True)
    grad_x, grad_alpha = torch.autograd.grad(ema(x, alpha).sum(), [x, alpha])
    assert grad_alpha.item() == 10.75  # 1.75 * 1 + 1.5 * 2.5 + 1 * 5.25
    assert grad_x.tolist() == [1.875, 0.875, 0.75, 0.5]
