"""The weight of a new sample from the ways in which users state how much to smooth."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

#: keyword -> the smallest value that it takes, and whether that one is excluded
_LIMITS = {
    "span": (1.0, False),
    "com": (0.0, False),
    "halflife": (0.0, True),
    "time_constant": (0.0, True),
}


def smoothing_factor(
    *,
    span: float | Tensor | None = None,
    com: float | Tensor | None = None,
    halflife: float | Tensor | None = None,
    time_constant: float | Tensor | None = None,
    dt: float | Tensor = 1.0,
) -> float | Tensor:
    r"""The ``alpha`` of :func:`ema` from exactly one of four other parameters.

    =================  ==========================================  ==============
    span               :math:`2 / (span + 1)`                      span >= 1
    com                :math:`1 / (1 + com)`, the centre of mass   com >= 0
    halflife           :math:`1 - 2^{-dt / halflife}`              halflife > 0
    time_constant      :math:`1 - e^{-dt / time\_constant}`        time_constant > 0
    =================  ==========================================  ==============

    The first three are those of ``pandas.DataFrame.ewm``, whose documentation gives the formulas
    for dt = 1; ``time_constant`` is that of an RC low-pass filter sampled exactly. The last two
    lose no digits where dt is much smaller than they are.

    Args:
        span, com: in samples.
        halflife: after which the weight of a sample is a half, in the unit of dt.
        time_constant: after which the weight of a sample is 1/e, in the unit of dt.
        dt: the time since the sample before, for halflife and time_constant. For an irregular
            series, a tensor of the differences of its timestamps: the result is then one alpha
            per step. 0 gives alpha = 0.

    Each is a number or a tensor; tensors broadcast, are differentiable, and may hold integers.

    Returns:
        A float if all arguments are numbers; otherwise a tensor of their broadcast shape and
        promoted dtype (the default dtype for integers).

    Raises:
        TypeError: an argument is neither a real number nor a real tensor.
        ValueError: not exactly one of the four is given; it is a number beyond its limit; dt is a
            number below 0, or is given with span or com. The values of tensors are not checked.

    Example:
        >>> smoothing_factor(span=3)
        0.5
        >>> smoothing_factor(halflife=4.0, dt=torch.tensor([0.0, 4.0, 8.0]))
        tensor([0.0000, 0.5000, 0.7500])
    """
    candidates = {"span": span, "com": com, "halflife": halflife, "time_constant": time_constant}
    given = {name: value for name, value in candidates.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"exactly one of {', '.join(candidates)} must be given, "
            f"got {', '.join(given) or 'none of them'}"
        )
    ((name, parameter),) = given.items()
    value = _at_least(name, parameter, *_LIMITS[name])
    step = _at_least("dt", dt, 0.0, False)
    if name in ("span", "com"):
        if isinstance(step, Tensor) or step != 1.0:
            got = "a tensor" if isinstance(step, Tensor) else f"{step:g}"
            raise ValueError(
                f"dt applies to halflife and time_constant only, got {got} with {name}"
            )
        return 2.0 / (value + 1.0) if name == "span" else 1.0 / (1.0 + value)
    rate = -math.log(2.0) if name == "halflife" else -1.0
    exponent = rate * (step / value)
    return -torch.expm1(exponent) if isinstance(exponent, Tensor) else -math.expm1(exponent)


def number_or_tensor(name: str, value: Any) -> float | Tensor:
    """``value`` as a float or a real tensor of numbers."""
    if isinstance(value, Tensor):
        if value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"{name} must be real, got {value.dtype}")
        return value
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{name} must be a float or a torch.Tensor, got {type(value).__name__}")


def _at_least(name: str, value: Any, least: float, excluded: bool) -> float | Tensor:
    """``value`` as a float or tensor; a float beyond the limit, or NaN, raises ValueError."""
    checked = number_or_tensor(name, value)
    if isinstance(checked, float) and not (checked > least if excluded else checked >= least):
        raise ValueError(f"{name} must be {'>' if excluded else '>='} {least:g}, got {checked:g}")
    return checked
