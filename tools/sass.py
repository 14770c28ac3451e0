"""Gates what nvcc made of the CUDA kernels: registers, stack, access widths, instructions per byte.

    python tools/sass.py                      # the installed library
    python tools/sass.py path/to/_ema_ext.so --json sass.json

Disassembles the kernels for every architecture of the build and holds each of them to
sass_kernels.py: all kernels are named there and all names are found; no spills, no stack; the
planned number of blocks fits a multiprocessor. Those that move aligned samples besides: every
access of the main loop that moves samples has 128 bits or more, one barrier a trip, at most 2.5
SASS instructions per byte of samples. sass_loops.py says what the main loop and a trip are.

These are static counts: how long the instructions take, and how often the inner loops run, shows on
a GPU only. Needs cuobjdump and nvdisasm, of the CUDA toolkit or from PyPI (nvidia-cuda-cuobjdump,
nvidia-cuda-nvdisasm), and no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "build_backend"))
from documents import with_block  # noqa: E402
from machine import CUDA_ARCHS  # noqa: E402
from sass_kernels import KERNELS, Expected  # noqa: E402
from sass_loops import WIDE, Instruction, MainLoop, main_loop, total  # noqa: E402


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks on it share; registers are 65 536 on all of them."""

    threads: int
    blocks: int
    shared: int  # bytes
    reserved: int = 1024  # of shared memory, for each block


MULTIPROCESSORS = {
    "7.5": Multiprocessor(1024, 16, 64 << 10, reserved=0),
    "8.0": Multiprocessor(2048, 32, 164 << 10),
    "8.6": Multiprocessor(1536, 16, 100 << 10),
    "8.9": Multiprocessor(1536, 24, 100 << 10),
    "9.0": Multiprocessor(2048, 32, 228 << 10),
    "10.0": Multiprocessor(2048, 32, 228 << 10),
    "12.0": Multiprocessor(1536, 24, 100 << 10),
}


@dataclass(frozen=True)
class Bounds:
    """What __launch_bounds__ asks for."""

    threads: int = 1024
    min_blocks: int = 1


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture."""

    name: str
    arch: str
    registers: int
    stack: int  # bytes
    shared: int  # bytes, static
    spills: int  # loads and stores of local memory
    bounds: Bounds
    loop: MainLoop

    @property
    def blocks(self) -> int:
        """Blocks that fit a multiprocessor."""
        machine = MULTIPROCESSORS[self.arch]
        warps = -(-self.bounds.threads // 32)
        per_warp = -(-self.registers * 32 // 256) * 256
        limits = [machine.blocks, machine.threads // self.bounds.threads]
        if per_warp:
            limits.append(65536 // per_warp // 4 * 4 // warps)
        if self.shared + machine.reserved:
            limits.append(machine.shared // (self.shared + machine.reserved))
        return min(limits)

    @property
    def planned_blocks(self) -> int:
        return min(
            self.bounds.min_blocks, MULTIPROCESSORS[self.arch].threads // self.bounds.threads
        )

    @property
    def narrow(self) -> int:
        """Accesses of the trip that are not wide."""
        trip = self.loop.trip
        return sum(n for width, n in (trip.reads + trip.writes).items() if width < WIDE)


# Disassembling


def tool(name: str) -> str:
    """The path of cuobjdump or nvdisasm: the toolkit's, else a package's, else triton's."""
    found = shutil.which(name, path=os.environ.get("CUDA_HOME", "") + "/bin") or shutil.which(name)
    if found:
        return found
    for folder in ("nvidia/*/bin", "triton/backends/nvidia/bin"):
        for packages in filter(None, sys.path):
            for path in Path(packages).glob(f"{folder}/{name}"):
                return str(path)
    sys.exit(f"no {name}: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def output(*command: str | Path, cwd: Path | None = None, given: str = "") -> str:
    run = subprocess.run(command, cwd=cwd, input=given, capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.stdout


def short_names(symbols: Sequence[str]) -> dict[str, str]:
    """Symbol -> what the kernel is called: entry<Kernel> as Kernel, without namespaces."""
    demangled = output("c++filt", "-p", given="\n".join(symbols)).splitlines()
    names = {}
    for symbol, name in zip(symbols, demangled, strict=True):
        for namespace in ("(anonymous namespace)::", "ema_ext::cuda::", "ema_ext::"):
            name = name.replace(namespace, "")
        entry = re.fullmatch(r"entry<(.*?) ?>", name)
        names[symbol] = (entry[1] if entry else name).replace(" >", ">")
    return names


def launch_bounds(binary: Path) -> dict[str, Bounds]:
    """By symbol, from the PTX that the binary holds."""
    bounds = {}
    for entry in re.split(r"\.entry ", output(tool("cuobjdump"), "-ptx", binary))[1:]:
        symbol, head = re.split(r"\W", entry, maxsplit=1)[0], entry[: entry.index("{")]
        asked = dict(re.findall(r"\.(maxntid|minnctapersm) (\d+)", head))
        bounds[symbol] = Bounds(int(asked.get("maxntid", 1024)), int(asked.get("minnctapersm", 1)))
    return bounds


def disassembled(cubin: Path, bounds: Mapping[str, Bounds]) -> list[Kernel]:
    """The kernels of one cubin, by their symbols."""
    usage = {
        symbol: {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", line)}
        for symbol, line in re.findall(
            r"Function (\S+):\n(.*)", output(tool("cuobjdump"), "-res-usage", cubin)
        )
    }
    facts, functions = json.loads(output(tool("nvdisasm"), "-json", cubin))
    version = facts["SM"]["version"]
    arch = f"{version['major']}.{version['minor']}"
    kernels = []
    for function in functions:
        symbol = function["function-name"]
        if symbol not in usage:  # a subroutine, which some disassemblers list apart
            continue
        code = [
            Instruction(i["opcode"], i.get("operands", ""), i.get("predicate", ""))
            for i in function["sass-instructions"]
        ]
        used = usage[symbol]
        reserved = 1024 if version["major"] >= 9 and used["SHARED"] else 0  # counted there
        kernels.append(
            Kernel(
                symbol,
                arch,
                used["REG"],
                used["STACK"],
                used["SHARED"] - reserved,
                sum(i.name in ("LDL", "STL") for i in code),
                bounds[symbol],
                main_loop(code),
            )
        )
    return kernels


def kernels_of(binary: Path) -> list[Kernel]:
    """All kernels of a library, an object file or a cubin, named as in the sources."""
    bounds = launch_bounds(binary)
    if not bounds:
        sys.exit(f"{binary} holds no PTX, from which the launch bounds are read: build with +PTX")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        output(tool("cuobjdump"), "-xelf", "all", binary.resolve(), cwd=Path(folder))
        cubins = sorted(Path(folder).iterdir())
        found = [k for some in pool.map(lambda c: disassembled(c, bounds), cubins) for k in some]
    names = short_names(sorted({kernel.name for kernel in found}))
    return [replace(kernel, name=names[kernel.name]) for kernel in found]


# The gate


def complaints(
    kernels: Sequence[Kernel],
    expected: Sequence[Expected] = KERNELS,
    archs: Sequence[str] = CUDA_ARCHS,
) -> list[str]:
    """What is wrong, one sentence each."""
    named = {name: entry for entry in expected for name in entry}
    found: dict[str, set[str]] = {name: set() for name in named}
    for kernel in kernels:
        found.setdefault(kernel.name, set()).add(kernel.arch)
    wrong = [f"{name} is not named in sass_kernels.py" for name in found if name not in named]
    for name in named:
        missing = [arch for arch in archs if arch not in found[name]]
        if missing:
            wrong.append(f"{name} is not in the library for {', '.join(missing)}")
    for kernel in kernels:
        entry = named.get(kernel.name, Expected(kernel.name))
        where = f"{kernel.name} for {kernel.arch}"
        wrong += [f"{where}: {rule}" for rule in broken_rules(kernel, entry)]
    return wrong


def broken_rules(kernel: Kernel, entry: Expected) -> Iterator[str]:
    if kernel.spills:
        yield f"{kernel.spills} loads and stores of spilled registers"
    if kernel.stack:
        yield f"a stack of {kernel.stack} bytes"
    if kernel.blocks < kernel.planned_blocks:
        yield f"{kernel.blocks} blocks fit a multiprocessor, planned: {kernel.planned_blocks}"
    if not entry.aligned:
        return
    trip = kernel.loop.trip
    if not trip.bytes:
        yield "no access to samples was found"
        return
    if kernel.narrow > entry.narrow:
        yield f"{kernel.narrow} accesses of less than 128 bits a trip, allowed: {entry.narrow}"
    if trip.barriers > entry.barriers:
        yield f"{trip.barriers} barriers a trip, allowed: {entry.barriers}"
    read, written = (total(accesses, wide=True) for accesses in (trip.reads, trip.writes))
    reads, writes = entry.moves
    if read * writes != written * reads:
        yield f"reads {read} and writes {written} bytes a trip, not {reads} : {writes}"
    if trip.per_byte > entry.per_byte:
        yield f"{trip.per_byte:.2f} instructions per byte, allowed: {entry.per_byte}"
    if kernel.loop.computing > entry.inner:
        yield f"{kernel.loop.computing} inner loops that neither wait nor walk, and are not counted"


# Reporting


def access(kernel: Kernel) -> str:
    """The widths of the trip's accesses in bits, as 8 x 128."""
    accesses = kernel.loop.trip.reads + kernel.loop.trip.writes
    return ", ".join(f"{n} x {8 * width}" for width, n in sorted(accesses.items()))


def row(kernel: Kernel) -> dict[str, Any]:
    """What is known of one kernel on one architecture."""
    trip = kernel.loop.trip
    return {
        "kernel": kernel.name,
        "arch": kernel.arch,
        "registers": kernel.registers,
        "spills": kernel.spills,
        "stack": kernel.stack,
        "shared": kernel.shared,
        "threads": kernel.bounds.threads,
        "blocks": kernel.blocks,
        "planned_blocks": kernel.planned_blocks,
        "access": access(kernel),
        "read": total(trip.reads),
        "written": total(trip.writes),
        "barriers": trip.barriers,
        "instructions": trip.instructions,
        "doubles": trip.doubles,
        "per_byte": trip.per_byte if trip.bytes else None,
        "longest_per_byte": kernel.loop.longest.instructions / trip.bytes if trip.bytes else None,
        "is_loop": kernel.loop.is_loop,
    }


COLUMNS = {
    "architecture": "arch",
    "registers": "registers",
    "shared memory": "shared",
    "threads": "threads",
    "blocks": "blocks",
    "barriers": "barriers",
    "accesses": "access",
    "instructions": "instructions",
    "of float64": "doubles",
    "per byte": "per_byte",
    "at most": "longest_per_byte",
}


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown, one line each."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = ["| kernel | " + " | ".join(COLUMNS) + " |", "|---" + "|--:" * len(COLUMNS) + "|"]
    lines += [
        f"| `{each['kernel']}` | " + " | ".join(cell(each[key]) for key in COLUMNS.values()) + " |"
        for each in rows
    ]
    return "\n".join(lines)


def worst(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kernel the architecture with the most instructions per byte."""
    most: dict[str, dict[str, Any]] = {}
    for each in rows:
        other = most.setdefault(each["kernel"], each)
        if (each["per_byte"] or 0, each["registers"]) > (
            other["per_byte"] or 0,
            other["registers"],
        ):
            most[each["kernel"]] = each
    return list(most.values())


def library() -> Path:
    """The `_ema_ext` that Python would import."""
    spec = importlib.util.find_spec("_ema_ext")
    if spec is None or spec.origin is None:
        sys.exit("_ema_ext is not installed: name a library")
    return Path(spec.origin)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("library", type=Path, nargs="?", help="default: the installed one")
    parser.add_argument("--all", action="store_true", help="every architecture, not only the worst")
    parser.add_argument("--json", type=Path, help="write every figure")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="update its table")
    parser.add_argument("--check", type=Path, metavar="DOCUMENT", help="fail if its table is older")
    options = parser.parse_args(arguments)
    kernels = kernels_of(options.library or library())
    rows = [row(kernel) for kernel in sorted(kernels, key=lambda k: (k.name, float(k.arch)))]
    print(table(rows if options.all else worst(rows)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    wrong = complaints(kernels)
    document = options.write or options.check
    if document:
        text = document.read_text(encoding="utf-8")
        updated = with_block(text, "sass", table(worst(rows)))
        if options.write:
            document.write_text(updated, encoding="utf-8")
        elif updated != text:
            wrong.append(
                f"the table in {document} is out of date: tools/sass.py --write {document}"
            )
    if wrong:
        sys.exit("\n".join(["", f"{len(wrong)} faults:", *wrong]))
    names, archs = ({each[key] for each in rows} for key in ("kernel", "arch"))
    print(f"\n{len(names)} kernels for {len(archs)} architectures: as they should be")


if __name__ == "__main__":
    main()
