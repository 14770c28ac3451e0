"""loops.cpp from Python: compiled by the machine's C++ compiler when first used."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SOURCE = Path(__file__).with_name("loops.cpp")
#: As fast as the compiler makes it on this very machine: the plain loop is an honest opponent.
FLAGS = ["-O3", "-march=native", "-shared", "-fPIC"]

Array = npt.NDArray[Any]


def compiler() -> str | None:
    """The C++ compiler, as setup.py finds it, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled loops. RuntimeError where there is no compiler."""
    program = compiler()
    if program is None:
        raise RuntimeError("the plain loops need a C++ compiler: g++, or what CXX names")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "loops.so"
        subprocess.run([program, *FLAGS, "-o", str(built), str(SOURCE)], check=True)
        loaded = ctypes.CDLL(str(built))
    loaded.ema_float32_grad_alpha.restype = ctypes.c_float
    return loaded


def prepared_ema_float32(x: Array, alpha: float) -> Callable[[], Array]:
    """The sequential float32 loop over x, float32 of shape (length,), as a call that is quick.

    All calls write to the same result: at short lengths ctypes and numpy would be most of the time.
    """
    y = np.empty_like(x)
    loop, arguments = library().ema_float32, (_at(x), _at(y), _length(x), ctypes.c_double(alpha))

    def call() -> Array:
        loop(*arguments)
        return y

    return call


def ema_float32(x: Array, alpha: float) -> Array:
    """The result of the sequential float32 loop."""
    return prepared_ema_float32(x, alpha)()


def grad_alpha_float32(g: Array, x: Array, y: Array, alpha: float) -> float:
    """Its gradient to alpha, for gradient g of y; all float32 of shape (length,)."""
    gradient = library().ema_float32_grad_alpha(
        _at(g), _at(x), _at(y), _length(x), ctypes.c_double(alpha)
    )
    return float(gradient)


def ema_exact(x: Array, alpha: float) -> tuple[Array, Array]:
    """ema(x) in long double, rounded from 113 bits, and ema(|x|) in float64.

    x: float64 of shape (length,).
    """
    y, size = np.empty(x.shape, np.longdouble), np.empty_like(x)
    library().ema_exact(_at(x), _at(y), _at(size), _length(x), ctypes.c_double(alpha))
    return y, size


def grad_alpha_exact(g: Array, x: Array, y: Array, alpha: float) -> tuple[Any, Any]:
    """sum lambda[n] (x[n] - y[n-1]) and the sum of its |terms|, in long double.

    g, x: float64 of shape (length,); y: ema_exact(x, alpha)[0].
    """
    result = np.empty(2, np.longdouble)
    library().ema_exact_grad_alpha(
        _at(g), _at(x), _at(y), _length(x), ctypes.c_double(alpha), _at(result)
    )
    return result[0], result[1]


def _at(array: Array) -> ctypes.c_void_p:
    if not array.flags.c_contiguous:
        raise ValueError("the loops take contiguous arrays")
    return ctypes.c_void_p(array.ctypes.data)


def _length(array: Array) -> ctypes.c_int64:
    return ctypes.c_int64(array.size)
