"""What moved between two runs of bench.py, beyond the noise of both.

    python benchmarks/compare.py before.json after.json

Only ratios within one run carry over from run to run, so what is compared is a method's least time
divided by that of torch.clone with the same problem, pass and threads: r = m / k. (A pass that
clone lacks goes by clone's forward.)

The noise comes from the runs themselves. A quarter of a timing's samples lie within q = log(lower
quartile / least) of the least, so that is how far the least is off where a run had less luck; r is
off by the method's q and by the clone's. And what nobody changed, torch.cumsum and the peers, is
the control: 19 of 20 of its ratios changed by no more than some d. A ratio has moved where

    |log(r after / r before)| > max(q + q of the run before + q + q of the run after, d, 5 %).

The 5 % are what the placement of code and memory changes from one process to the next.

Exits with 1 if an ema_ext timing became slower beyond the noise, or a bar once met is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

FLOOR = math.log(1.05)
CLONE, OURS = "torch.clone", "ema_ext"

Key = tuple[str, str, str, int]  # problem, method, pass, threads


@dataclasses.dataclass(frozen=True)
class Move:
    """A ratio to torch.clone in both runs, and the noise of its logarithm."""

    key: Key
    before: float
    after: float
    noise: float

    @property
    def change(self) -> float:
        return math.log(self.after / self.before)

    @property
    def beyond_noise(self) -> bool:
        return abs(self.change) > self.noise

    def __str__(self) -> str:
        problem, method, which, threads = self.key
        where = f"{problem}, {method}, {which}, {threads} thread{'s' * (threads > 1)}"
        change, noise = math.expm1(self.change), math.expm1(self.noise)
        return f"{where}: {self.before:.2f} -> {self.after:.2f} ({change:+.0%}, noise {noise:.0%})"


def timings(run: dict[str, Any]) -> dict[Key, list[float]]:
    """The samples of a run, in seconds."""
    return {
        (time["name"], time["method"], time["which"], time["threads"]): time["seconds"]
        for time in run["times"]
    }


def unsteadiness(samples: Sequence[float]) -> float:
    """log(lower quartile / least)."""
    if len(samples) < 2:
        return math.inf  # one sample says nothing of its noise
    return math.log(quantiles(samples, n=4, method="inclusive")[0] / min(samples))


def moves(before: dict[str, Any], after: dict[str, Any]) -> list[Move]:
    """The ratios that both runs have, moved or not."""
    old, new = timings(before), timings(after)
    found = []
    for key in old.keys() & new.keys():
        problem, method, which, threads = key
        own = (problem, CLONE, which, threads)  # passes that clone lacks go by its forward
        clone = own if own in old else (problem, CLONE, "forward", threads)
        if method == CLONE or clone not in old or clone not in new:
            continue
        ratios = [min(run[key]) / min(run[clone]) for run in (old, new)]
        noise = sum(unsteadiness(run[k]) for run in (old, new) for k in (key, clone))
        found.append(Move(key, *ratios, max(noise, FLOOR)))
    return sorted(found, key=lambda move: -abs(move.change))


def control(compared: Sequence[Move]) -> float:
    """d: what 19 of 20 ratios that nobody changed stayed within, as a logarithm."""
    sizes = sorted(abs(move.change) for move in compared if move.key[1] != OURS)
    return sizes[math.ceil(0.95 * len(sizes)) - 1] if sizes else 0.0


def changed_bars(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The bars whose verdict is another, as sentences; a bar lost begins with "missed"."""
    old = {(bar["problem"], bar["claim"]): bar for bar in before["bars"]}
    sentences = []
    for bar in after["bars"]:
        was = old.get((bar["problem"], bar["claim"]))
        if was and None not in (was["met"], bar["met"]) and was["met"] != bar["met"]:
            verdict = "met" if bar["met"] else "missed"
            sentences.append(
                f"{verdict} now: {bar['problem']}, {bar['claim']} {bar['bar']}: "
                f"{was['measured']:.2f} -> {bar['measured']:.2f}"
            )
    return sentences


def unlike(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The facts about machine and software in which the runs differ."""
    old, new = before["machine"], after["machine"]
    return [
        f"{fact}: {old.get(fact)} -> {new.get(fact)}"
        for fact in {**old, **new}
        if old.get(fact) != new.get(fact)
    ]


def report(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, bool]:
    """The text, and whether ema_ext lost something."""
    compared = moves(before, after)
    drift = control(compared)
    ours = [
        dataclasses.replace(move, noise=max(move.noise, drift))
        for move in compared
        if move.key[1] == OURS
    ]
    moved = [move for move in ours if move.beyond_noise]
    bars = changed_bars(before, after)
    slower = [str(move) for move in moved if move.change > 0]
    faster = [str(move) for move in moved if move.change < 0]

    parts = [
        ("the runs differ in", unlike(before, after)),
        ("ema_ext slower, time / torch.clone", slower),
        ("ema_ext faster, time / torch.clone", faster),
        ("bars", bars),
    ]
    text = "\n\n".join(
        f"{title}:\n" + "\n".join(f"  {line}" for line in lines) for title, lines in parts if lines
    )
    text += (
        f"\n\n{len(moved)} of {len(ours)} ema_ext timings moved; "
        f"control: what nobody changed stayed within {math.expm1(drift):.0%}."
    )
    return text.strip(), bool(slower) or any(line.startswith("missed") for line in bars)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
    text, lost = report(before, after)
    print(text)
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
