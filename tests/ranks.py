"""Runs checks in real processes that share a gloo process group, and brings back what they found.

A check is a function of no arguments that every rank calls; it may use torch.distributed freely.
"""

from __future__ import annotations

import datetime
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import bounds
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

Check = Callable[[], None]

#: Modules that the checks need, or that torch imports as they ask for its compiler and DTensor.
PRELOADED = [
    "ranks",
    "ema_ext.distributed",
    "torch._dynamo",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.experimental",
]

#: What a collective may wait for a rank, and what all checks of one world may take: seconds.
PATIENCE, LIMIT = 30, 150


def run(checks: Sequence[Check], world: int) -> dict[str, str]:
    """Name of each check -> the traceback of the first rank that it failed on, or "".

    Every rank runs them, in order, in one process each, up to the first that fails: what a rank
    that has failed sends, or does not, is the others' next failure. The rest did not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = start(_work, (world, checks, folder), world)
        ended = "the others ended"
        try:
            wait(context, LIMIT)
        except (TimeoutError, mp.ProcessExitedException) as error:
            ended = str(error)
        finally:
            for process in context.processes:
                process.kill()
        found = {check.__name__: "" for check in checks}
        for rank in range(world):
            path = Path(folder) / f"{rank}.json"
            results, worst = json.loads(path.read_text()) if path.exists() else ({}, {})
            for name in found:
                found[name] = found[name] or results.get(
                    name, f"rank {rank} did not run it: {ended}"
                )
            for label, ratio in worst.items():
                bounds.WORST[label] = max(bounds.WORST.get(label, 0.0), ratio)
        return found


def start(
    work: Callable[..., None], arguments: tuple[object, ...], count: int
) -> mp.ProcessContext:
    """``count`` processes, each at work(rank, *arguments); what takes long to import is so once."""
    mp.set_forkserver_preload(PRELOADED)
    return mp.start_processes(work, arguments, nprocs=count, join=False, start_method="forkserver")


def wait(context: mp.ProcessContext, seconds: float) -> None:
    """Raises TimeoutError where processes take longer, and what mp raises where one fails."""
    deadline = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes still at work after {seconds} s")


def join_group(rank: int, world: int, folder: str, seconds: float = PATIENCE) -> None:
    """Enter the default group of all processes that were given the same folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
    )


def _work(rank: int, world: int, checks: Sequence[Check], folder: str) -> None:
    join_group(rank, world, folder)
    results: dict[str, str] = {}
    for check in checks:
        try:
            check()
            results[check.__name__] = ""
        except (Exception, pytest.fail.Exception):
            results[check.__name__] = f"rank {rank} of {world}\n{traceback.format_exc()}"
        (Path(folder) / f"{rank}.json").write_text(json.dumps((results, bounds.WORST)))
        if results[check.__name__]:
            return
    dist.destroy_process_group()


def cut(x: Tensor, lengths: Sequence[int], dim: int = -1) -> Tensor:
    """This rank's piece, as a tensor of its own."""
    return x.split(list(lengths), dim)[dist.get_rank()].clone()


def whole(piece: Tensor, dim: int = -1) -> Tensor:
    """The pieces of all ranks as one."""
    return torch.cat(each(piece), dim)


def each(value: Tensor) -> list[Tensor]:
    """The value that each rank has."""
    everyones: list[Tensor] = [value] * dist.get_world_size()
    dist.all_gather_object(everyones, value.detach())
    return everyones
