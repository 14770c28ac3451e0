"""What the build finds on the machine: a C++ compiler and, for the CUDA kernels, a toolkit.

Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from platform import machine, system

CUDA_ARCHS = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]  # Turing to Blackwell
#: The architectures that PTX is made for: each other one is compiled from the last before it, which
#: spares nvcc's front end, the larger half of the time.
PTX_ARCHS = ["7.5", "8.0", "9.0"]


def check_machine() -> None:
    """Ends the build with one sentence where it cannot succeed."""
    if (system(), machine()) != ("Linux", "x86_64"):
        sys.exit(f"ema_ext builds on Linux x86-64 only; this is {system()} {machine()}.")
    compiler = os.environ.get("CXX", "c++")
    # This option is GCC's alone, and so are the pragmas by which the kernels choose their
    # instruction sets. __builtin_shufflevector and _Float16 came with GCC 12.
    version = _output(f"{compiler} -dumpfullversion").partition(".")[0]
    if not version.isdigit() or int(version) < 12:
        sys.exit(f"ema_ext needs g++ 12 or newer, and `{compiler}` is not: install g++ or set CXX.")


@dataclass
class Cuda:
    """The decision on CUDA kernels; `nvcc` is empty where none are built."""

    reason: str
    nvcc: str = ""
    home: str = ""
    archs: str = ""  # as TORCH_CUDA_ARCH_LIST has them
    include_dirs: list[str] = field(default_factory=list)
    library_dirs: list[str] = field(default_factory=list)


def gencode_flags(archs: str) -> list[str]:
    """nvcc's flags for such a list: 8.6+PTX asks for code for 8.6, and PTX for what is newer."""

    def number(arch: str) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", arch)))

    codes: dict[str, list[str]] = {}
    for entry in re.split(r"[\s;]+", archs.strip()):
        arch = entry.removesuffix("+PTX")
        base = max(
            (ptx for ptx in PTX_ARCHS if number(ptx) <= number(arch)), key=number, default=arch
        )
        if not arch[-1].isdigit():  # 9.0a: code for that machine alone
            base = arch
        base, arch = base.replace(".", ""), arch.replace(".", "")
        codes.setdefault(base, []).append(f"sm_{arch}")
        if entry.endswith("+PTX"):
            codes[base].append(f"compute_{base}")
    return [f"-gencode=arch=compute_{base},code=[{','.join(code)}]" for base, code in codes.items()]


def find_cuda(torch_cuda: str | None) -> Cuda:
    """Decides on CUDA kernels, `torch_cuda` being the CUDA version torch was built for.

    A GPU is not asked for: build machines have none.
    """
    wanted, home = os.environ.get("EMA_EXT_CUDA"), os.environ.get("CUDA_HOME")
    if wanted not in (None, "", "0", "1"):
        sys.exit(f"EMA_EXT_CUDA must be 0 or 1, and is {wanted!r}.")
    if wanted == "0":
        return Cuda("EMA_EXT_CUDA=0 was set")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None and wanted == "1":
        sys.exit("EMA_EXT_CUDA=1 needs nvcc, and there is none in CUDA_HOME/bin or on the PATH.")
    if nvcc is None:
        return Cuda("no nvcc was found")
    if torch_cuda is None and wanted != "1":
        return Cuda("torch was a build without CUDA")

    # nvcc on the PATH may be a wrapper script: its own account of its paths is the true one.
    account = _output(f"'{nvcc}' --dryrun none.cu 2>&1")
    top = re.search(r"TOP=(.*)", account)
    release = re.search(r"release ([\d.]+)", _output(f"'{nvcc}' --version"))
    if top is None or release is None:
        sys.exit(f"{nvcc} does not work: `nvcc --dryrun none.cu` printed\n{account}")
    if torch_cuda and int(release[1].split(".")[0]) > int(torch_cuda.split(".")[0]):
        warning = f"nvcc {release[1]} is newer than torch's CUDA {torch_cuda}: the CUDA kernels"
        warning += f" will need a driver for CUDA {release[1]}."
        print("!" * 80, "WARNING: " + warning, "!" * 80, sep="\n", file=sys.stderr)
    known = _output(f"'{nvcc}' --list-gpu-code").split()
    default = [arch for arch in CUDA_ARCHS if "sm_" + arch.replace(".", "") in known]
    return Cuda(
        reason="EMA_EXT_CUDA=1 was set" if wanted else f"nvcc and a torch for CUDA {torch_cuda}",
        nvcc=release[1],
        home=os.path.realpath(top[1]),
        archs=os.environ.get("TORCH_CUDA_ARCH_LIST") or " ".join(default) + "+PTX",
        include_dirs=sorted(set(re.findall(r'"-I([^"]+)"', account))),
        library_dirs=sorted(set(re.findall(r'"-L([^"]+)"', account))),
    )


def _output(command: str) -> str:
    return subprocess.run(command, shell=True, capture_output=True, text=True).stdout
