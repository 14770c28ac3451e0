"""Bitwise the same from run to run and for any number of threads: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import DTYPES, signal
from torch import Tensor

from ema_ext import ema


@pytest.fixture(autouse=True)
def _restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def everything(x: Tensor, dim: int, learned: bool) -> list[Tensor]:
    """y, the state, and the gradients to all arguments."""
    x = x.detach().requires_grad_()
    alpha = torch.full([], 0.01, requires_grad=learned) if learned else 0.01
    y, state = ema(x, alpha, dim=dim, return_state=True)
    inputs = [x, alpha] if isinstance(alpha, Tensor) else [x]
    return [y, state, *torch.autograd.grad(y.float().square().sum() + state.sum(), inputs)]


def same_bits(compute: Callable[[], list[Tensor]]) -> bool:
    """Whether it computes the same with any number of threads, and once more with one."""
    torch.set_num_threads(1)
    expected = compute()
    for threads in (2, 3, 8, 1):
        torch.set_num_threads(threads)
        if not all(map(torch.equal, compute(), expected)):
            return False
    return True


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "dim"), [((2_000_003,), 0), ((3, 300_001), 1), ((4099, 70), 1), ((5000, 130), 0)]
)
def test_any_number_of_threads(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype, learned: bool
) -> None:
    """Catches a cut in time, or an order of sums, that follows the number of threads."""
    x = signal(*shape, dtype=dtype)
    assert same_bits(lambda: everything(x, dim, learned))


def test_what_follows_the_threads_is_found() -> None:
    """Catches a comparison that cannot fail: planted are rows cut by the number of threads, each
    piece the right continuation of the one before, and a result that is never twice the same.
    """
    x = signal(5, 30_011, dtype=torch.float32)

    def cut_by_threads() -> list[Tensor]:
        pieces, state = [], None
        for piece in x.chunk(torch.get_num_threads(), 1):
            y, state = ema(piece, 0.01, initial_state=state, return_state=True)
            pieces.append(y)
        return [torch.cat(pieces, 1)]

    calls = iter(range(99))
    assert not same_bits(cut_by_threads)
    assert not same_bits(lambda: [x[0] + 1e-7 * next(calls)])
