"""What was built and what it runs in, for bug reports: `python -m ema_ext.info`."""

from __future__ import annotations

import platform

import torch

from ema_ext import _library
from ema_ext._version import __version__


def describe() -> dict[str, str]:
    """What is printed, as label -> text.

    The versions of the package, torch, Python and compiler; the CPU's instruction set level in use
    (EMA_EXT_CPU_LEVEL forces a lower one); the CUDA architectures that were built, or why there are
    none; torch's number of threads.
    """
    library = _library.load()
    built = library.build_info()
    cuda = built["cuda_archs"] or f"none: {built['cuda_reason']}"
    if built["cuda"]:
        cuda += f" (nvcc {built['nvcc']}: {built['cuda_reason']})"
    return {
        "ema_ext": __version__,
        "torch": f"{torch.__version__} (built against {built['torch']})",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "compiler": built["compiler"],
        "CPU level": library.cpu_level(),
        "CUDA architectures": cuda,
        "threads": str(torch.get_num_threads()),
    }


def main() -> None:
    for name, value in describe().items():
        print(f"{name + ':':20}{value}")


if __name__ == "__main__":
    main()
