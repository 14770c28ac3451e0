"""smoothing_factor: pandas' formulas, no digits lost at either end, wrong calls refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from ema_ext import ema, smoothing_factor

EPS = 2.0**-52
NAMES = ("span", "com", "halflife", "time_constant")

#: keyword: its value, and alpha by the formulas of pandas.DataFrame.ewm (the last: RC filter)
FORMULAS = {
    "span": (9.0, 0.2),
    "com": (4.0, 0.2),
    "halflife": (2.0, 1 - math.sqrt(0.5)),
    "time_constant": (2.0, 1 - math.exp(-0.5)),
}


@pytest.mark.parametrize("name", NAMES)
def test_formulas(name: str) -> None:
    """Catches one keyword taken for another, or a float where a tensor is due."""
    value, alpha = FORMULAS[name]
    got = smoothing_factor(**{name: value})
    assert type(got) is float
    assert got == pytest.approx(alpha, rel=4 * EPS)  # the formula here subtracts: 4 roundings
    for given in (np.float64(value), int(value)):
        assert smoothing_factor(**{name: given}) == got
    several = smoothing_factor(**{name: torch.tensor([[value], [value]]).double()})
    assert isinstance(several, torch.Tensor)
    assert several.shape == (2, 1)
    torch.testing.assert_close(several, torch.full_like(several, got), rtol=2 * EPS, atol=0)


def test_dt_scales_time() -> None:
    """Catches dt that multiplies where it divides: only dt / halflife counts."""
    assert smoothing_factor(halflife=4, dt=8) == 0.75
    assert smoothing_factor(halflife=8, dt=4) == smoothing_factor(halflife=2)
    assert smoothing_factor(time_constant=8, dt=4) == smoothing_factor(time_constant=2)


@pytest.mark.parametrize("name", ["halflife", "time_constant"])
def test_both_ends_of_dt(name: str) -> None:
    """Catches 1 - exp(-x), which is 0 for a dt of 1e-17, an alpha above 1, and NaN at 0 or inf."""
    rate = math.log(2) if name == "halflife" else 1.0
    dts = [0.0, 1e-300, 1e-17, 1e-9, 1e3, 1e308, math.inf]
    # by the series of 1 - exp(-x), whose next term is x^3 / 6
    wanted = [x - x * x / 2 for x in (rate * dt for dt in dts[:4])] + [1.0, 1.0, 1.0]
    floats = [smoothing_factor(**{name: 1.0}, dt=dt) for dt in dts]
    tensor = smoothing_factor(**{name: 1.0}, dt=torch.tensor(dts, dtype=torch.float64))
    assert isinstance(tensor, torch.Tensor)
    for got in (floats, tensor.tolist()):
        # a quotient, a product, expm1 to an ulp
        assert got == pytest.approx(wanted, rel=4 * EPS)
        assert got[4:] == [1.0, 1.0, 1.0]


def test_gradients() -> None:
    """Catches a detached parameter; dt = 0 and a dt that leaves nothing must not give NaN."""
    positive = torch.tensor([0.5, 2.0, 30.0], dtype=torch.float64, requires_grad=True)
    dt = torch.tensor([0.0, 1.0, 700.0], dtype=torch.float64, requires_grad=True)
    for name in ("halflife", "time_constant"):
        assert gradcheck(
            lambda p, t, name=name: smoothing_factor(**{name: p}, dt=t), [positive, dt]
        )
    for name in ("span", "com"):
        assert gradcheck(lambda p, name=name: smoothing_factor(**{name: p + 1}), [positive])
    alpha = smoothing_factor(halflife=positive[0], dt=torch.tensor([0.0, 1e6]).double())
    (grad,) = torch.autograd.grad(alpha.sum(), positive)
    assert grad.tolist() == [0.0, 0.0, 0.0]


def test_dtypes() -> None:
    """Catches timestamps refused for being integers, and a float64 dt narrowed."""
    ticks = torch.tensor([0, 4, 8])
    assert smoothing_factor(halflife=4, dt=ticks).tolist() == [0.0, 0.5, 0.75]
    assert smoothing_factor(halflife=4, dt=ticks.double()).dtype == torch.float64
    assert smoothing_factor(span=torch.tensor(3)).item() == 0.5


def test_published_numbers_of_irregular_steps() -> None:
    """Catches dt taken for the time to the next sample. The numbers are polars' ewm_mean_by."""
    days = torch.tensor([0.0, 2.0, 9.0, 16.0], dtype=torch.float64)
    alpha = smoothing_factor(halflife=4.0, dt=days.diff(prepend=days[:1]))
    y = ema(torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64), alpha)
    want = torch.tensor([0, 0.292893, 1.492474, 3.254508], dtype=torch.float64)
    torch.testing.assert_close(y, want, rtol=0, atol=5e-7)  # as they are printed


def test_learned_halflife_reaches_ema() -> None:
    """Catches a result that ema takes only by its value: the whole chain is differentiable."""
    halflife = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    x = torch.arange(1.0, 7.0, dtype=torch.float64)
    assert gradcheck(lambda h: ema(x, smoothing_factor(halflife=h)), [halflife])


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "none": ({}, ValueError, "exactly one of span, com, halflife, .*got none of them"),
    "two": ({"span": 3, "com": 1}, ValueError, "exactly one of .*, got span, com"),
    "tensors too": (
        {"halflife": torch.ones(2), "time_constant": torch.ones(2)},
        ValueError,
        "exactly one of .*, got halflife, time_constant",
    ),
    "span": ({"span": 0.5}, ValueError, "span must be >= 1, got 0.5"),
    "com": ({"com": -1}, ValueError, "com must be >= 0, got -1"),
    "halflife": ({"halflife": 0}, ValueError, "halflife must be > 0, got 0"),
    "time_constant": ({"time_constant": 0.0}, ValueError, "time_constant must be > 0, got 0"),
    "negative": ({"halflife": -2.5}, ValueError, "halflife must be > 0, got -2.5"),
    "NaN": ({"span": math.nan}, ValueError, "span must be >= 1, got nan"),
    "dt": ({"halflife": 1, "dt": -1}, ValueError, "dt must be >= 0, got -1"),
    "dt NaN": ({"halflife": 1, "dt": math.nan}, ValueError, "dt must be >= 0, got nan"),
    "dt with span": ({"span": 3, "dt": 2}, ValueError, "dt applies to .*, got 2 with span"),
    "dt with com": (
        {"com": 3, "dt": torch.ones(1)},
        ValueError,
        r"dt applies to .*, got a tensor with com",
    ),
    "bool": ({"span": True}, TypeError, "span must be a float or a torch.Tensor, got bool"),
    "str": ({"halflife": "4d"}, TypeError, "halflife must be a float or .*, got str"),
    "complex": ({"com": 1j}, TypeError, "com must be a float or a torch.Tensor, got complex"),
    "dt None": ({"com": 1, "dt": None}, TypeError, "dt must be a float or .*, got NoneType"),
    "bool tensor": ({"span": torch.tensor(True)}, TypeError, "span must be real, got torch.bool"),
    "complex tensor": ({"com": torch.tensor(1j)}, TypeError, "com must be real, got torch.complex"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_refused(case: str) -> None:
    """Catches a wrong call that gets a number; the message names the argument and both values."""
    arguments, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        smoothing_factor(**arguments)


def test_limits_themselves() -> None:
    """Catches a bound that is exclusive where it is not: span 1 and com 0 mean no smoothing."""
    assert smoothing_factor(span=1) == 1.0
    assert smoothing_factor(com=0) == 1.0
    # Tensor values are not looked at, which would wait for a GPU.
    assert smoothing_factor(span=torch.tensor([0.0])).tolist() == [2.0]


def test_positional_arguments_are_refused() -> None:
    """Catches smoothing_factor(20), which does not say of what."""
    with pytest.raises(TypeError):
        smoothing_factor(20)  # type: ignore[misc]
