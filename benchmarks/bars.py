"""The bars: how fast the CPU kernels are meant to be, each as a ratio within one run.

A bar names two timings of one problem. "At most" holds ours / other, "at least" holds other / ours,
both of the least samples. Where no number of threads is named, one thread runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from methods import BACK, BACK_LEARN, BOTH, FORWARD, LEARN, Problem


@dataclass(frozen=True)
class Entry:
    """One timing of a problem."""

    method: str
    which: str = FORWARD
    threads: int = 1

    @property
    def name(self) -> str:
        pass_name = "" if self.which == FORWARD else f", {self.which}"
        return f"{self.method}{pass_name}" + ("" if self.threads == 1 else ", two threads")


@dataclass(frozen=True)
class Bar:
    """A limit to the ratio of two timings of one problem."""

    problem: Problem
    ours: Entry
    other: Entry
    limit: float
    at_most: bool

    @property
    def claim(self) -> str:
        """What is divided by what."""
        above, below = (self.ours, self.other) if self.at_most else (self.other, self.ours)
        return f"{above.name} / {below.name}"

    def ratio(self, time: Callable[[Entry], float]) -> float:
        ratio = time(self.ours) / time(self.other)
        return ratio if self.at_most else 1 / ratio

    def met(self, ratio: float) -> bool:
        return ratio <= self.limit if self.at_most else ratio >= self.limit


SHORT_ROW = Problem((1, 10_000))
ROW = Problem((1, 300_000))
CALL = Problem((1, 64))
IN_CACHE = Problem((16, 4096))
OUT_OF_CACHE = Problem((64, 16384))


def _within(problem: Problem, limit: float, other: Entry, ours: Entry | None = None) -> Bar:
    return Bar(problem, ours or Entry("ema_ext", other.which, other.threads), other, limit, True)


def _times_faster(problem: Problem, limit: float, other: Entry) -> Bar:
    ours = Entry("ema_ext", other.which, other.threads)
    return Bar(problem, ours, other, limit, False)


def _all() -> Iterator[Bar]:
    yield _times_faster(SHORT_ROW, 10, Entry("C loop"))
    yield _times_faster(SHORT_ROW, 3, Entry("torch.cumsum"))

    yield _within(ROW, 1.4, Entry("torch.clone"))
    yield _times_faster(ROW, 6, Entry("torch.cumsum"))

    shapes = {(64, 16384): 1.4, (1024, 4096): 1.2, (16, 64, 4096): 1.25, (4096, 1024): 1.5}
    for shape, limit in shapes.items():
        for threads in (1, 2):
            yield _within(Problem(shape), limit, Entry("torch.clone", threads=threads))
    for threads in (1, 2):
        yield _within(Problem((1, 10_000_000)), 0.4, Entry("torch.clone", threads=threads))

    strided = Problem((16, 4096, 64), dim=1)
    yield _within(strided, 1.1, Entry("torch.clone"))
    yield _within(strided, 1.5, Entry("torch.clone", threads=2))
    for threads in (1, 2):
        yield _times_faster(strided, 8, Entry("torch.cumsum", threads=threads))

    for length in (1_000_000, 10_000_000):
        two, one = Entry("ema_ext", threads=2), Entry("ema_ext")
        yield _within(Problem((1, length)), 0.7, one, two)

    for dtype in ("bfloat16", "float16"):
        half = Problem((64, 16384), dtype=dtype)
        yield _within(half, 2.7, Entry("torch.clone"))
        yield _times_faster(half, 4, Entry("torch.cumsum"))

    forward = Entry("ema_ext")
    for problem in (IN_CACHE, OUT_OF_CACHE):
        yield _within(problem, 1.2, forward, Entry("ema_ext", BACK))
    yield _within(IN_CACHE, 1.6, forward, Entry("ema_ext", BACK_LEARN))
    yield _within(OUT_OF_CACHE, 3.5, forward, Entry("ema_ext", BOTH))
    yield _within(OUT_OF_CACHE, 5, forward, Entry("ema_ext", LEARN))

    yield _within(CALL, 2.4, Entry("torch.clone"))
    yield _within(CALL, 1.7, Entry("torch.clone", BOTH))

    peers = {
        "scipy lfilter": 30,
        "pandas ewm": 40,
        "polars ewm_mean": 40,
        "numba loop": 12,
        "jax associative_scan": 20,
        "conv1d (forum)": 100,
    }
    for peer, limit in peers.items():
        yield _times_faster(ROW, limit, Entry(peer))


BARS = list(_all())
