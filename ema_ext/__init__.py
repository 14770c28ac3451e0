"""Exponential moving averages of tensors, computed by native kernels and differentiable.

`ema` is the function, `EMA` the layer around it, `linear_recurrence` what is under it, and
`smoothing_factor` turns a span, a centre of mass, a half-life or a time constant into alpha.
`ema_ext.reference` and `ema_ext.distributed` are imported by themselves: the slow versions that all
is checked against, and the same functions over time spread among processes. `python -m
ema_ext.info` prints what was built.
"""

from ema_ext import _library as _library  # before all else: checks torch, loads the library
from ema_ext._version import __version__
from ema_ext.functional import ema, linear_recurrence
from ema_ext.nn import EMA
from ema_ext.smoothing import smoothing_factor

__all__ = ["EMA", "__version__", "ema", "linear_recurrence", "smoothing_factor"]
