"""Rows that are cut in time, outputs that pass the caches, and outputs on huge pages.

From two segments of 65536 samples on a row is cut; from 8 MiB on outputs are streamed past the
caches; from 32 MiB on they are put on huge pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import bounds
import oracle
import pytest
import torch
from cases import DTYPES, signal
from torch import Tensor

from ema_ext import ema

FLOATS = (torch.float32, torch.float64)
SEGMENT = 65536
LENGTHS = (2 * SEGMENT - 1, 2 * SEGMENT, 2 * SEGMENT + 1, 3 * SEGMENT - 1, 3 * SEGMENT + 1)


@pytest.fixture(autouse=True)
def _restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """5 + normal noise, made in float32: quick."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).add_(5).to(dtype)


def everything(x: Tensor, alpha: Tensor, s: Tensor | None, reverse: bool) -> list[Tensor]:
    """y, the state and all gradients."""
    inputs = [t.detach().requires_grad_() for t in (x, alpha, s) if t is not None]
    y, state = ema(
        *inputs[:2], initial_state=(*inputs, None)[2], reverse=reverse, return_state=True
    )
    grads = (noise(*x.shape, dtype=x.dtype, seed=5), torch.ones_like(state))
    return [y, state, *torch.autograd.grad([y, state], inputs, grads)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("gathered", [False, True])
def test_cut_rows_for_any_number_of_threads(gathered: bool, rows: int, dtype: torch.dtype) -> None:
    """Catches a fold, a tail or a fused product that differs where segments run apart."""
    alpha = torch.tensor([[1e-5], [0.01], [0.7]], dtype=torch.float64)[:rows]
    for length, reverse in zip(LENGTHS, (False, True, False, True, False), strict=True):
        x = noise(rows, length, dtype=dtype)
        if gathered:
            x = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
        s = signal(rows, seed=1) if reverse else None
        torch.set_num_threads(1)
        expected = everything(x, alpha, s, reverse)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for got, want in zip(everything(x, alpha, s, reverse), expected, strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_cut_rows_are_right(dtype: torch.dtype) -> None:
    """Catches a carry between segments that is lost, late, or kept without its rounding error."""
    length = 3 * SEGMENT - 1
    alpha = torch.tensor([[1e-5], [1e-3], [0.3]], dtype=torch.float64, requires_grad=True)
    x = noise(3, length, dtype=dtype).requires_grad_()
    s = signal(3, seed=1).requires_grad_()
    grad_y = signal(3, length, dtype=dtype, seed=2)
    for reverse in (False, True):
        y = ema(x, alpha, initial_state=s, reverse=reverse)
        options = {"initial_state": s, "reverse": reverse, "label": "cut"}
        bounds.check_forward(y, x, alpha, **options)
        grads = torch.autograd.grad(y, (x, alpha, s), grad_y)
        bounds.check_backward(grads, grad_y, x, alpha, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tail_across_segments(dtype: torch.dtype) -> None:
    """Catches rounding errors of one segment's large samples in the next: zeros must stay small."""
    x = torch.zeros(2, 2 * SEGMENT + 100, dtype=dtype)
    x[0, SEGMENT - 1000] = 1e30 if dtype != torch.float16 else 6e4
    x[1, SEGMENT - 5 : SEGMENT] = 1
    alpha = torch.tensor([[0.05], [0.5]])
    bounds.check_forward(ema(x, alpha), x, alpha, label="cut, tail")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ten_million_samples(dtype: torch.dtype) -> None:
    """Catches an error that grows with the length; huge pages and streamed stores as well."""
    x = noise(10_000_000, dtype=dtype)
    y, state = ema(x, 1e-5, return_state=True)
    expected = oracle.ema(x, 1e-5)
    bounds.assert_within(y, expected, bounds.row_bound(expected, dtype), "ten million y by row")
    assert state == y[-1]


# Large outputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_streamed_outputs(skipped: int, dtype: torch.dtype) -> None:
    """Catches an aligned or a streamed store to rows that start anywhere, in either direction."""
    length = 1000 + skipped
    x = noise(5000, length, dtype=dtype)[:, skipped:]
    some = torch.tensor([0, 1, 2, 1111, 4998, 4999])
    for reverse in (False, True):
        y = ema(x, 0.01, reverse=reverse)
        assert y.nbytes > 8 << 20
        assert y.stride() == torch.empty_like(x).stride()
        bounds.check_forward(y[some], x[some], 0.01, reverse=reverse, label="streamed")
        parts = torch.cat([ema(part, 0.01, reverse=reverse) for part in x.split(500)])
        assert torch.equal(y, parts)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("skipped", [0, 1])
def test_outputs_on_huge_pages(skipped: int, reverse: bool) -> None:
    """Catches pages advised beyond the output's ends, and a gap between streamed stretches."""
    x = noise(9_000_001)[skipped:].requires_grad_()
    y = ema(x, 0.3, reverse=reverse)
    assert y.nbytes > 32 << 20
    # stretches by themselves: what lies 200 samples from a cut weighs 0.7 ** 200 < 1e-30
    for begin in (0, 4_000_000, len(x) - 10_000):
        part = x.detach()[begin : begin + 10_000]
        inner = slice(0 if begin == 0 else 200, 10_000 if begin > 4_000_000 else 9_800)
        expected = oracle.ema(part, 0.3, reverse=reverse)[inner]
        bound = bounds.pointwise_bound(part, 0.3, reverse=reverse)[inner]
        bounds.assert_within(y.detach()[begin : begin + 10_000][inner], expected, bound, "huge")
    (grad_x,) = torch.autograd.grad(y.sum(), x)
    # each sample's weights sum to 1 but near the last sample; the start's sum is 1 / 0.3
    middle = grad_x[200:-200]
    assert ((middle - 1).abs() <= 16 * torch.finfo(torch.float32).eps).all()


# Non-finite samples in long rows


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_bad_sample_early_in_ten_million(bad: float) -> None:
    """Catches an infinity that becomes NaN, or is forgotten, within 152 segments."""
    clean = noise(10_000_000)
    x = clean.clone()
    x[5] = bad
    y = ema(x, 1e-3)
    assert torch.equal(y[:5], ema(clean, 1e-3)[:5])
    assert y[5:].isnan().all() if math.isnan(bad) else (y[5:] == bad).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("threads", [1, 2])
def test_bad_sample_at_the_edge_of_a_segment(threads: int, bad: float, dtype: torch.dtype) -> None:
    """Catches a row redone from the wrong sample; what comes before stays bit for bit."""
    torch.set_num_threads(threads)
    clean = noise(2, 2 * SEGMENT + 77, dtype=dtype)
    for where in (SEGMENT - 1, SEGMENT, 2 * SEGMENT, 2 * SEGMENT + 76):
        for alpha in (0.001, 0.9999):
            for reverse in (False, True):
                x = clean.clone()
                at = x.shape[1] - 1 - where if reverse else where
                x[0, at] = bad
                y, undisturbed = ema(x, alpha, reverse=reverse), ema(clean, alpha, reverse=reverse)
                if reverse:
                    y, undisturbed = y.flip(1), undisturbed.flip(1)
                after = y[0, where:]
                assert after.isnan().all() if math.isnan(bad) else (after == bad).all()
                assert torch.equal(y[0, :where], undisturbed[0, :where])
                assert torch.equal(y[1], undisturbed[1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("alpha", [1e-4, 0.3, 0.9999])
def test_opposite_infinities_in_a_cut_row(alpha: float, dtype: torch.dtype) -> None:
    """Catches an infinity that outlives the opposite one: the loop gives NaN from there on."""
    clean = noise(2 * SEGMENT + 1000, dtype=dtype)
    x = clean.clone()
    first, second = SEGMENT - 3, SEGMENT + 20_000
    x[first], x[second] = -math.inf, math.inf
    y = ema(x, alpha)
    assert torch.equal(y[:first], ema(clean, alpha)[:first])
    assert (y[first:second] == -math.inf).all()
    assert y[second:].isnan().all()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_bad_initial_state_of_a_cut_row(bad: float) -> None:
    """Catches a state whose infinity turns into NaN in the first carry."""
    x = noise(2, 2 * SEGMENT + 1)
    y, state = ema(x, 0.01, initial_state=torch.tensor([1.0, bad]), return_state=True)
    for values in (y[1], state[1:]):
        assert values.isnan().all() if math.isnan(bad) else (values == bad).all()
    assert torch.equal(y[0], ema(x, 0.01, initial_state=1.0)[0])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("where", [5, SEGMENT, 2 * SEGMENT + 4])
def test_bad_gradient_of_a_cut_row(where: int, bad: float) -> None:
    """Catches the same in the backward: only earlier samples see it, and alpha, and the state."""
    x = noise(2 * SEGMENT + 5).requires_grad_()
    alpha = torch.tensor(0.1, requires_grad=True)
    s = torch.tensor(1.0, requires_grad=True)
    clean = noise(*x.shape, seed=1)
    grad_y = clean.clone()
    grad_y[where] = bad
    y = ema(x, alpha, initial_state=s)
    grad_x, grad_alpha, grad_s = torch.autograd.grad(y, (x, alpha, s), grad_y, retain_graph=True)
    undisturbed = torch.autograd.grad(y, x, clean)[0]
    assert torch.equal(grad_x[where + 1 :], undisturbed[where + 1 :])
    before = torch.cat([grad_x[: where + 1], grad_s[None]])
    assert before.isnan().all() if math.isnan(bad) else (before == bad).all()
    assert not grad_alpha.isfinite()


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_shortest_row_that_is_cut(extra: int) -> None:
    """Catches constants of the cut that are missing where a row has just two segments."""
    x = 1 + signal(2 * 65_536 + extra, dtype=torch.float32)
    threads = torch.get_num_threads()
    for used in (1, 2):
        torch.set_num_threads(used)
        bounds.check_forward(ema(x, 1e-5), x, 1e-5, label="two segments")
    torch.set_num_threads(threads)
