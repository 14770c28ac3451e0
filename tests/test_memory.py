"""No hidden copy: a call allocates its result and something per row; the graph keeps no y."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import signal
from torch import Tensor

from ema_ext import ema

MIB = 1 << 20
# What the process may grow by besides the results: a huge page, thread stacks, the allocator.
NOISE = 4 * MIB

#: layout, dim, dtype
CASES = (
    ("contiguous", 2, "float32"),
    ("contiguous", 1, "float32"),
    ("contiguous", 0, "float32"),
    ("contiguous", 2, "bfloat16"),
    ("transposed", 2, "float32"),
    ("sliced", 2, "float32"),
    ("expanded", 2, "float32"),
    ("expanded", 0, "float16"),
)

SCRIPT = """
import json, sys
import torch
import cases
from ema_ext import ema

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) << 10

def peak(run):
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # forget the high-water mark
    before = memory("VmRSS")
    kept = run()
    return memory("VmHWM") - before

def measure(x, dim):
    grad_y = torch.ones_like(x)
    result = {"result": grad_y.nbytes, "forward": peak(lambda: ema(x, 0.1, dim=dim))}
    leaf = x.requires_grad_()
    for name, alpha in {"fixed": 0.1, "learned": torch.tensor(0.1, requires_grad=True)}.items():
        wanted = [leaf] if name == "fixed" else [leaf, alpha]
        y = ema(leaf, alpha, dim=dim)
        result[name] = peak(lambda: torch.autograd.grad(y, wanted, grad_y))
        del y
    return result

measure(torch.ones(2, 3, 100), 1)  # what torch imports and allocates once does not count
for layout, dim, dtype in json.loads(sys.argv[1]):
    shape = 64, 64, 4096
    if layout == "expanded":
        x = torch.ones(1, *shape[1:], dtype=getattr(torch, dtype)).expand(shape)
    else:
        x = cases.LAYOUTS[layout](torch.ones(shape, dtype=getattr(torch, dtype)))
    print(json.dumps(measure(x.detach(), dim)))
"""


@pytest.fixture(scope="module")
def measured() -> list[dict[str, int]]:
    """Bytes per case, from a process of its own: peaks of the forward and of two backwards."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(CASES)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("call", ["forward", "fixed", "learned"])
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_peak_memory(case: int, call: str, measured: list[dict[str, int]]) -> None:
    """Catches a contiguous() or a float() of the whole input; backward: alpha fixed or learned."""
    assert measured[case][call] <= measured[case]["result"] + NOISE


def saved_by(call: object) -> list[Tensor]:
    """The tensors that autograd keeps for the backward of what ``call`` computes."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()  # type: ignore[operator]
    return kept


def test_float_alpha_saves_nothing() -> None:
    """Catches a graph that holds x or y though the backward of a linear map needs neither."""
    x, s = signal(3, 1000).requires_grad_(), signal(3).requires_grad_()
    assert saved_by(lambda: ema(x, 0.1)) == []
    kept = saved_by(lambda: ema(x, 0.1, initial_state=s, return_state=True))
    assert sum(tensor.numel() for tensor in kept) <= s.numel()


def test_tensor_alpha_saves_x_where_it_must() -> None:
    """Catches y kept beside x, a copy of x, and x kept for an alpha that learns nothing."""
    x, alpha = signal(3, 1000).requires_grad_(), torch.tensor(0.1)
    assert max(tensor.numel() for tensor in saved_by(lambda: ema(x, alpha))) == 1
    alpha.requires_grad_()
    large = [tensor for tensor in saved_by(lambda: ema(x, alpha)) if tensor.numel() > 1]
    assert len(large) == 1
    assert large[0].data_ptr() == x.data_ptr()
