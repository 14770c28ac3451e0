"""Exponential moving averages of tensors, computed by native kernels and differentiable.

`ema` is the function, `linear_recurrence` what is under it. `ema_ext.reference`, to be imported by
itself, holds the slow versions that they are checked against; `python -m ema_ext.info` prints what
was built.
"""

from ema_ext import _library as _library  # before all else: checks torch, loads the library
from ema_ext._version import __version__
from ema_ext.functional import ema, linear_recurrence

__all__ = ["__version__", "ema", "linear_recurrence"]
