"""loop == matmul == conv == kernel: four independent ways to the same numbers and gradients.

Each is held to the same oracle on the same input within its own derived bound.
"""

from __future__ import annotations

from collections.abc import Callable

import bounds
import pytest
import torch

import ema_ext
from ema_ext.reference import EMAConv, ema_loop, ema_matmul

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-12

Version = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def conv(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    return EMAConv(alpha.item(), EPS)(x)


def witnesses(length: int, alpha: float) -> dict[str, tuple[Version, bounds.Roundings]]:
    taps = EMAConv(alpha, EPS).taps
    truncated = bounds.conv(min(taps, length), EPS if taps < length else 0.0)
    return {
        "loop": (ema_loop, bounds.LOOP),
        "matmul": (ema_matmul, bounds.matmul(length)),
        "conv": (conv, truncated),
        "kernel": (ema_ext.ema, bounds.KERNEL),
    }


def signal(length: int, mean: float, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (mean + torch.randn(2, 3, length, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 50.0])
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("length", [1, 2, 9, 130, 257])
def test_values_agree(length: int, alpha: float, mean: float, dtype: torch.dtype) -> None:
    """Catches a kernel (or a witness) whose weights, start or rounding differ from the others'."""
    x = signal(length, mean, dtype, seed=0)
    factor = torch.tensor(alpha, dtype=torch.float64)
    for label, (version, roundings) in witnesses(length, alpha).items():
        y = version(x, factor)
        assert y.dtype == dtype
        bounds.check_forward(y, x, alpha, roundings=roundings, label=label)
    assert torch.equal(ema_ext.ema(x, alpha), ema_ext.ema(x, factor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 50.0])
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("length", [1, 2, 9, 130, 257])
def test_gradients_agree(length: int, alpha: float, mean: float, dtype: torch.dtype) -> None:
    """Catches a hand-written backward that is not the derivative of its own forward."""
    g = signal(length, 0.0, dtype, seed=1)
    for label, (version, roundings) in witnesses(length, alpha).items():
        x = signal(length, mean, dtype, seed=0).requires_grad_()
        learns = label != "conv"
        factor = torch.tensor(alpha, dtype=torch.float64, requires_grad=learns)
        arguments = (x, factor) if learns else (x,)
        grads = torch.autograd.grad(version(x, factor), arguments, g, materialize_grads=True)
        if learns:
            grads = (*grads, None)
            bounds.check_backward(grads, g, x, alpha, roundings=roundings, label=label)
        else:
            backward = bounds.conv_backward(g, x, alpha, roundings)
            bounds.assert_within(grads[0], *backward, "conv grad x")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_kernel_and_loop_agree_on_every_argument(dim: int, reverse: bool) -> None:
    """Catches a kernel that reads dim, reverse, a per-row alpha or the start otherwise."""
    generator = torch.Generator().manual_seed(2)
    shape = (5, 6, 7)
    rest = shape[:dim] + shape[dim + 1 :]
    x, g = (torch.randn(2, *shape, generator=generator, dtype=torch.float64)).unbind(0)
    alpha = torch.rand(x.select(dim, 0).shape, generator=generator, dtype=torch.float64)
    alpha = alpha.unsqueeze(dim)
    start = torch.randn(rest, generator=generator, dtype=torch.float64)
    arguments = tuple(t.requires_grad_() for t in (x, alpha, start))

    def loop() -> torch.Tensor:
        turned = x.flip(dim) if reverse else x
        y = ema_loop(turned, alpha, dim=dim, initial_state=start)
        return y.flip(dim) if reverse else y

    def kernel() -> torch.Tensor:
        return ema_ext.ema(x, alpha, dim=dim, initial_state=start, reverse=reverse)

    options = {"dim": dim, "initial_state": start, "reverse": reverse}
    for label, version, roundings in (
        ("loop", loop, bounds.LOOP),
        ("kernel", kernel, bounds.KERNEL),
    ):
        y = version()
        bounds.check_forward(y, x, alpha, roundings=roundings, label=label, **options)
        grads = torch.autograd.grad(y, arguments, g)
        bounds.check_backward(grads, g, x, alpha, roundings=roundings, label=label, **options)
