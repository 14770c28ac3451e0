"""Loads the compiled library `_ema_ext`, after checking the torch that it is to run in.

Importing this module does so: it comes before every other module of the package.
"""

from __future__ import annotations

import re
from types import ModuleType

import torch

from ema_ext._version import __version__

OLDEST_TORCH = "2.13"


def check_torch(version: str) -> None:
    """Raises ImportError if `version` is that of a torch older than the oldest supported."""

    def release(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text)[:2]]

    if release(version) < release(OLDEST_TORCH):
        raise ImportError(
            f"ema_ext {__version__} needs torch {OLDEST_TORCH} or newer, found torch {version}"
        )


def load() -> ModuleType:
    """Imports `_ema_ext`, which registers the operators `torch.ops.ema_ext.*`.

    Raises ImportError if torch is too old, or if the library is missing, belongs to another version
    of the package, or cannot run at the level that EMA_EXT_CPU_LEVEL names.
    """
    check_torch(torch.__version__)
    try:
        import _ema_ext
    except ModuleNotFoundError as error:
        raise ImportError(
            "the compiled library of ema_ext is missing: run `pip install .` in its source folder"
        ) from error
    built = _ema_ext.build_info()["version"]
    if built != __version__:
        raise ImportError(
            f"this is ema_ext {__version__} beside the compiled library of {built}:"
            " run `pip install .` in its source folder"
        )
    return _ema_ext


def cuda_unavailable_reason() -> str | None:
    """Why there are no CUDA kernels and what builds them; None where there are."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("ema_ext::ema", "CUDA"):
        return None
    built = load().build_info()
    if built["cuda"]:
        return f"ema_ext {__version__}, though built with nvcc {built['nvcc']}, has no CUDA kernels"
    return (
        f"this build of ema_ext has no CUDA kernels ({built['cuda_reason']}); given nvcc,"
        " `EMA_EXT_CUDA=1 pip install .` in its source folder builds them"
    )


load()
