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

layout, dim, dtype, learned = sys.argv[1:]
dim, dtype = int(dim), getattr(torch, dtype)
shape = (64, 64, 4096)
if layout == "expanded":
    x = torch.randn(1, 64, 4096).to(dtype).expand(shape)
else:
    x = torch.randn(shape, dtype=torch.float32).to(dtype)
    x = cases.LAYOUTS[layout](x)
alpha = torch.tensor(0.1, requires_grad=True) if learned == "learned" else 0.1
small = x[:2, :2, :100].detach().clone().requires_grad_()
ema(small, alpha, dim=dim).sum().backward()  # threads and tables are there before the measurement

forward = peak(lambda: ema(x.detach(), 0.1, dim=dim))
grad_y = torch.empty_like(x).normal_()
wanted = [x.detach().requires_grad_()] + ([alpha] if learned == "learned" else [])
y = ema(wanted[0], alpha, dim=dim)
backward = peak(lambda: torch.autograd.grad(y, wanted, grad_y))
print(json.dumps({"forward": forward, "backward": backward, "result": y.nbytes}))
"""


@pytest.mark.parametrize("learned", ["fixed", "learned"])
@pytest.mark.parametrize(
    ("layout", "dim", "dtype"),
    [
        ("contiguous", 2, "float32"),
        ("contiguous", 1, "float32"),
        ("contiguous", 0, "float32"),
        ("contiguous", 2, "bfloat16"),
        ("transposed", 2, "float32"),
        ("sliced", 2, "float32"),
        ("expanded", 2, "float32"),
        ("expanded", 0, "float16"),
    ],
)
def test_peak_memory(layout: str, dim: int, dtype: str, learned: str) -> None:
    """Catches a contiguous() or a float() of the whole input, forward and backward."""
    tests = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, layout, str(dim), dtype, learned],
        cwd=tests,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    assert measured["forward"] <= measured["result"] + NOISE
    assert measured["backward"] <= measured["result"] + NOISE


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
