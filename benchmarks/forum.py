"""The forum thread's own table: its four versions and ema_ext, over the length of one series.

    python benchmarks/forum.py --out docs/img/forum.png

Prints time per call, forward and forward + backward (gradient to x), and the largest difference
from the for-loop in float64, as Markdown; draws both times as a log-log plot. All versions run in
one process, interleaved in shuffled order, and the least of their times is kept. A cell that would
take too much time or memory is left out, with the reason below the table.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import torch
from measure import Contender, Effort, readable, take_turns
from torch import Tensor
from tqdm import tqdm

import ema_ext
from ema_ext.reference import EMAConv, ema_loop, ema_matmul, weight_matrix, wma_window

LENGTHS = [100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000]
PASSES = ["forward", "forward + backward"]

PERIOD = 21  # samples
ALPHA = 2 / (PERIOD + 1)
BASE, SWING, CYCLE = 1000.0, 100.0, 30  # price, price, samples

GIB = 2**30


@dataclass
class Version:
    """One row of the table."""

    name: str
    run: Callable[[Tensor], Tensor]
    growth: int  # time grows as length ** growth
    color: str
    marker: str
    times: dict[tuple[str, int], float] = field(default_factory=dict)  # seconds
    differences: dict[int, float] = field(default_factory=dict)
    skipped: dict[tuple[str, int], str] = field(default_factory=dict)


class WeightEMA:
    """The weight matrix, made once for the longest row that the memory allows, then sliced."""

    def __init__(self, max_bytes: float) -> None:
        self.length = max((n for n in LENGTHS if self.bytes(n) <= max_bytes), default=0)
        self.weights = weight_matrix(self.length, ALPHA).float()

    @staticmethod
    def bytes(length: int) -> int:
        """Peak while the matrix is made: three float64 matrices at once."""
        return 24 * length**2

    def __call__(self, x: Tensor) -> Tensor:
        return ema_matmul(x, ALPHA, weights=self.weights)


def prices(length: int) -> Tensor:
    """The thread's price signal: a sine of period 30 around 1000, in float32."""
    n = torch.arange(length, dtype=torch.float64)
    return (BASE + SWING * torch.sin(2 * math.pi / CYCLE * n)).float()


def versions(matrix: WeightEMA) -> list[Version]:
    """The rows, in the thread's order; colors are told apart by the colour-blind too."""
    return [
        Version("loopEMA", lambda x: ema_loop(x, ALPHA), 1, "#d55e00", "o"),
        Version("sync_EMA (WMA)", lambda x: wma_window(x, PERIOD), 1, "#cc79a7", "v"),
        Version("weightEMA", matrix, 2, "#e69f00", "s"),
        Version("conv-EMA", EMAConv(ALPHA), 1, "#0072b2", "^"),
        Version("ema_ext", lambda x: ema_ext.ema(x, ALPHA), 1, "#009e73", "D"),
    ]


def call(version: Version, which: str, x: Tensor) -> Tensor:
    """One call; backward with a gradient of ones."""
    if which == "forward":
        return version.run(x)
    y = version.run(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return grad


def reason_to_skip(
    version: Version, which: str, length: int, limit: float, matrix: WeightEMA
) -> str | None:
    """Why this cell is left out, or None; the time is foretold from the lengths before."""
    if version.run is matrix and length > matrix.length:
        return f"needs {matrix.bytes(length) / GIB:.1f} GiB"
    known = [n for (w, n) in version.times if w == which]
    if (which, LENGTHS[0]) in version.skipped or not known:
        return None
    longest = max(known)
    foretold = version.times[which, longest] * (length / longest) ** version.growth
    return f"would take about {foretold:.0f} s" if foretold > limit else None


def measure(rows: list[Version], matrix: WeightEMA, options: argparse.Namespace) -> None:
    """Fill in every row's times, differences and reasons."""
    signal = prices(LENGTHS[-1])
    exact = ema_loop(signal.double(), ALPHA)
    effort = Effort(options.rounds, options.sample, options.budget)
    cells = [(length, which) for length in LENGTHS for which in PASSES]
    for length, which in tqdm(cells, desc="forum table", file=sys.stderr):
        x = signal[:length].clone().requires_grad_(which != "forward")
        contenders: dict[str, Contender] = {}
        for version in rows:
            reason = reason_to_skip(version, which, length, options.max_seconds, matrix)
            if reason:
                version.skipped[which, length] = reason
                continue
            contenders[version.name] = Contender(functools.partial(call, version, which, x))
            if which == "forward":
                difference = call(version, which, x) - exact[:length]
                version.differences[length] = float(difference.abs().max())
        samples = take_turns(contenders, effort)
        for version in rows:
            if version.name in samples:
                version.times[which, length] = min(samples[version.name])


def table(rows: list[Version], title: str, cell: Callable[[Version, int], str]) -> str:
    lines = [f"| {title} | " + " | ".join(f"{n}" for n in LENGTHS) + " |"]
    lines.append("|---" + "|--:" * len(LENGTHS) + "|")
    for version in rows:
        cells = " | ".join(cell(version, n) for n in LENGTHS)
        lines.append(f"| {version.name} | {cells} |")
    return "\n".join(lines)


def report(rows: list[Version]) -> str:
    """The three tables and the reasons for their gaps, in Markdown."""

    def timed(which: str) -> Callable[[Version, int], str]:
        def cell(version: Version, length: int) -> str:
            took = version.times.get((which, length))
            return "-" if took is None else readable(took)

        return cell

    def difference(version: Version, length: int) -> str:
        value = version.differences.get(length)
        return "-" if value is None else f"{value:.1e}"

    parts = [table(rows, which, timed(which)) for which in PASSES]
    parts.append(table(rows, "max difference", difference))
    reasons = []
    for version in rows:
        left_out: dict[tuple[int, str], list[str]] = {}
        for (which, length), reason in sorted(version.skipped.items(), key=lambda item: item[0][1]):
            left_out.setdefault((length, reason), []).append(which)
        for (length, reason), passes in left_out.items():
            reasons.append(f"* {version.name}, {length}, {' and '.join(passes)}: {reason}")
    if reasons:
        parts.append("Left out:\n\n" + "\n".join(reasons))
    return "\n\n".join(parts)


def draw(rows: list[Version], path: Path) -> None:
    """Time against length, both logarithmic, one panel per pass."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for panel, which in zip(panels, PASSES, strict=True):
        for version in rows:
            points = sorted((n, t) for (w, n), t in version.times.items() if w == which)
            panel.plot(
                *zip(*points, strict=True),
                color=version.color,
                marker=version.marker,
                markersize=5,
                linewidth=2.5 if version.name == "ema_ext" else 1.5,
                label=version.name,
            )
        panel.set(xscale="log", yscale="log", title=which, xlabel="length of the series (samples)")
        panel.grid(visible=True, which="major", color="#dddddd", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time per call (s)")
    panels[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("forum.png"), help="the plot, a PNG")
    parser.add_argument("--max-seconds", type=float, default=6.0, help="longest call allowed")
    parser.add_argument("--max-gib", type=float, default=3.0, help="memory allowed to the matrix")
    parser.add_argument("--rounds", type=int, default=25, help="timings per cell, at most")
    parser.add_argument("--budget", type=float, default=0.8, help="seconds for a cell's rounds")
    parser.add_argument(
        "--sample", type=float, default=2e-3, help="seconds of one timing, at least"
    )
    options = parser.parse_args()

    began = time.perf_counter()
    matrix = WeightEMA(options.max_gib * GIB)
    rows = versions(matrix)
    measure(rows, matrix, options)
    draw(rows, options.out)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, "
        f"alpha 2/{PERIOD + 1}. weightEMA's matrix is made beforehand; sync_EMA is another filter, "
        f"so its difference is not an error.\n"
    )
    print(report(rows))
    print(f"\n{time.perf_counter() - began:.0f} s in all; plot in {options.out}")


if __name__ == "__main__":
    main()
