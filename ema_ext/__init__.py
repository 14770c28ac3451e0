"""Exponential moving averages of tensors, computed by native kernels and differentiable.

`ema` is the function, `EMA` the layer around it, and `smoothing_factor` turns a span, a centre of
mass, a half-life or a time constant into its alpha. `ema_ext.reference`, to be imported by itself,
holds the slow versions that it is checked against; `python -m ema_ext.info` prints what was built.
"""

from ema_ext import _library as _library  # before all else: checks torch, loads the library
from ema_ext._version import __version__
from ema_ext.functional import ema
from ema_ext.nn import EMA
from ema_ext.smoothing import smoothing_factor

__all__ = ["EMA", "__version__", "ema", "smoothing_factor"]
