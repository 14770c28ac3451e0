"""What the benchmark compares: ema_ext, torch's own copies and scans, the forum's versions, peers.

Every method gets the same tensor and computes the same recurrence, but for those whose note says
otherwise. Peers that are not installed are left out; those that bring threads of their own get one.
The peers of the CPU and those of CUDA are others.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import loops
import numpy as np
import torch
from measure import Call
from torch import Tensor

import ema_ext
from ema_ext.reference import EMAConv, ema_loop, ema_matmul, weight_matrix, wma_window

for _variable in ("NUMBA_NUM_THREADS", "PJRT_NPROC", "POLARS_MAX_THREADS"):
    os.environ.setdefault(_variable, "1")  # read when a peer is imported, further down

PERIOD = 21  # samples
ALPHA = 2 / (PERIOD + 1)

FORWARD = "forward"
BOTH = "forward + backward"  # gradient to x
LEARN = "forward + backward, alpha learned"  # gradients to x and alpha
BACK = "backward"  # the operator alone
BACK_LEARN = "backward, alpha learned"

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second sample": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "off alignment": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "one row expanded": lambda x: x[:1].expand_as(x),
}


@dataclass(frozen=True)
class Problem:
    """One input."""

    shape: tuple[int, ...]
    dim: int = -1
    dtype: str = "float32"
    layout: str = "contiguous"
    per_row: bool = False  # one alpha for each row, in a tensor

    @property
    def name(self) -> str:
        parts = ["x".join(map(str, self.shape))]
        if self.dim != -1:
            parts.append(f"over dim {self.dim}")
        if self.dtype != "float32":
            parts.append(self.dtype)
        if self.layout != "contiguous":
            parts.append(self.layout)
        if self.per_row:
            parts.append("alpha per row")
        return ", ".join(parts)

    @property
    def length(self) -> int:
        return self.shape[self.dim]

    @property
    def samples(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.samples // self.length

    @property
    def bytes(self) -> int:
        return self.samples * torch.finfo(getattr(torch, self.dtype)).bits // 8

    @property
    def plain(self) -> bool:
        """Whether the methods other than torch's and ours take it."""
        layout = self.dim == -1 and len(self.shape) == 2 and self.layout == "contiguous"
        return layout and self.dtype == "float32" and not self.per_row

    def input(self, device: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.shape, generator=generator)
        return LAYOUTS[self.layout](x.to(device, getattr(torch, self.dtype)))

    def alpha(self, device: str) -> float | Tensor:
        if not self.per_row:
            return ALPHA
        rows = torch.linspace(0.01, 0.5, self.shape[0], device=device)
        return rows.view(-1, *[1] * (len(self.shape) - 1))


@dataclass(frozen=True)
class Method:
    """One contender; `calls` gives what it can do with a problem and its input, by pass."""

    name: str
    calls: Callable[[Problem, Tensor], dict[str, Call]]
    note: str = ""
    everywhere: bool = False  # takes every problem, and any number of threads
    one_row: bool = False
    lengths: Callable[[int], bool] | None = None  # that it takes
    device: str | None = None  # the only one that it runs on
    another: bool = False  # computes something else
    compiles: bool = False  # anew for each shape, which takes seconds
    own_memory: bool = False  # keeps freed memory, so that its peak tells nothing
    seconds_per_step: float = 0.0  # of the slow ones, to know beforehand what takes too long
    seconds_per_sample: float = 0.0
    bytes_per_square: float = 0.0  # of length**2

    def reason_to_skip(self, problem: Problem, max_seconds: float, max_gib: float) -> str | None:
        """Why this problem is too much for this method, or None."""
        steps = self.seconds_per_step * problem.length
        seconds = steps + self.seconds_per_sample * problem.samples
        if seconds > max_seconds:
            return f"would take about {seconds:.1f} s a call"
        gib = self.bytes_per_square * problem.length**2 / 2**30
        return f"needs {gib:,.1f} GiB" if gib > max_gib else None

    def takes(self, problem: Problem, device: str) -> bool:
        if self.device not in (None, device):
            return False
        if self.lengths and not self.lengths(problem.length):
            return False
        return self.everywhere or (problem.plain and (problem.rows == 1 or not self.one_row))


def _torch(run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Call]:
    """Passes of a differentiable function; the gradient of its result is a tensor of ones."""
    leaf, g = x.detach().requires_grad_(), torch.ones_like(x)
    return {FORWARD: lambda: run(x), BOTH: lambda: torch.autograd.grad(run(leaf), leaf, g)}


def _ema_ext(problem: Problem, x: Tensor) -> dict[str, Call]:
    device, dim = x.device.type, problem.dim
    alpha = problem.alpha(device)
    leaf, g = x.detach().requires_grad_(), torch.ones_like(x)
    learned = torch.as_tensor(alpha, dtype=torch.float64, device=device).requires_grad_()
    known = learned.detach()
    ops, axis = torch.ops.ema_ext, dim % x.dim()
    passes: dict[str, Call] = {  # with no frame that torch.clone has not
        FORWARD: lambda: ema_ext.ema(x, alpha, dim=dim),
        BOTH: lambda: torch.autograd.grad(ema_ext.ema(leaf, alpha, dim=dim), leaf, g),
        LEARN: lambda: torch.autograd.grad(ema_ext.ema(leaf, learned, dim=dim), [leaf, learned], g),
    }
    if not problem.per_row:
        passes[BACK] = lambda: ops.ema_backward.default(g, None, alpha, False, axis, False)
        passes[BACK_LEARN] = lambda: ops.ema_backward.Tensor(g, None, x, known, None, axis, False)
    return passes


def _matmul(problem: Problem, x: Tensor) -> dict[str, Call]:
    weights = weight_matrix(problem.length, ALPHA).to(x)
    return _torch(lambda x: ema_matmul(x, ALPHA, weights=weights), x)


def _conv(_: Problem, x: Tensor) -> dict[str, Call]:
    return _torch(EMAConv(ALPHA).to(x.device), x)


def _on_array(prepare: Callable[[Any], Call]) -> Callable[[Problem, Tensor], dict[str, Call]]:
    """Forward only, from the same memory as a numpy array: (length,), or (rows, length)."""

    def calls(problem: Problem, x: Tensor) -> dict[str, Call]:
        array = x.numpy()
        return {FORWARD: prepare(array[0] if problem.rows == 1 else array)}

    return calls


def _scipy(x: Any) -> Call:
    from scipy.signal import lfilter

    b, a = np.float32([ALPHA]), np.float32([1, ALPHA - 1])
    start = np.float32(1 - ALPHA) * x[..., :1]
    return lambda: lfilter(b, a, x, zi=start)[0]


def _pandas(x: Any) -> Call:
    import pandas

    series = pandas.Series(x)
    return lambda: series.ewm(alpha=ALPHA, adjust=False).mean()


def _polars(x: Any) -> Call:
    import polars

    series = polars.Series(x)
    return lambda: series.ewm_mean(alpha=ALPHA, adjust=False)


@functools.cache
def _numba_loop() -> Any:
    import numba

    @numba.njit
    def loop(x: Any, alpha: Any, keep: Any) -> Any:
        y = np.empty_like(x)
        state = y[0] = x[0]
        for n in range(1, x.size):
            state = keep * state + alpha * x[n]
            y[n] = state
        return y

    return loop


def _numba(x: Any) -> Call:
    loop, alpha, keep = _numba_loop(), np.float32(ALPHA), np.float32(1 - ALPHA)
    return lambda: loop(x, alpha, keep)


def _jax(x: Any) -> Call:
    import jax
    from jax import numpy as jnp

    def combine(earlier: Any, later: Any) -> Any:
        return later[0] * earlier[0], later[0] * earlier[1] + later[1]

    @jax.jit
    def scan(x: Any) -> Any:
        keep = jnp.full_like(x, 1 - ALPHA).at[..., 0].set(0)
        drive = (ALPHA * x).at[..., 0].set(x[..., 0])
        return jax.lax.associative_scan(combine, (keep, drive), axis=-1)[1]

    there = jnp.asarray(x)
    return lambda: scan(there).block_until_ready()


def _numbagg(x: Any) -> Call:
    import numbagg

    return lambda: numbagg.move_exp_nanmean(x, alpha=ALPHA)


def _talib(x: Any) -> Call:
    import talib

    wide = x.astype(np.float64)
    return lambda: talib.EMA(wide, timeperiod=PERIOD)


def _gated(scan: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> dict[str, Call]:
    """Passes of y[n] = gate[n] * y[n-1] + token[n], handed its gates and tokens."""
    gates, tokens = torch.full_like(x, 1 - ALPHA), ALPHA * x
    tokens[..., 0] = x[..., 0]
    return _torch(lambda tokens: scan(gates, tokens), tokens)


def _power_of_two(length: int) -> bool:
    return 32 <= length <= 65536 and length & (length - 1) == 0


def _accelerated_scan(_: Problem, x: Tensor) -> dict[str, Call]:
    from accelerated_scan.warp import scan  # compiles its kernels

    return _gated(scan, x[None])


def _fpscan(_: Problem, x: Tensor) -> dict[str, Call]:
    from fpscan import pscan

    return _gated(pscan, x[None])


def _torchlpc(_: Problem, x: Tensor) -> dict[str, Call]:
    from torchlpc import linear_recurrence

    return _gated(linear_recurrence, x)


def _torchaudio(_: Problem, x: Tensor) -> dict[str, Call]:
    from torchaudio.functional import lfilter

    a, b = x.new_tensor([1, ALPHA - 1]), x.new_tensor([ALPHA, 0])
    return _torch(lambda x: lfilter(x, a, b, clamp=False), x)


def _cupy(_: Problem, x: Tensor) -> dict[str, Call]:
    import cupy
    from cupyx.scipy.signal import lfilter

    there = cupy.asarray(x)  # the same memory
    a, b = (cupy.asarray(some, there.dtype) for some in ([1, ALPHA - 1], [ALPHA]))
    return {FORWARD: lambda: torch.as_tensor(lfilter(b, a, there), device=x.device)}


OURS = Method("ema_ext", _ema_ext, everywhere=True)
CLONE = Method(
    "torch.clone",
    lambda _, x: _torch(torch.clone, x),
    "copies, computes nothing: the limit of memory",
    everywhere=True,
    another=True,
)
CUMSUM = Method(
    "torch.cumsum",
    lambda problem, x: _torch(lambda x: x.cumsum(problem.dim), x),
    "another recurrence, of the same shape",
    everywhere=True,
    another=True,
)
FORUM = [
    Method(
        "for-loop (forum)",
        lambda _, x: _torch(lambda x: ema_loop(x, ALPHA), x),
        "ema_ext.reference.ema_loop",
        seconds_per_step=1e-5,
    ),
    Method(
        "weight matrix (forum)",
        _matmul,
        "ema_ext.reference.ema_matmul, the matrix made beforehand",
        bytes_per_square=24,  # three float64 matrices while it is made
    ),
    Method(
        "conv1d (forum)",
        _conv,
        "ema_ext.reference.EMAConv",
        seconds_per_sample=3e-7,
    ),
    Method(
        "weighted window (forum)",
        lambda _, x: _torch(lambda x: wma_window(x, PERIOD), x),
        "ema_ext.reference.wma_window, another filter",
        another=True,
        seconds_per_sample=5e-8,
    ),
]
PLAIN_LOOP = Method(
    "C loop",
    _on_array(lambda x: loops.prepared_ema_float32(x, ALPHA)),
    "float32, one fused multiply-add after the other (loops.cpp), into one result",
    one_row=True,
    device="cpu",
)

#: The package that a peer needs -> the peer.
PEERS = {
    "scipy": Method("scipy lfilter", _on_array(_scipy), "float32", device="cpu"),
    "pandas": Method(
        "pandas ewm", _on_array(_pandas), "in and out of float64", one_row=True, device="cpu"
    ),
    "polars": Method(
        "polars ewm_mean",
        _on_array(_polars),
        "float32",
        one_row=True,
        device="cpu",
        own_memory=True,
    ),
    "numba": Method("numba loop", _on_array(_numba), "float32", one_row=True, device="cpu"),
    "jax": Method(
        "jax associative_scan",
        _on_array(_jax),
        "float32, jitted",
        one_row=True,
        device="cpu",
        compiles=True,
        own_memory=True,
    ),
    "numbagg": Method(
        "numbagg move_exp_nanmean",
        _on_array(_numbagg),
        "bias-corrected (adjust=True), NaN left out",
        device="cpu",
    ),
    "talib": Method(
        "TA-Lib EMA",
        _on_array(_talib),
        "float64, starts from a simple average",
        one_row=True,
        device="cpu",
    ),
    "accelerated_scan": Method(
        "accelerated-scan",
        _accelerated_scan,
        "a gate and a token per sample, made beforehand",
        lengths=_power_of_two,
        device="cuda",
    ),
    "fpscan": Method(
        "fpscan",
        _fpscan,
        "a gate and a token per sample, made beforehand",
        lengths=_power_of_two,
        device="cuda",
    ),
    "torchlpc": Method(
        "torchlpc", _torchlpc, "a gate and a token per sample, made beforehand", device="cuda"
    ),
    "torchaudio": Method(
        "torchaudio lfilter", _torchaudio, "starts from zero", device="cuda", seconds_per_step=1e-6
    ),
    "cupy": Method("cupyx lfilter", _cupy, "starts from zero", device="cuda", own_memory=True),
}


def installed_peers(device: str = "cpu") -> tuple[list[Method], list[str]]:
    """The peers of this device that the environment has, and the names of those that it lacks."""
    found, absent = [], []
    for package, peer in PEERS.items():
        if peer.device != device:
            continue
        if importlib.util.find_spec(package):
            found.append(peer)
        else:
            absent.append(peer.name)
    if device != "cpu":
        return found, absent
    if loops.compiler():
        found.append(PLAIN_LOOP)
    else:
        absent.append(f"{PLAIN_LOOP.name} (no C++ compiler)")
    return found, absent


def difference(y: Any, expected: Tensor) -> float:
    """The largest |y - expected| of the second half, in units of the largest |expected|.

    The second half leaves out how a method starts; NaN counts as no difference.
    """
    got = np.asarray(y, dtype=np.float64).reshape(expected.shape)
    want = expected.double().cpu().numpy()
    half = want.shape[-1] // 2
    return float(np.nanmax(np.abs(got - want)[..., half:]) / np.abs(want).max())
