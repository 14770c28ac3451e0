"""Predicts, without a GPU, how near to copying the CUDA kernels come.

    python tools/sass.py --json sass.json && python benchmarks/roofline.py --gate sass.json
    python benchmarks/roofline.py --per-byte 2.5          # of a kernel that has this many

A prediction and no measurement: nobody has run the kernels. A call of N samples takes

    launches + max(bytes / memory, instructions / issue, float64 / rate, anchors) + latency

where bytes is 2 N samples forward and backward, 3 N with the gradient to alpha; instructions and
those of float64 are the static counts of tools/sass.py; anchors is the chain of states through a
split row, one every LOOK_BACK tiles, each after the one before it. What lies in a GPU's cache is
read faster than this says.

Calibration. MEMORY: copies reach 88 to 93 % of a GPU's peak. LAUNCH: CUB's DeviceScan, two kernels,
takes about 14 µs for 2^20 floats on an H100. ISSUE: the same scan moves 78 % of an H100's peak in
float32 and 43 % in float16, which is about as many samples a second; with 36 instructions a sample,
as many as accelerated-scan has, that is 0.4 of what its schedulers could issue.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "tools"))
from documents import with_block

MEMORY = 0.9  # of peak
LAUNCH = 5e-6  # seconds, of a kernel or of clearing memory
ISSUE = 0.4  # of the schedulers' peak
LATENCY = 1e-6  # seconds from a tile's loads to its stores
HOP = 1e-6  # seconds from one anchor's state to the next: a store seen through L2, and a fold
LOOK_BACK = 256  # tiles from anchor to anchor, kLookBack of split_rows.cuh
LANES = 4 * 32  # instructions that a multiprocessor issues in a clock


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str
    bandwidth: float  # bytes per second, the peak
    multiprocessors: int
    clock: float  # Hz, boost
    doubles: int  # float64 instructions that a multiprocessor does in a clock


GPUS = [
    Gpu("T4", "7.5", 320e9, 40, 1.59e9, 2),
    Gpu("A100 80 GB", "8.0", 2039e9, 108, 1.41e9, 32),
    Gpu("H100 SXM", "9.0", 3350e9, 132, 1.755e9, 64),
    Gpu("B200", "10.0", 8000e9, 148, 1.965e9, 64),
    Gpu("RTX 4090", "8.9", 1008e9, 128, 2.52e9, 2),
]


@dataclass(frozen=True)
class Pass:
    name: str
    tensors: int  # of the samples' size, read and written
    gradient: bool = False


PASSES = [
    Pass("forward, or backward", 2),
    Pass("backward, alpha learned", 3, gradient=True),
]


@dataclass(frozen=True)
class Kernel:
    """The counts of one kernel: per byte of samples, and of one thread's tile."""

    per_byte: float
    doubles: float = 0.0
    tile: int = 8192  # bytes of x in a block's tile

    @classmethod
    def of(cls, row: dict[str, Any]) -> Kernel:
        moved = row["read"] + row["written"]
        return cls(row["per_byte"], row["doubles"] / moved, row["written"] * row["threads"])


@dataclass(frozen=True)
class Shape:
    rows: int
    length: int

    @property
    def split(self) -> bool:
        return self.rows == 1

    @property
    def name(self) -> str:
        power = (self.rows * self.length).bit_length() - 1
        return f"1 x 2^{power}" if self.split else f"{self.rows} x {self.length}"


SHAPES = [Shape(1, 1 << 16), Shape(1, 1 << 20), Shape(1, 1 << 24), Shape(1, 1 << 28)]
SHAPES += [Shape(65536, 4096)]


def seconds(gpu: Gpu, moves: Pass, kernel: Kernel, shape: Shape, sample: int) -> float:
    x = shape.rows * shape.length * sample
    work = moves.tensors * x
    issued = work * kernel.per_byte / (gpu.multiprocessors * LANES * gpu.clock * ISSUE)
    doubles = work * kernel.doubles / (gpu.multiprocessors * gpu.doubles * gpu.clock)
    anchors = x / kernel.tile / LOOK_BACK * HOP if shape.split else 0
    # Of a split row: clearing the workspace, the heads, the tiles and, if wanted, their sums.
    launches = 3 + moves.gradient if shape.split else 1
    return launches * LAUNCH + LATENCY + max(copying(gpu, work), issued, doubles, anchors)


def copying(gpu: Gpu, work: float) -> float:
    return work / (gpu.bandwidth * MEMORY)


def share(gpu: Gpu, moves: Pass, kernel: Kernel, shape: Shape, sample: int) -> float:
    """Of the time that a copy moving as many bytes takes, launched once."""
    work = moves.tensors * shape.rows * shape.length * sample
    least = LAUNCH + LATENCY + copying(gpu, work)
    return least / seconds(gpu, moves, kernel, shape, sample)


def table(counts: dict[tuple[str, str], Kernel], dtype: str, given: Kernel | None) -> str:
    """`counts` by kernel and architecture, or for all of them what is given."""
    sample = {"float64": 8, "float32": 4}.get(dtype, 2)
    storage = {"float64": "Native<double>", "float32": "Native<float>"}
    storage |= {"float16": "Float16", "bfloat16": "BFloat16"}
    lines = [f"| {dtype} | pass | " + " | ".join(shape.name for shape in SHAPES) + " |"]
    lines.append("|---|---" + "|--:" * len(SHAPES) + "|")
    for gpu in GPUS:
        for moves in PASSES:
            cells = []
            for shape in SHAPES:
                family, team = ("SplitRows", 256) if shape.split else ("RowTiles", 32)
                tiling = f"{storage[dtype]}, {team}, true, {str(moves.gradient).lower()}"
                name = f"{family}<Tiling<{tiling}>>"
                kernel = given or counts[name, gpu.arch]
                time = seconds(gpu, moves, kernel, shape, sample)
                cells.append(
                    f"{time * 1e6:,.0f} µs, {share(gpu, moves, kernel, shape, sample):.0%}"
                )
            lines.append(f"| {gpu.name} | {moves.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gate", type=Path, help="the JSON of tools/sass.py")
    source.add_argument("--per-byte", type=float, help="instructions per byte of every kernel")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="update its table")
    options = parser.parse_args(arguments)
    given = None if options.per_byte is None else Kernel(options.per_byte)
    rows = json.loads(options.gate.read_text()) if options.gate else []
    counts = {(row["kernel"], row["arch"]): Kernel.of(row) for row in rows if row["written"]}
    text = table(counts, options.dtype, given)
    print(text)
    if options.write:
        document = options.write.read_text(encoding="utf-8")
        options.write.write_text(with_block(document, "roofline", text), encoding="utf-8")


if __name__ == "__main__":
    main()
