"""How every benchmark here measures time and memory.

**Time.** Contenders take turns in one process, in an order shuffled anew each round, so that what
the machine does meanwhile meets all of them alike. A turn is one untimed call, which brings data
and threads back, and then as many timed calls as make up the least sample; it yields one sample,
in seconds per call. The least of the samples is the figure; their median tells how often the
machine came near it. What is free goes back to the system beforehand, so that results so large that
malloc maps them anew at each call do not find room by chance.

**Memory.** How far one call raises the process's peak (on CUDA: that of torch's allocator).
"""

from __future__ import annotations

import ctypes
import gc
import random
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)

#: glibc's way of handing free memory back; nothing elsewhere.
hand_back: Callable[[int], object] = getattr(ctypes.CDLL(None), "malloc_trim", int)

UNHURRIED = 0.25  # seconds; a longer call warms itself up


@dataclass(frozen=True)
class Contender:
    """One call to be timed and the number of torch's threads it gets (None: as it is)."""

    call: Call
    threads: int | None = None


@dataclass(frozen=True)
class Effort:
    """How much time goes into one contender."""

    rounds: int  # samples, at most
    sample: float  # seconds of one sample, at least
    budget: float  # seconds of all samples, about; two are taken in any case

    def plan(self, once: float) -> tuple[int, int]:
        """Calls a sample and samples, for a call that took `once` seconds."""
        repeats = max(1, round(self.sample / once))
        return repeats, max(2, min(self.rounds, round(self.budget / (once * repeats))))


def take_turns(
    contenders: Mapping[Key, Contender], effort: Effort, device: str = "cpu", seed: int = 0
) -> dict[Key, list[float]]:
    """The samples of each contender, in seconds per call."""
    order, threads = random.Random(seed), torch.get_num_threads()
    samples: dict[Key, list[float]] = {key: [] for key in contenders}
    collecting = gc.isenabled()
    gc.collect()
    hand_back(0)
    gc.disable()
    try:
        plans = {}
        for key, contender in contenders.items():
            contender.call()  # the very first one may import, compile or allocate
            once = _turn(contender, 1, device)
            if once < UNHURRIED / 10:  # an unlucky look would settle on too few calls
                once = min(once, *(_turn(contender, 1, device) for _ in range(2)))
            plans[key] = effort.plan(once)
            if plans[key][0] == 1:
                samples[key].append(once)
        for _ in range(max(2, effort.rounds)):
            for key in order.sample(list(contenders), len(contenders)):
                repeats, rounds = plans[key]
                if len(samples[key]) < rounds:
                    samples[key].append(_turn(contenders[key], repeats, device))
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()
    return samples


def _turn(contender: Contender, repeats: int, device: str) -> float:
    """Seconds per call, after a warm-up unless the call is long."""
    if contender.threads is not None:
        torch.set_num_threads(contender.threads)
    seconds = _seconds_cuda if device == "cuda" else _seconds
    once = seconds(contender.call, 1)
    if repeats == 1 and once > UNHURRIED:
        return once
    return seconds(contender.call, repeats)


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _seconds_cuda(call: Call, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def peak_bytes(call: Call, device: str = "cpu") -> int | None:
    """How far one call raises the peak of memory in use, or None where the system does not tell.

    On the CPU to be read for results of 64 MiB or more: smaller blocks may be reused ones.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        return None
    before = _status("VmRSS")
    kept = call()
    peak = _status("VmHWM")
    del kept
    return peak - before


def _status(field: str) -> int:
    """A field of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10


def readable(seconds: float) -> str:
    """Seconds with three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{seconds * 1e6:#.3g}".rstrip(".") + " µs"
