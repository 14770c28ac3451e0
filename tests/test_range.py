"""Values at the ends of the dtype's range, wherever they stand, and outputs beyond the caches."""

from __future__ import annotations

import backends
import bounds
import pytest
import torch
from cases import signal

from ema_ext import ema

HUGE = {torch.float32: 1e38, torch.float64: 1e300}

#: From fast decay to faster than the powers of a vector's length can say.
STEEP = torch.tensor([0.9, 0.95, 0.97, 0.987, 0.9985, 0.9995, 0.9998, 0.99999])[:, None]


@pytest.mark.parametrize("dtype", HUGE, ids=str)
@pytest.mark.parametrize("position", [1, 5, 8, 9, 16, 20, 33, 63])
def test_large_sample_anywhere_in_a_tile(position: int, dtype: torch.dtype) -> None:
    """Catches a power that underflows between vectors of a tile: the tail would end too soon."""
    x = torch.zeros(len(STEEP), 200, dtype=dtype)
    x[:, position] = HUGE[dtype]
    for reverse in (False, True):
        y = ema(x, STEEP, reverse=reverse)
        bounds.check_forward(y, x, STEEP, reverse=reverse, label="large sample")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [64, 75])
def test_streamed_lanes(channels: int, dtype: torch.dtype) -> None:
    """Catches lanes whose stores past the caches miss or are left out at some level."""
    x = signal(4, 16384, channels).to(dtype)
    some = torch.tensor([0, 1, 31, 32, 63, channels - 1])
    for reverse in (False, True):
        y = ema(x, 0.3, dim=1, reverse=reverse)
        assert y.nbytes > 8 << 20
        for batch in (0, 3):
            got, given = y[batch][:, some], x[batch][:, some]
            bounds.check_forward(got, given, 0.3, dim=0, reverse=reverse, label="streamed lanes")


@pytest.mark.skipif(
    backends.cuda_kernels, reason="a documented limit of the CUDA kernels: docs/cuda.md"
)
def test_sums_that_overflow_only_by_their_parts() -> None:
    """Catches infinities that a tile scanned from zero makes and nobody takes back."""
    b = torch.zeros(64)
    b[:2] = 2e38
    start = torch.tensor(-3e38)
    y = torch.ops.ema_ext.linear_recurrence(torch.tensor(1.0), b, start, 0, False)
    expected = start.double() + b.double().cumsum(0)
    bounds.assert_within(y, expected, bounds.unit(torch.float32) * 8 * 7e38, "overflow")


@pytest.mark.parametrize("state", [0.1, 1e39])
def test_a_gradient_does_not_change_the_state(state: float) -> None:
    """Catches a float64 state that enters rounded with a gradient and unrounded without."""
    x = signal(3, 50).float()
    s = torch.tensor(state, dtype=torch.float64)
    assert torch.equal(ema(x, 0.1, initial_state=s), ema(x.requires_grad_(), 0.1, initial_state=s))


def test_meta_companion_of_a_real_tensor() -> None:
    """Catches a registered operator that returns uninitialised memory for it."""
    with pytest.raises(RuntimeError, match=r"cpu.*meta|meta"):
        torch.ops.ema_ext.ema.Tensor(
            torch.rand(3, 4), torch.rand(3, 1, device="meta"), None, 1, False
        )


@pytest.mark.parametrize("alpha", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_samples_and_states(dtype: torch.dtype, alpha: float) -> None:
    """Catches a scan that overflows on its way to a gradient or an average that does not."""
    x = torch.zeros(2, 4096, dtype=dtype, requires_grad=True)
    y, state = ema(x, alpha, return_state=True)
    (grad,) = torch.autograd.grad(
        [y, state], x, [torch.zeros_like(y), torch.full_like(state, 2e37)]
    )
    assert grad.isfinite().all()
    wanted = 2e37 * alpha * (1 - alpha) ** torch.arange(3, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(grad[:, -4:].double(), wanted.expand(2, 4), rtol=1e-2, atol=0)
    largest = torch.full_like(x, 0.9 * torch.finfo(dtype).max).detach()
    bounds.check_forward(ema(largest, alpha), largest, alpha)
