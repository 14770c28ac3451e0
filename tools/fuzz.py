"""Differential fuzzing: random calls, forward and backward, against the oracle of the tests.

    python tools/fuzz.py --seconds 60 --seed 0

A case is one call with its own shape, strides, dtype, alpha, state, direction and data, and the
gradients to all its arguments. Cases of one dtype and length are judged together, because the
oracle walks along time once for all rows; the bounds are those of tests/bounds.py. A failing case
is printed as one line that runs it again, and ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import bounds  # noqa: E402
import cases  # noqa: E402
import numpy as np  # noqa: E402
import oracle  # noqa: E402

import ema_ext  # noqa: E402

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in cases.DTYPES}

#: Samples of a batch: enough to hide the cost of a numpy call per sample of time.
BATCH_SAMPLES = 60_000

Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One call; equal cases hold equal data."""

    seed: int
    dtype: str
    length: int
    rows: tuple[int, ...]  # the other axes of x
    dim: int
    alpha: str  # a key of ALPHAS
    alpha_shape: tuple[int, ...] | None  # None: a Python float
    alpha_dtype: str
    state_shape: tuple[int, ...] | None  # None: no initial_state
    state_dtype: str
    returns_state: bool
    x: str  # a key of SIGNALS, as is grad_y
    grad_y: str
    layout: str  # a key of LAYOUTS, as is grad_layout
    grad_layout: str
    reverse: bool
    threads: int


@dataclass(frozen=True)
class Batch:
    """What all cases of a batch have in common."""

    dtype: str
    length: int
    alphas: tuple[str, ...]
    has_state: bool
    returns_state: bool
    count: int
    most_rows: int


def uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64)


def noise(shape: Sequence[int], generator: torch.Generator, _: torch.dtype) -> Tensor:
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def mean(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return noise(shape, generator, dtype) + 1000


def constant(shape: Sequence[int], generator: torch.Generator, _: torch.dtype) -> Tensor:
    return uniform((), generator).expand(tuple(shape)).clone()


def rare(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Single samples among zeros: what a carry that is lost would have held."""
    return noise(shape, generator, dtype) * (uniform(shape, generator) < 0.05)


def wide(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Every order of magnitude in which squares neither overflow nor vanish, side by side."""
    digits = 3 if dtype == torch.float16 else 15
    return noise(shape, generator, dtype) * 10 ** (digits * (2 * uniform(shape, generator) - 1))


def bad(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A few NaN and infinities."""
    x, where = noise(shape, generator, dtype), uniform(shape, generator)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[(where > 0.01 * i) & (where < 0.01 * (i + 1))] = value
    return x


SIGNALS = {f.__name__: f for f in (noise, mean, constant, rare, wide, bad)}


def slow(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return 10 ** (-6 * uniform(shape, generator))


def quick(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """1 - alpha from 1e-9 to 1."""
    return 1 - 10 ** (-9 * uniform(shape, generator))


def ends(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return (uniform(shape, generator) < 0.5).double()


def outside(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """The recurrence still holds; it may oscillate and grow."""
    return 3 * uniform(shape, generator) - 0.5


ALPHAS = {f.__name__: f for f in (slow, quick, ends, outside)}

#: Those that the kernels take sample by sample. Where the samples are float64 no wider format holds
#: the state: there each step rounds as the loop's, and they are in batches of their own.
PLAIN = ("ends", "outside")
WALK = replace(bounds.KERNEL, per_step=bounds.LOOP.per_step)


def same_in_every_row(x: Tensor) -> Tensor:
    return x.select(0, 0).unsqueeze(0).expand(x.shape) if x.dim() > 1 and x.shape[0] else x


LAYOUTS = {**cases.LAYOUTS, "expanded": same_in_every_row}

#: More than this is left of a dtype's range after |1 - alpha| has been multiplied so often.
LONGEST_OUTSIDE = 64


@dataclass(frozen=True)
class Result:
    """What a call returned and the gradients to its arguments; None: there is none."""

    y: Tensor
    state: Tensor | None
    grad_x: Tensor
    grad_alpha: Tensor | None
    grad_state: Tensor | None


class Call:
    """A case's tensors, and its rows with time last and running forward."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtype = DTYPES[case.dtype]
        generator = torch.Generator().manual_seed(case.seed)
        shape = (*case.rows[: case.dim], case.length, *case.rows[case.dim :])
        self.x = self._samples(case.x, case.layout, shape, generator)
        self.grad_y = self._samples(case.grad_y, case.grad_layout, shape, generator)
        weights = ALPHAS[case.alpha](case.alpha_shape or (), generator)
        self.alpha = weights.to(DTYPES[case.alpha_dtype])
        if case.alpha != "outside":  # a half type rounds up to 1 at most
            self.alpha.clamp_(0, 1)
        self.state = self.grad_state = None
        if case.state_shape is not None:
            state = SIGNALS["noise"](case.state_shape, generator, self.dtype)
            self.state = state.to(DTYPES[case.state_dtype])
        if case.returns_state:
            wide = bounds.accumulate_dtype(self.dtype)
            self.grad_state = SIGNALS["noise"](case.rows, generator, self.dtype).to(wide)

    def _samples(
        self, kind: str, layout: str, shape: tuple[int, ...], generator: torch.Generator
    ) -> Tensor:
        return LAYOUTS[layout](SIGNALS[kind](shape, generator, self.dtype).to(self.dtype))

    def run(self, ema: Function) -> Result:
        case = self.case
        x = self.x.detach().requires_grad_()
        alpha = self.alpha.item() if case.alpha_shape is None else self.alpha.requires_grad_()
        state = None if self.state is None else self.state.requires_grad_()
        torch.set_num_threads(case.threads)
        result = ema(
            x,
            alpha,
            dim=case.dim,
            initial_state=state,
            reverse=case.reverse,
            return_state=case.returns_state,
        )
        y, last = result if case.returns_state else (result, None)
        outputs, through = [y], [self.grad_y]
        if last is not None:
            outputs.append(last)
            through.append(self.grad_state)
        arguments = (x, alpha, state)
        wanted = [t for t in arguments if isinstance(t, Tensor)]
        grads = iter(torch.autograd.grad(outputs, wanted, through))
        return Result(y, last, *(next(grads) if isinstance(t, Tensor) else None for t in arguments))

    def by_row(self, samples: Tensor) -> Tensor:
        """(rows, time), running forward."""
        if self.case.reverse:
            samples = samples.flip(self.case.dim)
        return samples.detach().movedim(self.case.dim, -1).reshape(-1, self.case.length)

    def per_row(self, value: Tensor) -> Tensor:
        """A value that broadcasts to the rows (without time), one for each."""
        return value.detach().double().expand(self.case.rows).reshape(-1)

    def alpha_by_row(self) -> Tensor:
        return self.per_row(self._without_time(self.alpha))

    def owners(self, tensor: Tensor, *, has_time: bool) -> Tensor:
        """For every row the index of the element of `tensor` that it reads."""
        index = torch.arange(tensor.numel()).view(tensor.shape)
        index = self._without_time(index) if has_time else index
        return index.expand(self.case.rows).reshape(-1)

    def _without_time(self, tensor: Tensor) -> Tensor:
        axis = self.case.dim - (len(self.case.rows) + 1) + tensor.dim()
        return tensor.squeeze(axis) if axis >= 0 else tensor


def compare(got: Tensor, exact: oracle.Array, bound: oracle.Array, name: str) -> None:
    """bounds.assert_within wherever the bound keeps the result inside the range of its dtype."""
    with np.errstate(all="ignore"):
        inside = ~(np.isfinite(exact) & (np.abs(exact) + bound > torch.finfo(got.dtype).max))
    bounds.assert_within(got[torch.from_numpy(inside)], exact[inside], bound[inside], name)


class Shared:
    """Gradients of values that several rows share: their sums, and the sums of their bounds."""

    def __init__(self, dtype: torch.dtype) -> None:
        """dtype: that of the sums."""
        self.unit = bounds.unit(dtype)
        self.owners: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.total = 0

    def add(self, grad: Tensor | None, owners: Tensor) -> None:
        """The next rows: each one's index in `grad`; None: nobody wanted it."""
        if grad is None:
            self.owners.append(torch.full_like(owners, -1))
            return
        self.owners.append(owners + self.total)
        self.grads.append(grad.reshape(-1))
        self.total += grad.numel()

    def check(self, exact: oracle.Array, bound: oracle.Array, name: str) -> None:
        """exact and bound hold one number for each row. A sum rounds each term once for each term
        at most, whatever its order.
        """
        owners = torch.cat(self.owners).numpy()
        mine = owners >= 0
        due, allowed = np.zeros(self.total, np.longdouble), np.zeros(self.total, np.longdouble)
        with np.errstate(all="ignore"):
            np.add.at(due, owners[mine], exact.reshape(-1)[mine])
            size = np.abs(exact.reshape(-1)) + bound.reshape(-1)
            count = np.bincount(owners[mine], minlength=self.total)[owners[mine]]
            error = bound.reshape(-1)[mine] + self.unit * count * size[mine]
            np.add.at(allowed, owners[mine], error)
        sizes = np.array([len(grad) for grad in self.grads])
        for dtype in {grad.dtype for grad in self.grads}:
            here = np.repeat([grad.dtype == dtype for grad in self.grads], sizes)
            grads = torch.cat([grad for grad in self.grads if grad.dtype == dtype])
            value, limit = due[here], bounds._stored(due[here], allowed[here], dtype)
            # Whether infinities meet in a sum, and become NaN, is up to its order.
            finite = np.isfinite(value)
            known = torch.from_numpy(finite)
            assert not grads[~known].isfinite().any(), f"{name} is finite"
            compare(grads[known], value[finite], limit[finite], name)


def one_sign(x: Tensor, start: Tensor | None) -> Tensor:
    """Whether nothing cancels in a row, so that its y are as large as the sums of their terms."""
    signs = x.sign() if start is None else torch.cat([x.sign(), start.sign()[:, None]], 1)
    return (signs >= 0).all(1) | (signs <= 0).all(1)


def check(*batch: Case, ema: Function | None = None) -> None:
    """Runs cases of one dtype and length; raises AssertionError where any of them is wrong."""
    calls = [Call(case) for case in batch]
    results = [call.run(ema or ema_ext.ema) for call in calls]
    dtype = calls[0].dtype

    x = torch.cat([call.by_row(call.x) for call in calls])
    grad_y = torch.cat([call.by_row(call.grad_y) for call in calls])
    alpha = torch.cat([call.alpha_by_row() for call in calls])[:, None]
    options: dict[str, Any] = {"initial_state": None}
    plain = dtype == torch.float64 and batch[0].alpha in PLAIN
    rounded = {"roundings": WALK if plain else bounds.KERNEL}
    if calls[0].state is not None:
        # which is kept in x's accumulate dtype
        states = [call.state.to(bounds.accumulate_dtype(dtype)) for call in calls]
        rows = [call.per_row(s) for call, s in zip(calls, states, strict=True)]
        options["initial_state"] = torch.cat(rows).to(states[0].dtype)
    y = torch.cat([call.by_row(r.y) for call, r in zip(calls, results, strict=True)])
    expected = oracle.ema(x, alpha, **options)
    compare(y, expected, bounds.pointwise_bound(x, alpha, **options, **rounded), "y")
    if dtype != torch.float64:  # float64 may exceed the bound by row: docs/numerics.md
        held = one_sign(x, options["initial_state"]) & (alpha[:, 0] >= 1e-5) & (alpha[:, 0] <= 1)
        limit = bounds.row_bound(expected[held.numpy()], dtype)
        bounds.assert_within(y[held], expected[held.numpy()], limit, "y by row")
    if calls[0].grad_state is not None:
        options["grad_state"] = torch.cat([call.per_row(call.grad_state) for call in calls])
        last = torch.cat([r.state.detach().reshape(-1) for r in results]).to(dtype)
        assert torch.equal(last.nan_to_num(7), y[:, -1].nan_to_num(7)), "state is not the last y"

    exact = oracle.ema_backward(grad_y, x, alpha, **options)
    allowed = bounds.gradient_bounds(grad_y, x, alpha, **options, **rounded)
    grad_x = torch.cat([call.by_row(r.grad_x) for call, r in zip(calls, results, strict=True)])
    compare(grad_x, exact.x, allowed.x, "grad x")
    weights, starts = Shared(torch.float64), Shared(bounds.accumulate_dtype(dtype))
    for call, result in zip(calls, results, strict=True):
        weights.add(result.grad_alpha, call.owners(call.alpha, has_time=True))
        if call.state is not None:
            starts.add(result.grad_state, call.owners(call.state, has_time=False))
    if not plain:  # it is summed by parts there, and not as by a loop
        weights.check(exact.alpha, allowed.alpha, "grad alpha")
    if exact.initial_state is not None:
        starts.check(exact.initial_state, allowed.initial_state, "grad initial_state")


def choose_batch(random: random.Random) -> Batch:
    kind = random.random()
    if kind < 0.004:  # rows that are cut into segments
        length, most_rows = random.randint(131_072, 200_000), 2
    elif kind < 0.2:  # several tiles, on several threads where there are many rows
        length, most_rows = random.randint(65, 3000), random.choice((3, 40))
    elif kind < 0.4:  # many neighbouring rows
        length, most_rows = random.randint(1, 100), 300
    else:
        length, most_rows = random.randint(1, 150), 12
    dtype = random.choice(list(DTYPES))
    alphas = tuple(ALPHAS)
    if dtype == "float64":
        alphas = PLAIN if random.random() < 0.2 else ("slow", "quick")
    if length > LONGEST_OUTSIDE:
        alphas = tuple(alpha for alpha in alphas if alpha != "outside")
    return Batch(
        dtype=dtype,
        length=length,
        alphas=alphas,
        has_state=random.random() < 0.5,
        returns_state=random.random() < 0.3,
        most_rows=most_rows,
        count=max(1, int(BATCH_SAMPLES / (length * (1 + most_rows / 3)))),
    )


def choose_case(random: random.Random, batch: Batch) -> Case:
    rows: tuple[int, ...] = ()
    for _ in range(random.randint(0, 3)):
        left = batch.most_rows
        for size in rows:
            left //= size
        rows += (random.randint(1, max(1, left)),)
    rows = tuple(random.sample(rows, len(rows)))
    dim = random.randint(0, len(rows))

    def broadcast(sizes: tuple[int, ...]) -> tuple[int, ...]:
        kept = [size if random.random() < 0.6 else 1 for size in sizes]
        return tuple(kept[random.randint(0, len(kept)) :] if random.random() < 0.3 else kept)

    alpha = random.choice(batch.alphas)
    has_tensor = alpha == "outside" or random.random() < 0.7
    kinds = list(SIGNALS)
    return Case(
        seed=random.getrandbits(32),
        dtype=batch.dtype,
        length=batch.length,
        rows=rows,
        dim=dim,
        alpha=alpha,
        alpha_shape=broadcast((*rows[:dim], 1, *rows[dim:])) if has_tensor else None,
        alpha_dtype=random.choice(list(DTYPES)),
        state_shape=broadcast(rows) if batch.has_state else None,
        state_dtype=random.choice(list(DTYPES)),
        returns_state=batch.returns_state,
        x=random.choice(kinds),
        grad_y=random.choice(kinds if random.random() < 0.2 else kinds[:-1]),
        layout=random.choice(list(LAYOUTS)),
        grad_layout=random.choice(list(LAYOUTS)),
        reverse=random.random() < 0.5,
        threads=random.choice((1, 1, 1, 2, 3)),
    )


def batches(seed: int) -> Iterator[list[Case]]:
    choice = random.Random(seed)
    while True:
        batch = choose_batch(choice)
        yield [choose_case(choice, batch) for _ in range(batch.count)]


class Found(Exception):  # noqa: N818 - it is what a fuzzer is for
    """A case that fails; says how to run it again."""


def fuzz(seconds: float, seed: int = 0, ema: Function | None = None) -> int:
    """Runs cases for so long and returns their number; raises Found at the first that is wrong."""
    end, count = time.monotonic() + seconds, 0
    for batch in batches(seed):
        if time.monotonic() >= end:
            return count
        try:
            check(*batch, ema=ema)
        except Exception:
            raise Found(blame(batch, ema)) from None
        count += len(batch)
    raise AssertionError("batches() ended")


def blame(batch: list[Case], ema: Function | None) -> str:
    """The line that runs the failing case of a batch, and how it fails."""
    for case in batch:
        try:
            check(case, ema=ema)
        except Exception as error:
            line = f'PYTHONPATH=tools python -c "from fuzz import *; check({case})"'
            return f"{type(error).__name__}: {error}\n{line}"
    return f"only together: check(*{batch})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, at an infinity
    try:
        count = fuzz(arguments.seconds, arguments.seed)
    except Found as found:
        sys.exit(str(found))
    for label, ratio in sorted(bounds.WORST.items()):
        print(f"{label:<24} worst error / bound {ratio:.3f}")
    print(f"{count} cases in {arguments.seconds:g} s, seed {arguments.seed}: none wrong")


if __name__ == "__main__":
    main()
