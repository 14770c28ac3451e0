"""The ranks of a process group as a line along time, and what they tell each other.

Everything that travels does so through `Line.gather`: one all-gather of torch.distributed.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Line:
    """The ranks of a group in the order in which a scan meets them."""

    group: Group
    reverse: bool
    size: int
    place: int  # this rank's

    @staticmethod
    def of(group: Group, reverse: bool) -> Line:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "ema_ext.distributed needs a process group: call "
                "torch.distributed.init_process_group first, or use ema_ext in one process"
            )
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise RuntimeError("ema_ext.distributed: this process is not a member of group")
        return Line(group, bool(reverse), size, size - 1 - rank if reverse else rank)

    def turned(self) -> Line:
        """The same ranks met from the other end."""
        return Line(self.group, not self.reverse, self.size, self.size - 1 - self.place)

    def gather(self, message: Tensor) -> Tensor:
        """The messages of all ranks, stacked along a new first dimension in the line's order."""
        gathered = message.new_empty(self.size, *message.shape)
        dist.all_gather_single(gathered, message[None].contiguous(), group=self.group)
        return gathered.flip(0) if self.reverse else gathered

    def total(self, share: Tensor) -> Tensor:
        """The sum of all ranks' shares, on every rank; differentiable to any order."""
        result: Tensor = _Total.apply(self, share)  # type: ignore[no-untyped-call]
        return result


class Lengths:
    """The lengths of all pieces, under way while this rank aggregates its own."""

    def __init__(self, line: Line, length: int, common: dict[str, object], like: Tensor) -> None:
        self.line, self.common = line, common
        digest = zlib.crc32(repr(common).encode())
        own = torch.tensor([digest, length], device=like.device)
        self.headers = own.new_empty(line.size, 2)
        self.work = dist.all_gather_single(self.headers, own[None], group=line.group, async_op=True)

    def wait(self) -> list[int]:
        """In the line's order. Raises ValueError where ranks differ in what must be common."""
        self.work.wait()
        headers: list[tuple[int, int]] = self.headers.tolist()
        if len({digest for digest, _ in headers}) > 1:
            self._raise()
        lengths = [length for _, length in headers]
        return lengths[::-1] if self.line.reverse else lengths

    def _raise(self) -> None:
        everyones: list[Any] = [None] * self.line.size
        dist.all_gather_object(everyones, self.common, group=self.line.group)
        for rank, theirs in enumerate(everyones):
            for name, value in everyones[0].items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"ema_ext.distributed: {name} must be the same on every rank, "
                        f"got {value} on rank 0 and {theirs.get(name)} on rank {rank}"
                    )


class _Total(Function):
    """The sum over ranks. It is its own transpose: every rank's result has a gradient."""

    @staticmethod
    def forward(ctx: Any, line: Line, share: Tensor) -> Tensor:
        ctx.line = line
        return line.gather(share).sum(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, ctx.line.total(gradient)
