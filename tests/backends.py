"""The kernels that a run of the tests goes through, without the tests knowing."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import executor
import torch
from torch.overrides import TorchFunctionMode

import _ema_ext


class SeedsOfTheCpu(TorchFunctionMode):
    """Numbers drawn by a generator of the CPU are drawn there, and go to the default device."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Any:
        options = options or {}
        generator = options.get("generator")
        if generator is None or generator.device.type != "cpu" or "device" in options:
            return function(*arguments, **options)
        return function(*arguments, **options, device="cpu").to(torch.get_default_device())


#: Whether the kernels are those of csrc/cuda, wherever they run.
cuda_kernels = False

#: The one of choose.
chosen = "cpu"


def choose(name: str) -> None:
    """For the rest of the process: "cpu", "cuda", or "executor" for CUDA kernels on the CPU."""
    global chosen, cuda_kernels
    chosen, cuda_kernels = name, name != "cpu"
    if name == "executor":
        executor.take_over().set_from(os.environ.get("EMA_EXT_EXECUTOR", ""))
    elif name == "cuda":
        torch.set_default_device("cuda")
        SeedsOfTheCpu().__enter__()
    elif name != "cpu":
        raise ValueError(f"EMA_EXT_BACKEND must be cpu, cuda or executor, and is {name!r}")


def described() -> str:
    """The backend and what chooses its kernels, in words."""
    if chosen == "cuda":
        return f"cuda backend on {torch.cuda.get_device_name()}"
    if chosen == "executor":
        how = os.environ.get("EMA_EXT_EXECUTOR", "")
        return f"executor backend (CUDA kernels on the CPU{', ' * bool(how)}{how})"
    return f"cpu backend at {_ema_ext.cpu_level()}"
