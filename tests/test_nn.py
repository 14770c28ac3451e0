"""EMA, the layer: the function with a weight that is learned, saved, moved and copied as it is."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, signal
from torch import Tensor
from torch.func import functional_call, grad, vmap

from ema_ext import EMA, ema

HALVES = [torch.float16, torch.bfloat16]
PER_CHANNEL = torch.tensor([0.9, 0.1, 0.001], dtype=torch.float64)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_function(dtype: torch.dtype, learnable: bool) -> None:
    """Catches an alpha along the wrong dimension, a state or a dim that is not passed on."""
    x = signal(2, 3, 5, dtype=dtype)
    module = EMA(PER_CHANNEL, 3, learnable=learnable)
    assert torch.equal(module(x), ema(x, module.alpha[:, None]))
    y, state = module(x, signal(2, 3), True)
    want = ema(x, module.alpha[:, None], initial_state=signal(2, 3), return_state=True)
    assert torch.equal(y, want[0])
    assert torch.equal(state, want[1])
    module = EMA(PER_CHANNEL, 3, channel_dim=2, dim=0, learnable=learnable)
    assert torch.equal(module(x.transpose(1, 2)), ema(x.transpose(1, 2), module.alpha, dim=0))
    module = EMA(PER_CHANNEL, 3, channel_dim=0, dim=1, learnable=learnable)
    assert torch.equal(module(x[0]), ema(x[0], module.alpha[:, None]))
    module = EMA(0.3, dim=1, learnable=learnable)
    assert torch.equal(module(x), ema(x, module.alpha, dim=1))


@pytest.mark.parametrize("start", [1e-9, 1e-5, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_alpha_is_what_was_asked_for(start: float) -> None:
    """Catches a logit lost to rounding, and a sigmoid that is 1 where alpha is not."""
    fixed = EMA(start, learnable=False)
    assert fixed.alpha.shape == ()
    assert fixed.alpha.item() == start
    learned = EMA(start)
    # d alpha / d logit = alpha (1 - alpha), and the logit is rounded to float32
    rounding = abs(math.log(start / (1 - start))) * start * (1 - start) * 2.0**-23
    assert abs(learned.alpha.item() - start) <= rounding + 2.0**-50 * start
    assert learned.alpha.item() < 1
    wide = EMA(torch.full((2,), start, dtype=torch.float64), 2)
    assert wide.logit.dtype == torch.float64
    assert wide.alpha.shape == (2,)


def test_default_dtype_is_a_floor_of_float32() -> None:
    """Catches a logit made in a half type because the model's default is one."""
    before = torch.get_default_dtype()
    try:
        for default in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(default)
            assert EMA().logit.dtype == torch.promote_types(default, torch.float32)
            assert EMA(0.999, learnable=False).alpha.item() == 0.999
    finally:
        torch.set_default_dtype(before)


CASTS: dict[str, Callable[[EMA], EMA]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.bfloat16),
    "to another module's": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "in a model": lambda m: torch.nn.Sequential(m).half()[0],
    "there and back": lambda m: m.half().float(),
}


@pytest.mark.parametrize("start", [0.999, 0.5, 0.001])
@pytest.mark.parametrize("cast", CASTS)
def test_half_modules_keep_alpha(cast: str, start: float) -> None:
    """Catches 0.999 that becomes 1 in bfloat16, and a learned step too small for a half type."""
    for learnable in (False, True):
        module = EMA(start, learnable=learnable)
        before = module.alpha.item()
        assert CASTS[cast](module).alpha.item() == before
    module = CASTS[cast](EMA(start))
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    x = torch.ones(8, dtype=torch.float16)
    module(x, 0.0).float().sum().backward()
    optimizer.step()
    assert module.alpha.item() < start


def test_casts_that_are_followed() -> None:
    """Catches a module that stays float32 where float64 is asked for, or a gradient left."""
    module = EMA(0.3, 3)
    module(signal(3, 9)).sum().backward()
    for dtype in (torch.float64, torch.float32):
        module.to(dtype)
        assert module.logit.dtype == dtype
        assert module.logit.grad is not None
        assert module.logit.grad.dtype == dtype
    module.bfloat16()
    assert module.logit.grad.dtype == torch.float32
    assert EMA(0.3, 3).to("meta").alpha.is_meta
    assert EMA(0.3, 3, learnable=False).to("meta").alpha.is_meta


def test_learns_each_channel_alpha() -> None:
    """Catches a gradient that stops at the logit, or one shared by the channels."""
    x = signal(3, 400)
    target = ema(x, PER_CHANNEL[:, None])
    module = EMA(0.3, 3)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (module(x) - target).square().mean(-1).sum()
        loss.backward()
        optimizer.step()
    learned = module.alpha.detach()
    assert ((learned > 0) & (learned < 1)).all()
    assert learned.argsort().tolist() == [2, 1, 0]
    assert (learned - PER_CHANNEL)[:2].abs().max() < 0.01  # a tenth of the smaller of the two


def test_state_dict() -> None:
    """Catches alpha in neither, a float64 alpha saved in float32, and a load that changes none."""
    learned, fixed = EMA(0.25, 2), EMA(0.999, 2, learnable=False)
    assert list(learned.state_dict()) == ["logit"]
    assert list(fixed.state_dict()) == ["fixed_alpha"]
    assert [name for name, _ in learned.named_parameters()] == ["logit"]
    assert list(fixed.parameters()) == []
    for module in (learned, fixed):
        other = EMA(0.5, 2, learnable=module.learnable)
        other.load_state_dict(module.state_dict())
        assert torch.equal(other.alpha, module.alpha)
    with pytest.raises(RuntimeError, match="fixed_alpha"):
        learned.load_state_dict(fixed.state_dict())


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copier: Callable[[EMA], EMA], learnable: bool) -> None:
    """Catches an attribute that is not copied, and a copy that shares its weight."""
    module = EMA(PER_CHANNEL, 3, channel_dim=2, dim=1, learnable=learnable)
    other = copier(module)
    x = signal(2, 5, 3)
    assert torch.equal(other(x), module(x))
    assert repr(other) == repr(module)
    with torch.no_grad():
        next(iter(other.state_dict().values())).zero_()
    assert not torch.equal(other.alpha, module.alpha)


def test_repr() -> None:
    """Catches a repr that hides what the layer does, or that needs values where there are none."""
    assert repr(EMA(0.1)) == "EMA(alpha=0.1, dim=-1, learnable=True)"
    assert repr(EMA(PER_CHANNEL, 3, dim=-2, channel_dim=1, learnable=False)) == (
        "EMA(alpha=0.001 to 0.9, num_channels=3, channel_dim=1, dim=-2, learnable=False)"
    )
    with torch.device("meta"):
        assert repr(EMA(0.1, 2)).startswith("EMA(alpha=?, num_channels=2, channel_dim=-2,")


def test_start_is_copied() -> None:
    """Catches training that writes into the tensor given, and a graph through it."""
    start = PER_CHANNEL.clone().requires_grad_()
    for learnable in (False, True):
        module = EMA(start, 3, learnable=learnable)
        with torch.no_grad():
            next(iter(module.state_dict().values())).fill_(0.5)
        assert torch.equal(start, PER_CHANNEL)
        assert module.fixed_alpha.grad_fn is None if not learnable else module.logit.is_leaf


def test_func_transforms() -> None:
    """Catches a module that torch.func cannot call: gradients of several weights at once."""
    module = EMA(0.3, 3)
    x = signal(3, 7)

    def loss(logit: Tensor) -> Tensor:
        result: Tensor = functional_call(module, {"logit": logit}, (x,)).square().sum()
        return result

    logits = signal(4, 3, seed=1)
    each = torch.stack([grad(loss)(logit) for logit in logits])
    assert torch.equal(vmap(grad(loss))(logits), each)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_streaming_one_sample_at_a_time(dtype: torch.dtype) -> None:
    """Catches a state rounded to a half type on its way through the layer."""
    module = EMA(torch.tensor([0.001, 0.5]), 2).to(dtype)
    x = torch.ones(2, 3000, dtype=dtype)
    state: Any = 0.0
    for sample in x.split(1, dim=1):
        y, state = module(sample, state, return_state=True)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    # 1 - 0.999^3000 = .9503; each step rounds three times to float32
    want = 1 - (1 - module.alpha.detach()) ** 3000
    assert ((state - want).abs() <= 3 * 3000 * 2.0**-24).all()


CONSTRUCTION: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "0 learnable": ({"alpha": 0.0}, ValueError, r"alpha must lie strictly inside \(0, 1\).* 0$"),
    "1 learnable": ({"alpha": 1}, ValueError, r"alpha must lie strictly inside \(0, 1\).* 1$"),
    "NaN": ({"alpha": math.nan}, ValueError, r"alpha must lie strictly .*nan"),
    "beyond": ({"alpha": 1.5, "learnable": False}, ValueError, r"alpha .* \[0, 1\], got 1.5"),
    "below": ({"alpha": -0.5, "learnable": False}, ValueError, r"alpha .* \[0, 1\], got -0.5"),
    "one channel at 1": (
        {"alpha": torch.tensor([0.5, 1.0]), "num_channels": 2},
        ValueError,
        r"alpha must lie strictly inside \(0, 1\) to be learnable, got 0.5 to 1",
    ),
    "one channel NaN": (
        {"alpha": torch.tensor([0.5, math.nan]), "num_channels": 2, "learnable": False},
        ValueError,
        r"alpha must lie in \[0, 1\], got nan",
    ),
    "shape": (
        {"alpha": torch.full((2,), 0.5), "num_channels": 3},
        ValueError,
        r"alpha must be a float or of shape \(3,\), got \(2,\)",
    ),
    "shape without num_channels": (
        {"alpha": torch.full((2,), 0.5)},
        ValueError,
        r"alpha must be a float or of shape \(\), got \(2,\)",
    ),
    "integer tensor": ({"alpha": torch.tensor(1)}, TypeError, "alpha .* got torch.int64"),
    "complex tensor": ({"alpha": torch.tensor(1j)}, TypeError, "alpha .* got torch.complex64"),
    "bool": ({"alpha": True}, TypeError, "alpha must be a float or a torch.Tensor, got bool"),
    "None": ({"alpha": None}, TypeError, "alpha must be a float or a torch.Tensor, got NoneType"),
    "num_channels": ({"num_channels": 0}, ValueError, "num_channels must be at least 1, got 0"),
    "num_channels float": ({"num_channels": 3.0}, TypeError, "num_channels .* int, got float"),
    "dim": ({"dim": "time"}, TypeError, "dim must be an int, got str"),
    "channel_dim": ({"channel_dim": None}, TypeError, "channel_dim must be an int, got NoneType"),
    "same dimension": (
        {"num_channels": 3, "dim": -2},
        ValueError,
        "channel_dim and dim must differ, got -2 for both",
    ),
}


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_refused_at_construction(case: str) -> None:
    """Catches a wrong argument that is found out by the first call, or never."""
    arguments, error, message = CONSTRUCTION[case]
    with pytest.raises(error, match=message):
        EMA(**arguments)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_ends_of_the_interval_without_learning(alpha: float) -> None:
    """Catches a limit meant for the logit applied to a fixed alpha."""
    x = signal(3, 4)
    assert torch.equal(EMA(alpha, learnable=False)(x), ema(x, alpha))


CALLS: dict[str, tuple[dict[str, Any], tuple[int, ...], type[Exception], str]] = {
    "channels": ({}, (2, 4, 5), ValueError, "x of shape (2, 4, 5) has 4 channels along channel_dim"
                 " -2, but num_channels is 3"),
    "one channel": ({}, (2, 1, 5), ValueError, "has 1 channels along channel_dim -2, but num_"),
    "no channels": ({}, (5,), IndexError, "channel_dim out of range (expected to be in range of "
                    "[-1, 0], but got -2)"),
    "same dimension": ({"channel_dim": 0}, (3,), ValueError, "channel_dim 0 and dim -1 are the same"
                       " dimension of x, of shape (3,)"),
    "no such time": ({"dim": 3}, (2, 3, 5), IndexError, "dim out of range (expected to be in range "
                     "of [-3, 2], but got 3)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_refused_at_the_call(case: str) -> None:
    """Catches an x that broadcasts against alpha by accident: one channel, or time for channels."""
    options, shape, error, message = CALLS[case]
    with pytest.raises(error, match=re.escape(message)):
        EMA(0.5, 3, **options)(torch.zeros(shape))


def test_input_errors_are_those_of_the_function() -> None:
    """Catches an x looked at by the layer before the function can name what is wrong with it."""
    for x in ([1.0], torch.zeros(2, 3, 5, dtype=torch.int64), torch.zeros(())):
        for module in (EMA(0.5, 3), EMA(0.5)):
            with pytest.raises((TypeError, ValueError, IndexError), match=r"x must|channel_dim"):
                module(x)
