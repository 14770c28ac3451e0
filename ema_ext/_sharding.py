"""How DTensor runs the operators: sharded along batch and channels as they are, never along time.

Rows are independent, so a shard of them needs nobody. `prepare` registers the rules, once a DTensor
is met: torch.distributed.tensor takes longer to import than the whole package.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from ema_ext import _ops

#: What each result of an operator is shaped like, in the words of _ops.ROLES.
_RESULTS = {
    "ema": ("x",),
    "ema.Samples": ("x",),
    "ema.Tensor": ("x",),
    "ema_with_state": ("x", "state"),
    "ema_with_state.Tensor": ("x", "state"),
    "ema_backward": ("x", "state"),
    "ema_backward.Samples": ("x",),
    "ema_backward.Tensor": ("x", "grad_alpha", "state"),
    "ema_backward.Varying": ("x", "grad_alpha", "state"),
    "linear_recurrence": ("x",),
    "linear_recurrence_with_state": ("x", "state"),
    "linear_recurrence_backward": ("grad_alpha", "x", "state"),
    "sum_to": ("grad_alpha",),
}


def prepare(dim: int, /, **arguments: Any) -> None:
    """If the first of the arguments, by name, is a DTensor, let it run the operators; ValueError if
    any that expands to it is sharded along ``dim``, which is one of the first's."""
    whole, *_ = arguments.values()
    if not _is_dtensor(whole):
        return
    for name, value in arguments.items():
        if not _is_dtensor(value):
            continue
        axis = dim - whole.dim() + value.dim()
        if axis >= 0 and any(placement.is_shard(axis) for placement in value.placements):
            raise ValueError(
                f"{name} is sharded along dim {axis}, the dimension of time: {value.placements}; "
                f"ema_ext.distributed takes the local piece, {name}.to_local(), and the mesh's "
                f"group"
            )
    _register()


def refuse(name: str, value: Any) -> None:
    """TypeError if value is a DTensor, where a rank's own piece is wanted."""
    if _is_dtensor(value):
        raise TypeError(
            f"{name} must be this rank's piece, got a DTensor of {value.placements}: "
            f"pass {name}.to_local()"
        )


def beside(x: Any, number: Tensor) -> Tensor:
    """A number that stands beside x in an operator: a DTensor as well if x is one."""
    if not _is_dtensor(x):
        return number
    from torch.distributed.tensor import DTensor, Replicate

    mesh = x.device_mesh
    return DTensor.from_local(number.to(x.device), mesh, [Replicate()] * mesh.ndim)


def _is_dtensor(x: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


@functools.cache
def _register() -> None:
    from torch.distributed.tensor.experimental import register_sharding

    for operator in _RESULTS:
        name, _, overload = operator.partition(".")
        op = getattr(getattr(torch.ops.ema_ext, name), overload or "default")
        register_sharding(op)(functools.partial(_placements, operator))


def _placements(operator: str, *arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    """(results, arguments) for one dimension of the mesh: replicated, or one of x's sharded."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    every = _ops.ROLES[operator]
    roles = every[: len(arguments)]  # the others keep their defaults
    x = arguments[roles.index("x")]
    dim = arguments[roles.index("dim")] if "dim" in roles else -1
    time = dim + x.ndim * (dim < 0) if "dim" in every else x.ndim
    alpha: Any = arguments[roles.index("alpha")] if "alpha" in roles else None

    def shard(role: str, shape: Any, sharded: int) -> Any:
        """How a tensor that expands to that role lies if x is sharded along ``sharded``."""
        if role == "state" and sharded > time:
            sharded -= 1
        at = sharded - (x.ndim - (role == "state")) + len(shape)
        return Shard(at) if at >= 0 and shape[at] != 1 else Replicate()

    def result(role: str, sharded: int) -> Any:
        if role == "grad_alpha":
            own = shard("alpha", alpha.shape, sharded)
            return Partial() if own.is_replicate() else own
        return Shard(sharded - (role == "state" and sharded > time))

    tensors = [hasattr(argument, "shape") for argument in arguments]
    everywhere = [Replicate() if tensor else None for tensor in tensors]
    found: list[tuple[list[Any], list[Any]]] = [
        ([Replicate() for _ in _RESULTS[operator]], everywhere)
    ]
    for sharded in range(x.ndim):
        if sharded != time:
            given = [
                shard(role, argument.shape, sharded) if tensor else None
                for role, argument, tensor in zip(roles, arguments, tensors, strict=True)
            ]
            found.append(([result(role, sharded) for role in _RESULTS[operator]], given))
    return found
