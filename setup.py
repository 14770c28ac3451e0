"""Builds the compiled library `_ema_ext`; all else about the package stands in pyproject.toml.

CPU kernels are always built, CUDA kernels where both nvcc and a CUDA build of torch are found.
Environment: EMA_EXT_CUDA=1 or 0 forces the CUDA kernels on or off, CUDA_HOME names the toolkit,
TORCH_CUDA_ARCH_LIST the architectures ("8.0 9.0+PTX"), CXX the compiler, CXXFLAGS further flags,
MAX_JOBS the number of compiler processes.
"""

import json
import os
import runpy
import shlex
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
from machine import check_machine, find_cuda, gencode_flags  # noqa: E402

STABLE_ABI = "0x020d000000000000"  # of torch 2.13: the library loads in that and every later one
GENERATED = ROOT / "build" / "generated"


def sources(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path().glob(pattern))


def write_build_info(**facts: str) -> None:
    """Prints the configuration and records it for csrc/module.cpp."""
    lines = [f"{{{json.dumps(name)}, {json.dumps(fact)}}},\n" for name, fact in facts.items()]
    print("ema_ext:", *(f"  {name}: {fact}" for name, fact in facts.items() if fact), sep="\n")
    GENERATED.mkdir(parents=True, exist_ok=True)
    path = GENERATED / "build_info.inc"
    if not path.exists() or path.read_text() != "".join(lines):  # else ninja would recompile
        path.write_text("".join(lines))


def configure() -> dict:
    """The arguments of setup() that compile the library."""
    import pybind11
    import torch
    from torch.utils import cpp_extension

    cuda = find_cuda(torch.version.cuda)
    write_build_info(
        version=runpy.run_path("ema_ext/_version.py")["__version__"],
        torch=torch.__version__,
        nvcc=cuda.nvcc,
        cuda_archs=cuda.archs,
        cuda_reason=cuda.reason,
    )
    headers = [cpp_extension.include_paths()[0], pybind11.get_include(), *cuda.include_dirs]
    common = ["-O2", "-std=c++17", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    host = ["-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
    host += [flag for path in headers for flag in ("-isystem", path)]
    library = Extension(
        "_ema_ext",
        sources("csrc/*.cpp", "csrc/cpu/**/*.cpp"),
        include_dirs=[str(ROOT / "csrc"), str(GENERATED)],
        library_dirs=[*cpp_extension.library_paths(), *cuda.library_dirs],
        libraries=["torch_cpu"],
        extra_compile_args={
            "cxx": [*common, *host, *shlex.split(os.environ.get("CXXFLAGS", ""))],
            "nvcc": [*common, "-Xcompiler=-fvisibility=hidden"],
        },
        extra_link_args=["-Wl,--exclude-libs,ALL"],
        language="c++",
    )
    if cuda.nvcc:
        library.sources += sources("csrc/cuda/**/*.cpp", "csrc/cuda/**/*.cu")
        library.libraries += ["cudart_static", "rt", "dl", "pthread"]
        library.extra_compile_args["cxx"] += ["-DEMA_EXT_CUDA"]
        # BuildExtension compiles .cu files only beside a torch for the same CUDA. Ours hold no
        # torch code and link a static runtime of their own, so that any torch will do.
        cpp_extension.CUDA_HOME = cuda.home
        cpp_extension._check_cuda_version = lambda *_: None
        jobs = max(1, (os.cpu_count() or 1) // len(sources("csrc/cuda/dtypes/*.cu")))
        library.extra_compile_args["nvcc"] += [*gencode_flags(cuda.archs), f"--threads={jobs}"]
    return {"ext_modules": [library], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


# Metadata and the sdist need neither torch nor a compiler.
compiles = {"bdist_wheel", "editable_wheel", "build", "build_ext"} & set(sys.argv)
if compiles:
    check_machine()
setup(**(configure() if compiles else {}))
