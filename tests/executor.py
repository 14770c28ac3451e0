"""Builds the executor of cuda_executor/ and speaks to it.

Objects are kept in build/cuda_executor, by what they are made of.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import ema_ext  # noqa: F401 - registers the schemas

ROOT = Path(__file__).parent.parent
SOURCES = Path(__file__).parent / "cuda_executor"
BUILD = ROOT / "build" / "cuda_executor"

SCHEDULES = ("in order", "reversed", "random")

#: Of what runs in a kernel. Volatile accesses are messages, and are told apart; that a function
#: begins or ends is no access.
KERNEL_FLAGS = [
    *("-include", "intrinsics.h"),  # before the toolkit's own, as nvcc does
    "-fsanitize=thread",
    "--param=tsan-distinguish-volatile=1",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=alignment",
    "-Wno-tsan",
]
COMMON_FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


#: The faults of examples.cpp, by their numbers there.
FAULTS = (
    "none",
    "no barrier",
    "no release",
    "flag first",
    "block order",
    "forgets infinity",
    "garbage lanes",
    "out of bounds",
    "uninitialised",
    "divergent barrier",
    "two barriers",
    "deadlock",
    "misaligned",
    "arrival order",
    "skips a sample",
    "writes its input",
    "no barrier after",
    "spins",
)


def cuda_headers() -> Path | None:
    """Where cuda_runtime.h lies, if there is a toolkit."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        return None
    # nvcc on the PATH may be a wrapper script: its own account of its paths is the true one.
    account = subprocess.run(
        [nvcc, "--dryrun", "none.cu"], capture_output=True, text=True, check=False
    ).stderr
    for path in re.findall(r'"-I([^"]+)"', account):
        if Path(path, "cuda_runtime.h").exists():
            return Path(path)
    return None


def needed_headers() -> Path:
    """The same, or the test is skipped; but not in CI, which has a toolkit."""
    headers = cuda_headers()
    if headers is None:
        reason = "the executor needs the headers of a CUDA toolkit, and no nvcc was found"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return headers


#: Of csrc/cuda: what speaks to torch of a GPU, and a kernel that is started by itself.
NOT_FOR_THE_EXECUTOR = ("ema_cuda.cpp", "probe.cu")


@dataclass
class Unit:
    """A source file and how it is compiled."""

    source: Path
    flags: list[str]
    includes: list[Path]  # directories whose headers it may use, and which are searched in order

    def command(self, target: Path) -> list[str]:
        """What compiles it."""
        search = [f"-I{path}" for path in self.includes]
        return [
            os.environ.get("CXX", "c++"),
            *self.flags,
            *search,
            *("-x", "c++", "-c", str(self.source), "-o", str(target)),
        ]

    def digest(self) -> str:
        """Of the command and of all that it may read."""
        state = hashlib.sha256(" ".join(self.command(Path("target"))).encode())
        headers = (
            path
            for directory in self.includes
            for path in sorted(directory.rglob("*"))
            if path.suffix in (".h", ".cuh", ".inc")
        )
        for path in (self.source, *headers):
            state.update(path.read_bytes())
        return state.hexdigest()[:24]


def build(name: str, units: list[Unit], link: list[str]) -> Path:
    """The shared library of the units, made where it is not there yet."""
    BUILD.mkdir(parents=True, exist_ok=True)
    objects = [BUILD / f"{unit.source.stem}-{unit.digest()}.o" for unit in units]
    together = hashlib.sha256(" ".join([*map(str, objects), *link]).encode()).hexdigest()[:24]
    library = BUILD / f"{name}-{together}.so"
    if library.exists():
        return library

    def make(target: Path, command: list[str]) -> None:
        if target.exists():
            return
        # Another process may do the same: whole files only appear.
        own = target.with_name(f"{os.getpid()}-{target.name}")
        done = subprocess.run(
            [own if part == str(target) else part for part in command],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if " error: " in line]
            raise RuntimeError("\n".join([f"{command[-1]}:", *errors[:5], done.stderr[:3000]]))
        own.rename(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for job in [
            pool.submit(make, target, unit.command(target))
            for unit, target in zip(units, objects, strict=True)
        ]:
            job.result()
    make(
        library,
        [os.environ.get("CXX", "c++"), "-shared", *map(str, objects), *link, *("-o", str(library))],
    )
    return library


def has_boost() -> bool:
    """Whether Boost.Context can be linked; fiber.h takes glibc's ucontext where it cannot."""
    name = "libboost_context.so"
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    return subprocess.check_output(command, text=True).strip() != name


def machine(headers: Path, boost: bool) -> tuple[list[Unit], list[str]]:
    """The executor itself, without kernels, and what it is linked with."""
    fibers = [] if boost else ["-DEXECUTOR_UCONTEXT"]
    flags = [*COMMON_FLAGS, *fibers, "-isystem", str(headers)]
    names = ("machine.cpp", "shadow.cpp", "hooks.cpp", "control.cpp")
    units = [Unit(SOURCES / name, flags, [SOURCES / "include", SOURCES]) for name in names]
    return units, ["-lboost_context"] if boost else []


def build_examples(headers: Path, boost: bool | None = None) -> Path:
    """The library of examples.cpp."""
    flags = [*COMMON_FLAGS, *KERNEL_FLAGS, "-isystem", str(headers)]
    examples = Unit(SOURCES / "examples.cpp", flags, [SOURCES / "include", SOURCES])
    units, link = machine(headers, has_boost() if boost is None else boost)
    return build("examples", [*units, examples], link)


def build_operators(headers: Path) -> Path:
    """The library that registers ema_ext_executor."""
    csrc = ROOT / "csrc"
    torch_flags = [
        *("-O1", "-isystem", str(Path(torch.__file__).parent / "include")),
        "-DTORCH_TARGET_VERSION=0x020d000000000000",
        "-Wno-missing-field-initializers",
    ]
    host = [*COMMON_FLAGS, "-isystem", str(headers), *torch_flags]
    kernel = [*COMMON_FLAGS, *KERNEL_FLAGS, "-Wno-unknown-pragmas", "-isystem", str(headers)]
    seen = [SOURCES / "include", csrc]
    include = [*seen, SOURCES]
    kernels = [
        path
        for path in sorted((csrc / "cuda").rglob("*"))
        if path.suffix in (".cpp", ".cu") and path.name not in NOT_FOR_THE_EXECUTOR
    ]
    executor, link = machine(headers, has_boost())
    units = [
        *executor,
        Unit(SOURCES / "binding.cpp", host, include),
        Unit(csrc / "arguments.cpp", host, include),
        *(Unit(path, kernel, seen) for path in kernels),
    ]
    libraries = Path(torch.__file__).parent / "lib"
    link += [f"-L{libraries}", "-ltorch_cpu", f"-Wl,-rpath,{libraries}", "-Wl,-z,defs"]
    return build("operators", units, link)


@dataclass(frozen=True)
class Count:
    """Of one tensor or workspace: its bytes, and how often one of them was read and written."""

    bytes: int
    least_read: int
    most_read: int
    least_written: int
    most_written: int
    bytes_read: int
    bytes_written: int


class Executor:
    """A library that holds an executor."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.executor_error.restype = ctypes.c_char_p
        self.library.executor_counts.restype = ctypes.c_char_p
        self.library.executor_kernels.restype = ctypes.c_char_p
        self.library.executor_trace.restype = ctypes.c_uint64

    def set(
        self,
        schedule: str = "in order",
        seed: int = 0,
        resident: int = 8,
        checks: bool = True,
        seconds: float = 60,
        multiprocessors: int = 4,
    ) -> None:
        """How the next launches run."""
        self.library.executor_set(
            SCHEDULES.index(schedule),
            ctypes.c_uint64(seed),
            resident,
            ctypes.c_bool(checks),
            ctypes.c_double(seconds),
            multiprocessors,
        )

    def set_from(self, text: str) -> None:
        """The same from "schedule=random seed=3": keywords of set, "_" for a space in a value."""
        given = dict(part.split("=") for part in text.split())
        kinds = {"schedule": lambda v: v.replace("_", " "), "seconds": float}
        kinds["checks"] = lambda v: v == "True"
        self.set(**{name: kinds.get(name, int)(value) for name, value in given.items()})

    def plant(self, file: str = "", line: int = 0) -> None:
        """From now on the barrier or fence of this line is not there: Planted, in executor.h."""
        self.library.executor_plant(file.encode(), line)

    def error(self) -> str:
        """What the last run broke."""
        return self.library.executor_error().decode()

    def kernels(self) -> list[str]:
        """The names of those that the last run launched."""
        return self.library.executor_kernels().decode().splitlines()

    def trace(self) -> int:
        """A hash of who ran when, in the last launch."""
        return self.library.executor_trace()

    def counts(self) -> dict[str, Count]:
        """What the last run read and wrote, by the name of the tensor."""
        lines = self.library.executor_counts().decode().splitlines()
        fields = [line.split("\t") for line in lines]
        return {name: Count(*map(int, numbers)) for name, *numbers in fields}


@functools.cache
def load_operators() -> Executor:
    """Registers torch.ops.ema_ext_executor.*, the project's CUDA kernels on CPU tensors."""
    library = torch.library.Library("ema_ext_executor", "DEF")
    for name in operators():
        packet, _, overload = name.partition(".")
        schema = str(getattr(getattr(torch.ops.ema_ext, packet), overload or "default")._schema)
        library.define(schema.removeprefix("ema_ext::"))
    operator_libraries.append(library)
    return Executor(build_operators(needed_headers()))


def operators() -> list[str]:
    """The names of ema_ext's operators, "ema.Tensor" and so on."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("ema_ext::") for name in names if name.startswith("ema_ext::"))


def take_over() -> Executor:
    """Lets ema_ext's operators on CPU tensors run the CUDA kernels, for the rest of the process."""
    loaded = load_operators()
    library = torch.library.Library("ema_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another kernel was there before
        for name in operators():
            packet, _, overload = name.partition(".")
            kernel = getattr(getattr(torch.ops.ema_ext_executor, packet), overload or "default")
            library.impl(name, kernel, "CPU", allow_override=True)
    operator_libraries.append(library)
    return loaded


#: What torch.library undoes when it is collected.
operator_libraries: list[object] = []
