"""The ranks of a process group as a line along time, and what they tell each other.

All that travels does so by torch's functional collectives: operators that return a tensor, which
nobody may read before `wait_tensor`, and that autograd knows, to any order. They are called as they
are: torch.distributed._functional_collectives wraps their results, at four times the cost.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: all_gather_into_tensor, all_reduce, wait_tensor
_collectives: Any = torch.ops._c10d_functional

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Line:
    """The ranks of a group in the order in which a scan meets them."""

    group: dist.ProcessGroup
    reverse: bool
    size: int
    place: int  # this rank's

    @staticmethod
    def of(group: Group, reverse: bool) -> Line:
        group = group if group is not None or not dist.is_available() else dist.group.WORLD
        if group is None:
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
        return self.arrived(self.send(message))

    def send(self, message: Tensor) -> Tensor:
        """The same before it has arrived."""
        sent: Tensor = _collectives.all_gather_into_tensor(
            message[None].contiguous(), self.size, self.group.group_name
        )
        return sent

    def arrived(self, sent: Tensor) -> Tensor:
        """Wait for what `send` returned; RuntimeError where the group's timeout ends the wait."""
        gathered: Tensor = _collectives.wait_tensor(sent)
        return gathered.flip(0) if self.reverse else gathered

    def total(self, share: Tensor) -> Tensor:
        """The sum of all ranks' shares, on every rank."""
        name = self.group.group_name
        summed: Tensor = _collectives.wait_tensor(
            _collectives.all_reduce(share.contiguous(), "sum", name)
        )
        return summed


class Lengths:
    """The lengths of all pieces, under way while this rank aggregates its own."""

    def __init__(self, line: Line, length: int, common: dict[str, object], like: Tensor) -> None:
        self.line, self.common = line, common
        digest = zlib.crc32(repr(common).encode())
        own = torch.tensor([digest, length], device=like.device)
        self.sent = line.send(own)

    def wait(self) -> list[int]:
        """In the line's order. Raises ValueError where ranks differ in what must be common."""
        headers: list[tuple[int, int]] = self.line.arrived(self.sent).tolist()
        if len({digest for digest, _ in headers}) > 1:
            self._raise()
        return [length for _, length in headers]

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
