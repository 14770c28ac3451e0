"""initial_state and return_state: a series in chunks is the series as a whole."""

from __future__ import annotations

import bounds
import pytest
import torch
from cases import DTYPES, signal

from ema_ext import ema


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("state_shape", [None, (), (4,), (3, 4), (3, 1)])
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
def test_initial_state(
    state_shape: tuple[int, ...] | None, state_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Catches a state that skips the first sample, meets the wrong row, or changes the dtype."""
    x = signal(3, 4, 65, dtype=dtype)
    s = 2.5 if state_shape is None else signal(*state_shape, dtype=state_dtype, seed=1)
    for alpha in (0.1, torch.tensor(0.1, dtype=dtype)):
        y = ema(x, alpha, initial_state=s)
        assert y.dtype == dtype
        bounds.check_forward(y, x, alpha, initial_state=s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_returned_state(dim: int, reverse: bool, dtype: torch.dtype) -> None:
    """Catches the state of the wrong end, of the wrong shape, or rounded to a half type."""
    x = signal(5, 6, 7, dtype=dtype)
    for alpha in (0.1, torch.tensor(0.1)):
        y, state = ema(x, alpha, dim=dim, reverse=reverse, return_state=True)
        assert torch.equal(y, ema(x, alpha, dim=dim, reverse=reverse))
        last = y.select(dim, 0 if reverse else -1)
        assert state.shape == last.shape
        assert state.dtype == bounds.accumulate_dtype(dtype)
        assert torch.equal(state.to(dtype), last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", [1e-4, 0.1])
def test_split_anywhere_handing_on_the_last_output(alpha: float, dtype: torch.dtype) -> None:
    """Catches a first sample treated as a start though a state was given."""
    x = 3 + signal(2, 40, dtype=dtype)
    for cut in range(1, 40):
        head = ema(x[:, :cut], alpha)
        tail = ema(x[:, cut:], alpha, initial_state=head[:, -1])
        bounds.check_forward(torch.cat([head, tail], 1), x, alpha, label="two chunks")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_split_anywhere_handing_on_the_state(reverse: bool, dtype: torch.dtype) -> None:
    """Catches a state that is not what initial_state takes: an empty chunk must hand it on too."""
    x = 3 + signal(2, 40, dtype=dtype)
    for cut in range(1, 41):
        pieces = [x[:, :cut], x[:, cut:cut], x[:, cut:]]
        state, outputs = None, []
        for piece in reversed(pieces) if reverse else pieces:
            if piece.numel() or state is not None:
                y, state = ema(piece, 0.1, initial_state=state, reverse=reverse, return_state=True)
                outputs.append(y)
        whole = torch.cat(outputs[::-1] if reverse else outputs, 1)
        bounds.check_forward(whole, x, 0.1, reverse=reverse, label="chunks")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_streaming_half_precision_does_not_stall(dtype: torch.dtype) -> None:
    """Catches a state rounded to half: a bfloat16 one of ones from 0 stops at 0.25."""
    steps, alpha = 4000, 0.001
    state: float | torch.Tensor = 0.0
    outputs = []
    one = torch.ones(1, dtype=dtype)
    for _ in range(steps):
        y, state = ema(one, alpha, initial_state=state, return_state=True)
        outputs.append(y)
    bounds.check_forward(
        torch.cat(outputs),
        one.expand(steps),
        alpha,
        initial_state=0.0,
        roundings=bounds.LOOP,
        label="streaming",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_series(dtype: torch.dtype) -> None:
    """Catches an error, or a state made up, where there is no sample; rows may be missing too."""
    x = torch.empty(3, 0, dtype=dtype)
    assert ema(x, 0.5).shape == (3, 0)
    assert ema(x, torch.tensor(0.5)).shape == (3, 0)
    assert ema(x, 0.5, initial_state=1.0).shape == (3, 0)
    for alpha in (0.5, torch.tensor(0.5)):
        s = signal(3, dtype=dtype)
        y, state = ema(x, alpha, initial_state=s, return_state=True)
        assert y.shape == (3, 0)
        assert torch.equal(state, s.to(bounds.accumulate_dtype(dtype)))
        assert state.data_ptr() != s.data_ptr()
        assert ema(x, alpha, dim=0).shape == (3, 0)
        y, state = ema(x, alpha, dim=0, return_state=True)
        assert y.shape == (3, 0)
        assert state.shape == (0,)
