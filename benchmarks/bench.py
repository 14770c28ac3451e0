"""ema_ext against copying the tensor, torch.cumsum, the forum's versions and other packages.

    pip install '.[bench]'
    python benchmarks/bench.py
    python benchmarks/bench.py --device cuda

Times forward and forward + backward over shapes, dtypes, layouts and threads, and how both grow
with length and rows; holds the bars of bars.py; measures peak memory. measure.py says how, methods
.py what. Prints Markdown tables; writes every sample to a JSON file, which compare.py holds against
another, and the growth as a plot. `--quick` takes less than two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bars import BARS, Bar, Entry
from measure import Contender, Effort, peak_bytes, readable, take_turns
from methods import (
    BACK,
    BACK_LEARN,
    BOTH,
    CLONE,
    CUMSUM,
    FORUM,
    FORWARD,
    LEARN,
    OURS,
    PERIOD,
    Method,
    Problem,
    difference,
    installed_peers,
)

import ema_ext
from ema_ext import info

FULL = Effort(rounds=30, sample=2e-3, budget=1.0)
QUICK = Effort(rounds=9, sample=5e-4, budget=0.04)

SHAPES = [
    Problem((1, 64)),
    Problem((1, 10_000)),
    Problem((1, 300_000)),
    Problem((1, 1_000_000)),
    Problem((1, 10_000_000)),
    Problem((64, 16384)),
    Problem((1024, 4096)),
    Problem((16, 64, 4096)),
    Problem((4096, 1024)),
    Problem((16384, 64)),
    Problem((100_000, 8)),
    Problem((16, 4096, 64), dim=1),
    Problem((512, 5000), dim=0),
]
DTYPES = [
    Problem(shape, dim=dim, dtype=dtype)
    for shape, dim in (((64, 16384), -1), ((1, 300_000), -1), ((16, 4096, 64), 1))
    for dtype in ("float64", "bfloat16", "float16")
]
LAYOUTS = [
    Problem((64, 16384), layout="transposed"),
    Problem((64, 16384), layout="every second sample"),
    Problem((64, 16384), layout="off alignment"),
    Problem((64, 16384), layout="one row expanded"),
    Problem((64, 16384), per_row=True),
    Problem((64, 16384), dim=0),
]
LENGTHS = [Problem((1, n)) for n in (100, 1000, 10_000, 100_000, 1_000_000, 10_000_000)]
ROWS = [Problem((n, 256)) for n in (1, 10, 100, 1000, 10_000, 100_000)]
MEMORY = [Problem((1, 1 << 24)), Problem((64, 64, 4096), dim=1)]  # results of 64 MiB
PEER_ROW = Problem((1, 300_000))
#: Out of a GPU's cache, a GiB each: one row, few, many, short ones, and over a dimension not last.
LARGE = [
    Problem(shape, dim=dim, dtype=dtype)
    for shape, dim in (
        ((1, 1 << 28), -1),
        ((64, 1 << 22), -1),
        ((16384, 16384), -1),
        ((1 << 20, 256), -1),
        ((16, 65536, 256), 1),
    )
    for dtype in ("float32", "bfloat16")
]
TENSORS = 8  # of x's size, at the most, that a forward and backward holds
PEER_BATCH = Problem((1024, 4096))  # which the CUDA peers take as well
EVERYWHERE = (OURS, CLONE, CUMSUM)

LOAD = os.getloadavg()[0]  # processes that others ran when this began
BUSY = 0.5

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass
class Run:
    """What was measured; `samples` by problem and entry, in seconds per call."""

    device: str
    threads: list[int]
    samples: dict[tuple[Problem, Entry], list[float]] = field(default_factory=dict)
    memory: dict[tuple[Problem, Entry], int] = field(default_factory=dict)  # bytes
    differences: dict[str, float] = field(default_factory=dict)  # by method, on PEER_ROW
    skipped: dict[tuple[str, Problem], str] = field(default_factory=dict)  # why
    absent: list[str] = field(default_factory=list)  # peers that are not installed

    def least(self, problem: Problem, entry: Entry) -> float | None:
        samples = self.samples.get((problem, entry))
        return min(samples) if samples else None

    def ratio(self, problem: Problem, entry: Entry, other: Entry) -> float | None:
        mine, theirs = self.least(problem, entry), self.least(problem, other)
        return mine / theirs if mine and theirs else None


# What to measure


def plan(
    threads: Sequence[int], methods: Sequence[Method], quick: bool, device: str = "cpu"
) -> dict[Problem, list[Entry]]:
    """Each problem with all its entries: the tables' and the bars'."""
    entries: dict[Problem, dict[Entry, None]] = {}
    large = LARGE if device == "cuda" else []
    tables = [*SHAPES, *DTYPES, *LAYOUTS, *large]
    for problem in dict.fromkeys([*tables, *LENGTHS, *ROWS]):
        wanted = entries.setdefault(problem, {})
        for method in methods:
            if not (method.everywhere or problem.rows == 1 or problem in SHAPES):
                continue
            if quick and method.compiles:
                continue
            passes = [FORWARD, BOTH, LEARN] if method is OURS else [FORWARD, BOTH]
            if method is OURS and problem in large:
                passes += [BACK, BACK_LEARN]
            for which in passes:
                for count in threads if method.everywhere and problem in tables else [1]:
                    wanted[Entry(method.name, which, count)] = None
    for bar in BARS if device == "cpu" else []:
        for entry in (bar.ours, bar.other):
            if entry.threads in threads:
                entries.setdefault(bar.problem, {})[entry] = None
    return {problem: list(wanted) for problem, wanted in entries.items()}


def only_bars(entries: dict[Problem, list[Entry]]) -> dict[Problem, list[Entry]]:
    wanted: dict[Problem, dict[Entry, None]] = {}
    for bar in BARS:
        wanted.setdefault(bar.problem, {}).update(dict.fromkeys((bar.ours, bar.other)))
    return {
        problem: [entry for entry in some if entry in entries[problem]]
        for problem, some in wanted.items()
    }


# Measuring


def calls(
    run: Run, problem: Problem, entries: Iterable[Entry], methods: Sequence[Method], limits: Any
) -> dict[Entry, Contender]:
    """The contenders of one problem; run.skipped tells what is too slow, too large or fails."""
    if run.device == "cuda":
        most = torch.cuda.mem_get_info()[1]
        if TENSORS * problem.bytes > most:
            asked = f"needs {TENSORS * problem.bytes / 2**30:.0f} GiB"
            run.skipped["every method", problem] = f"{asked}, the GPU has {most / 2**30:.0f}"
            return {}
    x = problem.input(run.device)
    known: dict[str, dict[str, Any]] = {}
    asked = {entry.method for entry in entries}
    for method in methods:
        if method.name not in asked or not method.takes(problem, run.device):
            continue
        reason = method.reason_to_skip(problem, limits.max_seconds, limits.max_gib)
        if reason is None:
            known[method.name], reason = prepared(method, problem, x)
        if reason:
            run.skipped[method.name, problem] = reason
    threads = run.device == "cpu"
    return {
        entry: Contender(known[entry.method][entry.which], entry.threads if threads else None)
        for entry in entries
        if entry.which in known.get(entry.method, {})
    }


def prepared(method: Method, problem: Problem, x: Any) -> tuple[dict[str, Any], str | None]:
    """A method's calls, or none and the reason why: a peer may not be made for this machine."""
    if method in EVERYWHERE or method in FORUM:
        return method.calls(problem, x), None
    try:
        passes = method.calls(problem, x)
        passes[FORWARD]()
    except Exception as error:
        first, *_ = str(error).splitlines() or [""]
        return {}, f"raised {type(error).__name__}: {first}"
    return passes, None


def measure_times(
    run: Run,
    entries: dict[Problem, list[Entry]],
    methods: Sequence[Method],
    effort: Effort,
    limits: Any,
    progress: Progress,
) -> None:
    for problem in progress(list(entries)):
        contenders = calls(run, problem, entries[problem], methods, limits)
        for entry, samples in take_turns(contenders, effort, run.device).items():
            run.samples[problem, entry] = samples


def measure_memory(
    run: Run, methods: Sequence[Method], limits: Any, progress: Progress, problems: list[Problem]
) -> None:
    for problem in progress(problems):
        some = [method for method in methods if not method.own_memory]
        entries = [Entry(method.name, which) for method in some for which in (FORWARD, BOTH, LEARN)]
        for entry, contender in calls(run, problem, entries, methods, limits).items():
            contender.call()  # what is allocated once does not count
            peak = peak_bytes(contender.call, run.device)
            if peak is not None:
                run.memory[problem, entry] = peak


def measure_differences(run: Run, methods: Sequence[Method], limits: Any, row: Problem) -> None:
    """How far the results lie from ema_ext's, where they are meant to be the same."""
    entries = [Entry(method.name) for method in methods if not method.another]
    contenders = calls(run, row, entries, methods, limits)
    expected: Any = contenders[Entry(OURS.name)].call()
    for entry, contender in contenders.items():
        y: Any = contender.call()
        y = y.cpu() if isinstance(y, torch.Tensor) else y
        run.differences[entry.method] = difference(y, expected)


# Reporting


def table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Markdown; the first `texts` columns to the left, the others to the right."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|---" * texts + "|--:" * (len(header) - texts) + "|")
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def cell(value: float | None, text: str = "{:.2f}") -> str:
    return "-" if value is None else text.format(value)


def timed(run: Run, problem: Problem, entry: Entry) -> str:
    """The least time, and how far above it the median lies."""
    samples = run.samples.get((problem, entry))
    if not samples:
        return "-"
    return f"{readable(min(samples))} (+{median(samples) / min(samples) - 1:.0%})"


def against_torch(
    run: Run, problems: Sequence[Problem], title: str, passes: Sequence[str] = (FORWARD, BOTH)
) -> str:
    """ema_ext's times, and their ratios to torch.clone's and torch.cumsum's.

    A backward pass alone, which copies do not have, goes by clone's forward.
    """
    rows = []
    for problem in problems:
        row = [problem.name]
        for which in passes:
            for threads in run.threads:
                entry = Entry(OURS.name, which, threads)
                copied = which if which == BOTH else FORWARD
                clone, cumsum = (Entry(m.name, copied, threads) for m in (CLONE, CUMSUM))
                row.append(timed(run, problem, entry))
                row.append(cell(run.ratio(problem, entry, clone)))
                if which == FORWARD:
                    row.append(cell(run.ratio(problem, cumsum, entry), "{:.1f}"))
        rows.append(row)
    header = [title]
    for which in passes:
        for threads in run.threads:
            count = f", {threads} threads" if threads > 1 else ""
            header += [which + count, "/ clone"]
            if which == FORWARD:
                header.append("cumsum /")
    return table(header, rows)


def peer_table(run: Run, methods: Sequence[Method], problem: Problem) -> str:
    """Every method on one problem, forward, one thread."""
    timings = []
    for method in methods:
        least = run.least(problem, Entry(method.name))
        if least is not None:
            timings.append((least, method))
    ours, clone = Entry(OURS.name), Entry(CLONE.name)
    rows = [
        [
            method.name,
            method.note,
            timed(run, problem, Entry(method.name)),
            cell(run.ratio(problem, Entry(method.name), ours), "{:.1f}"),
            cell(run.ratio(problem, Entry(method.name), clone), "{:.1f}"),
            cell(run.differences.get(method.name), "{:.0e}"),
        ]
        for _, method in sorted(timings, key=lambda pair: pair[0])
    ]
    header = [problem.name, "", "forward", "/ ema_ext", "/ clone", "difference"]
    return table(header, rows, texts=2)


def verdict(run: Run, bar: Bar) -> dict[str, Any]:
    """What a bar asks for and what was measured: `met` is None where it was not."""
    result: dict[str, Any] = {
        "problem": bar.problem.name,
        "claim": bar.claim,
        "bar": f"{'<=' if bar.at_most else '>='} {bar.limit:g}",
        "measured": None,
        "median": None,
        "met": None,
    }
    samples = {entry: run.samples.get((bar.problem, entry)) for entry in (bar.ours, bar.other)}
    if all(samples.values()):
        measured = bar.ratio(lambda entry: min(samples[entry] or []))
        result["measured"] = measured
        result["median"] = bar.ratio(lambda entry: median(samples[entry] or []))
        result["met"] = bar.met(measured)
    return result


def bar_table(verdicts: Sequence[dict[str, Any]]) -> str:
    words = {True: "met", False: "**missed**", None: "not measured"}
    counts = ", ".join(
        f"{sum(v['met'] is m for v in verdicts)} {words[m].strip('*')}" for m in words
    )
    lines = table(
        ["bar", "ratio", "", "asked", "of the least", "of the medians"],
        (
            [
                v["problem"],
                v["claim"],
                words[v["met"]],
                v["bar"].replace("<=", "≤").replace(">=", "≥"),
                cell(v["measured"]),
                cell(v["median"]),
            ]
            for v in verdicts
        ),
        texts=3,
    )
    return f"{lines}\n\n{len(verdicts)} bars: {counts}."


def memory_table(run: Run, methods: Sequence[Method], problem: Problem) -> str:
    """Peak memory above what was there before the call, in sizes of x."""
    rows = []
    for method in methods:
        peaks = [
            run.memory.get((problem, Entry(method.name, which))) for which in (FORWARD, BOTH, LEARN)
        ]
        if any(peak is not None for peak in peaks):
            rows.append(
                [
                    method.name,
                    *(cell(None if p is None else p / problem.bytes, "{:.2f}") for p in peaks),
                ]
            )
    return table([f"peak memory, {problem.name}", FORWARD, BOTH, LEARN], rows)


def everything(run: Run) -> str:
    """One line for each timing, with its ratios to torch.clone and to ema_ext."""
    rows = []
    for (problem, entry), samples in run.samples.items():
        clone, ours = (Entry(m.name, entry.which, entry.threads) for m in (CLONE, OURS))
        rows.append(
            [
                problem.name,
                entry.name,
                readable(min(samples)),
                readable(median(samples)),
                readable(max(samples)),
                cell(run.ratio(problem, entry, clone)),
                cell(run.ratio(problem, entry, ours)),
            ]
        )
    header = ["problem", "call", "least", "median", "most", "/ clone", "/ ema_ext"]
    return table(header, rows, texts=2)


def left_out(run: Run) -> str:
    reasons: dict[str, list[str]] = {name: ["not installed"] for name in run.absent}
    for (method, problem), why in sorted(run.skipped.items(), key=lambda item: item[0][1].samples):
        reasons.setdefault(method, []).append(f"{problem.name} {why}")
    lines = []
    for method, (first, *more) in reasons.items():
        larger = f", and so {len(more)} larger problems" if more else ""
        lines.append(f"* {method}: {first}{larger}")
    return "\n".join(lines)


def machine(device: str) -> dict[str, str]:
    """What the figures depend on."""
    facts = {"processor": processor(), "device": device, **info.describe()}
    facts["load before"] = f"{LOAD:.1f}"
    if device == "cuda":
        facts["GPU"] = torch.cuda.get_device_name()
    return facts


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} CPUs" if names else platform.processor()


def as_json(run: Run, verdicts: Sequence[dict[str, Any]], command: str) -> dict[str, Any]:
    """What compare.py reads."""
    keys = [
        (asdict(problem) | {"name": problem.name, **asdict(entry)}, problem, entry)
        for problem, entry in run.samples
    ]
    return {
        "command": command,
        "machine": machine(run.device),
        "times": [key | {"seconds": run.samples[p, e]} for key, p, e in keys],
        "bars": list(verdicts),
        "memory": [
            {"name": problem.name, **asdict(entry), "bytes": peak}
            for (problem, entry), peak in run.memory.items()
        ],
        "differences": run.differences,
        "left_out": [[m, p.name, why] for (m, p), why in run.skipped.items()],
    }


def report(run: Run, methods: Sequence[Method], verdicts: Sequence[dict[str, Any]]) -> str:
    """The tables for a reader, in Markdown; those of the summary first."""
    measured = {problem for problem, _ in run.samples}

    def tables(title: str, problems: Sequence[Problem], *passes: str) -> list[str]:
        there = [problem for problem in problems if problem in measured]
        return [against_torch(run, there, title, passes or (FORWARD, BOTH))] if there else []

    peers = [PEER_ROW] if run.device == "cpu" else [PEER_ROW, PEER_BATCH]
    sections = {
        "Summary": [
            *tables("out of cache", LARGE, FORWARD, BACK, BACK_LEARN),
            *tables("float32", SHAPES),
            *(peer_table(run, methods, problem) for problem in peers),
        ],
        "Dtypes and layouts": [*tables("dtype", DTYPES), *tables("layout", LAYOUTS)],
        "Memory": [
            memory_table(run, methods, problem)
            for problem in dict.fromkeys(problem for problem, _ in run.memory)
        ],
        "Bars": [bar_table(verdicts)] if verdicts else [],
        "Left out": [left_out(run)],
    }
    return "\n\n".join(
        f"### {title}\n\n" + "\n\n".join(parts) for title, parts in sections.items() if any(parts)
    )


COLORS = {
    OURS.name: "#009e73",
    CLONE.name: "#000000",
    CUMSUM.name: "#888888",
    "for-loop (forum)": "#d55e00",
    "conv1d (forum)": "#0072b2",
    "weight matrix (forum)": "#e69f00",
    "weighted window (forum)": "#cc79a7",
}


def draw(run: Run, path: Path) -> None:
    """Time against length and against rows, forward on one thread, all axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 5.8), sharey=True, layout="constrained")
    views = (
        (panels[0], [*LENGTHS, PEER_ROW], "one row", "length (samples)", "length"),
        (panels[1], ROWS, "rows of 256 samples", "rows", "rows"),
    )
    palette = plt.get_cmap("tab10").colors
    others = iter(palette[:7] + palette[8:])  # grey is torch.cumsum's
    thread = ", one thread" if run.device == "cpu" else ""
    colors: dict[str, Any] = dict(COLORS)
    for panel, problems, title, label, axis in views:
        lines: dict[str, list[tuple[int, float]]] = {}
        for (problem, entry), samples in run.samples.items():
            wanted = axis == "length" or entry.method in {method.name for method in EVERYWHERE}
            if wanted and problem in problems and (entry.which, entry.threads) == (FORWARD, 1):
                point = getattr(problem, axis), min(samples)
                lines.setdefault(entry.method, []).append(point)
        for name, points in lines.items():
            if name not in colors:
                colors[name] = next(others, "#bbbbbb")
            panel.plot(
                *zip(*sorted(points), strict=True),
                color=colors[name],
                linestyle="-" if name in COLORS else "--",
                linewidth=2.5 if name == OURS.name else 1.3,
                marker="o",
                markersize=3,
                label=name,
            )
        panel.set(xscale="log", yscale="log", title=f"{title}, forward{thread}", xlabel=label)
        panel.grid(visible=True, which="major", color="#dddddd", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time per call (s)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def options_from(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples: under two minutes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", help="1 and 2, as far as there are CPUs")
    parser.add_argument("--only-bars", action="store_true", help="nothing but what the bars need")
    parser.add_argument("--details", action="store_true", help="print every timing as well")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="every sample")
    parser.add_argument("--plot", type=Path, default=Path("bench.png"), help="the growth, a PNG")
    parser.add_argument("--max-seconds", type=float, help="longest call allowed")
    parser.add_argument("--max-gib", type=float, default=1.0, help="memory allowed to the matrix")
    options = parser.parse_args(arguments)
    if options.max_seconds is None:
        options.max_seconds = 0.2 if options.quick else 6.0
    if options.device == "cuda":
        if options.only_bars or options.threads:
            parser.error("--only-bars and --threads are for --device cpu")
        options.threads = [1]
    if options.threads is None:
        options.threads = [count for count in (1, 2) if count <= torch.get_num_threads()]
    return options


def check_cuda() -> None:
    """Ends the program where there is nothing to measure."""
    if not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device on this machine")
    try:
        ema_ext.ema(torch.zeros(1, device="cuda"), 0.5)
    except RuntimeError as error:
        sys.exit(f"--device cuda: {error}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_from(arguments)
    if options.device == "cuda":
        check_cuda()
    from tqdm import tqdm

    if LOAD > BUSY:
        print(f"the machine is busy (load {LOAD:.1f}): expect noise", file=sys.stderr)
    began = time.perf_counter()
    peers, absent = installed_peers(options.device)
    methods = [OURS, CLONE, CUMSUM, *FORUM, *peers]
    run = Run(options.device, options.threads, absent=absent)
    entries = plan(run.threads, methods, options.quick, options.device)
    if options.only_bars:
        entries = only_bars(entries)

    def progress(description: str) -> Progress:
        return lambda items: tqdm(items, desc=description, file=sys.stderr)

    effort = QUICK if options.quick else FULL
    measure_times(run, entries, methods, effort, options, progress("times"))
    if not options.only_bars:
        measure_differences(run, methods, options, PEER_ROW)
        some = [OURS, CLONE, CUMSUM] if options.quick else methods
        measure_memory(run, some, options, progress("memory"), MEMORY)
        draw(run, options.plot)
    verdicts = [verdict(run, bar) for bar in BARS] if options.device == "cpu" else []
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python benchmarks/bench.py", *given])
    options.json.write_text(json.dumps(as_json(run, verdicts, command), indent=1) + "\n")

    facts = machine(options.device)
    where = facts.get("GPU", f"{facts['processor']}, {facts['CPU level']}")
    print(
        f"`{command}` on {where}, torch {torch.__version__}, alpha 2/{PERIOD + 1}. A time is the "
        f"least of its samples; in brackets, how far above it their median lies."
        + " Where no threads are named, one runs.\n"
        * (options.device == "cpu")
    )
    print(bar_table(verdicts) if options.only_bars else report(run, methods, verdicts))
    if options.details:
        print("\n" + everything(run))
    print(f"\n{time.perf_counter() - began:.0f} s in all; every sample in {options.json}")


if __name__ == "__main__":
    main()
