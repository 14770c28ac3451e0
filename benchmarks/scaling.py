"""Weak scaling of ema_ext.distributed: the same piece on every rank, over 1, 2 and 4 ranks.

    python benchmarks/scaling.py

Prints Markdown: the time of a step (the slowest rank's, least of the rounds), forward and forward +
backward, beside that of ema_ext.ema on its piece alone, and the bytes that each rank sends; for one
alpha, and for one per sample. A rank runs on one thread, so as many ranks as there are cores do not
disturb each other; a row of the table with more ranks than cores says so. The network is this
machine's own memory (gloo).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import readable
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import ema_ext
from ema_ext import distributed

ALPHA = 1e-3
SHAPES = [(1, 10_000_000), (1, 100_000), (64, 100_000), (4096, 1000)]  # of one rank's piece
RANKS = [1, 2, 4]

Scan = Callable[[Tensor], Tensor]


def both(scan: Scan, x: Tensor) -> Tensor:
    """Forward and backward."""
    y = scan(x)
    (gradient,) = torch.autograd.grad(y, x, y.detach())
    return gradient


def seconds(call: Callable[[], object], rounds: int) -> float:
    """The least over the rounds of the slowest rank's time."""
    best = torch.inf
    call()
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        call()
        took = torch.tensor(time.perf_counter() - began)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        best = min(best, float(took))
    return best


class Traffic(TorchDispatchMode):
    """Notes each message that this rank gives to every other one: the collective, and the bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        library, name = operator.name().split("::")
        if "c10d" in library and "wait" not in name:
            self.sent.append((name, arguments[0].nbytes))
        return operator(*arguments, **(options or {}))


def work(rank: int, world: int, folder: str, rounds: int) -> None:
    """One rank; the first writes (alone, sharded, bytes) for each shape and pass."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    found = {}
    for shape in SHAPES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        for kind, alpha in (("", ALPHA), (", alpha per sample", torch.full(shape, ALPHA))):
            scans: list[Scan] = [
                lambda x, alpha=alpha: ema_ext.ema(x, alpha),
                lambda x, alpha=alpha: distributed.ema(x, alpha),
            ]
            for name, run in (("forward", lambda scan, x: scan(x)), ("forward + backward", both)):
                alone, sharded = (seconds(lambda s=s, r=run, x=x: r(s, x), rounds) for s in scans)
                with Traffic() as traffic:
                    run(scans[1], x)
                sent = sum(count for _, count in traffic.sent)
                found[shape, name + kind] = alone, sharded, sent
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


def measure(world: int, rounds: int) -> dict[tuple[tuple[int, int], str], tuple[float, float, int]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (world, folder, rounds), nprocs=world)
        found: dict[tuple[tuple[int, int], str], tuple[float, float, int]]
        found = torch.load(Path(folder) / "found.pt")
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="timings of each step")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    runs = {world: measure(world, options.rounds) for world in tqdm(RANKS, desc="ranks")}

    print(f"torch {torch.__version__}, gloo, {cores} cores, float32, alpha {ALPHA}\n")
    print("| piece of a rank | pass | ranks | alone | sharded | sharded / alone | sent by a rank |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for shape, name in runs[RANKS[0]]:
        for world, found in runs.items():
            alone, sharded, sent = found[shape, name]
            crowd = "*" if world > cores else ""
            print(
                f"| {shape[0]} x {shape[1]} | {name} | {world}{crowd} | {readable(alone)} "
                f"| {readable(sharded)} | {sharded / alone:.2f} | {sent} B |"
            )
    if max(RANKS) > cores:
        print("\n\\* more ranks than cores: they take turns.")


if __name__ == "__main__":
    main()
