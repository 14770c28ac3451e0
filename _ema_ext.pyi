"""The compiled library: importing it registers the operators `torch.ops.ema_ext.*`."""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    torch: str
    compiler: str
    cuda: bool
    cuda_reason: str
    cuda_archs: str
    nvcc: str

def build_info() -> BuildInfo:
    """What was built, by what, and why with or without CUDA kernels.

    `torch` is the version built against, `cuda_archs` as TORCH_CUDA_ARCH_LIST has it; that and
    `nvcc` are empty where `cuda` is False.
    """

def cpu_level() -> str:
    """The instruction set level in use: x86-64, x86-64-v3 or x86-64-v4."""

def force_cpu_strategy(name: str) -> None:
    """For tests: "rows", "lanes" or "cut" scans so whatever can be, "" as it is best."""

def cuda_probe() -> int:
    """The number of CUDA devices on which the library's kernels run; -1 if it has none."""
