"""Differential fuzzing: random calls, forward and backward, against the oracle of the tests.

    python tools/fuzz.py --seconds 60 --seed 0

A case is one call of ema or linear_recurrence, with a coefficient that is a number or a tensor and
may vary in time, and with its own shape, strides, dtype, state, direction, strategy, number of
threads and data; and the gradients to all its arguments. Cases of one operator, dtype and length
are judged together, because the oracle walks along time once for all rows; the bounds are those of
tests/bounds.py. A failing case
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

import _ema_ext  # noqa: E402
import ema_ext  # noqa: E402

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in cases.DTYPES}

#: Samples of a batch: enough to hide the cost of a numpy call per sample of time.
BATCH_SAMPLES = 60_000

Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One call; equal cases hold equal data."""

    seed: int
    op: str  # a key of OPS
    dtype: str
    length: int
    rows: tuple[int, ...]  # the other axes of y
    dim: int
    x_shape: tuple[int, ...]  # of x; of the b of a recurrence, which may be broadcast
    alpha: str  # a key of ALPHAS; the a of a recurrence is 1 - alpha
    alpha_shape: tuple[int, ...] | None  # None: a Python float
    alpha_dtype: str
    alpha_layout: str  # a key of LAYOUTS
    state_shape: tuple[int, ...] | None  # None: no initial_state
    state_dtype: str
    returns_state: bool
    x: str  # a key of SIGNALS, as is grad_y
    grad_y: str
    layout: str  # likewise, as is grad_layout
    grad_layout: str
    reverse: bool
    threads: int
    strategy: str  # of _ema_ext.force_cpu_strategy


@dataclass(frozen=True)
class Batch:
    """What all cases of a batch have in common."""

    op: str
    varying: bool  # whether the coefficient has a value per sample
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


OPS = {"ema": ema_ext.ema, "linear_recurrence": ema_ext.linear_recurrence}

#: A sum of a thousand of these leaves the range of float16.
LARGE = ("mean", "wide")

LAYOUTS = {**cases.LAYOUTS, "expanded": same_in_every_row}


def laid(layout: str, tensor: Tensor) -> Tensor:
    """The same values, or of an expanded layout the first of them, under other strides."""
    return LAYOUTS[layout](tensor) if tensor.dim() > 0 else tensor


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
        self.shape = (*case.rows[: case.dim], case.length, *case.rows[case.dim :])
        self.x = self._samples(case.x, case.layout, case.x_shape, generator)
        self.grad_y = self._samples(case.grad_y, case.grad_layout, self.shape, generator)
        weights = ALPHAS[case.alpha](case.alpha_shape or (), generator)
        if case.op == "linear_recurrence":
            weights = 1 - weights
        self.alpha = laid(case.alpha_layout, weights.to(DTYPES[case.alpha_dtype]))
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
        return laid(layout, SIGNALS[kind](shape, generator, self.dtype).to(self.dtype))

    def run(self, function: Function) -> Result:
        case = self.case
        x = self.x.detach().requires_grad_()
        alpha = (
            self.alpha.item() if case.alpha_shape is None else self.alpha.detach().requires_grad_()
        )
        state = None if self.state is None else self.state.requires_grad_()
        torch.set_num_threads(case.threads)
        result = function(
            *((x, alpha) if case.op == "ema" else (alpha, x)),
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
        """(rows, time), running forward; broadcast samples expanded."""
        samples = samples.expand(self.shape)
        if self.case.reverse:
            samples = samples.flip(self.case.dim)
        return samples.detach().movedim(self.case.dim, -1).reshape(-1, self.case.length)

    def per_row(self, value: Tensor) -> Tensor:
        """A value that broadcasts to the rows (without time), one for each."""
        return value.detach().expand(self.case.rows).reshape(-1)

    def coefficients(self, alpha: Tensor) -> Tensor:
        """A tensor like alpha as (rows, time), or (rows, 1) if it is constant in time."""
        axis = self.case.dim - len(self.shape)
        if alpha.dim() >= -axis and alpha.shape[axis] == self.case.length:
            return self.by_row(alpha)
        constant = alpha.squeeze(axis) if alpha.dim() >= -axis else alpha
        return self.per_row(constant)[:, None]


class Shared:
    """Gradients of values that several rows share: their sums, and the sums of their bounds."""

    def __init__(self, dtype: torch.dtype) -> None:
        """dtype: that of the sums."""
        self.unit = bounds.unit(dtype)
        self.roundings: list[Tensor] = []
        self.owners: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.total = 0

    def add(self, grad: Tensor | None, owners: Tensor, terms: torch.dtype | None = None) -> None:
        """The next rows: each one's index in `grad`; None: nobody wanted it. terms: the dtype in
        which what is summed has been kept; None: that of the sums.
        """
        unit, least = (bounds.unit(terms), bounds.subnormal(terms)) if terms else (0.0, 0.0)
        rounding = torch.tensor([unit, least], dtype=torch.float64)[:, None]
        self.roundings.append(rounding.expand(2, len(owners)))
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
            of_terms, least = torch.cat(self.roundings, 1).numpy()[:, mine]
            error = bound.reshape(-1)[mine] + (self.unit * count + of_terms) * size[mine] + least
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
            bounds.assert_within_range(grads[known], value[finite], limit[finite], name)


def one_sign(x: Tensor, start: Tensor | None) -> Tensor:
    """Whether nothing cancels in a row, so that its y are as large as the sums of their terms."""
    signs = x.sign() if start is None else torch.cat([x.sign(), start.sign()[:, None]], 1)
    return (signs >= 0).all(1) | (signs <= 0).all(1)


class Joined:
    """The calls of a batch and what they returned, as rows of one (rows, time) problem."""

    def __init__(self, batch: Sequence[Case], ops: dict[str, Function]) -> None:
        self.calls = [Call(case) for case in batch]
        self.results: list[Result] = []
        try:
            for case, call in zip(batch, self.calls, strict=True):
                _ema_ext.force_cpu_strategy(case.strategy)
                self.results.append(call.run(ops[case.op]))
        finally:
            _ema_ext.force_cpu_strategy("")
        first, calls = self.calls[0], self.calls
        self.dtype = first.dtype
        self.x = torch.cat([call.by_row(call.x) for call in calls])
        self.grad_y = torch.cat([call.by_row(call.grad_y) for call in calls])
        self.y = torch.cat([call.by_row(r.y) for call, r in self])
        self.coefficient = torch.cat([call.coefficients(call.alpha).double() for call in calls])
        self.varying = self.coefficient.shape[1] > 1
        self.options: dict[str, Any] = {"initial_state": None}
        wide = bounds.accumulate_dtype(self.dtype)
        if first.state is not None:  # which is kept in the accumulate dtype
            states = [call.per_row(call.state.to(wide)) for call in calls]
            self.options["initial_state"] = torch.cat(states)
        self.grad_state = {}
        if first.grad_state is not None:
            states = [call.per_row(call.grad_state) for call in calls]
            self.grad_state["grad_state"] = torch.cat(states)

    def __iter__(self) -> Iterator[tuple[Call, Result]]:
        return zip(self.calls, self.results, strict=True)

    def check_state(self) -> None:
        if self.grad_state:
            last = torch.cat([r.state.detach().reshape(-1) for r in self.results]).to(self.dtype)
            ends = self.y[:, -1]
            assert torch.equal(last.nan_to_num(7), ends.nan_to_num(7)), "state is not the last y"

    def check_coefficient(self, exact: oracle.Array, bound: oracle.Array, name: str) -> None:
        shared = Shared(torch.float64)
        for call, result in self:
            index = torch.arange(call.alpha.numel()).view(call.alpha.shape)
            terms = bounds.accumulate_dtype(call.alpha.dtype) if self.varying else None
            shared.add(result.grad_alpha, call.coefficients(index).reshape(-1), terms)
        shared.check(exact, bound, f"grad {name}")

    def check_samples(self, exact: oracle.Array, bound: oracle.Array, name: str) -> None:
        shared = Shared(torch.float64)
        for call, result in self:
            index = torch.arange(call.x.numel()).view(call.x.shape)
            shared.add(result.grad_x, call.by_row(index).reshape(-1))
        shared.check(exact, bound, f"grad {name}")

    def check_start(self, exact: oracle.Array | None, bound: oracle.Array | None) -> None:
        if exact is None or bound is None or self.options["initial_state"] is None:
            return
        shared = Shared(bounds.accumulate_dtype(self.dtype))
        for call, result in self:
            index = torch.arange(call.state.numel()).view(call.state.shape)
            shared.add(result.grad_state, call.per_row(index))
        shared.check(exact, bound, "grad initial_state")


def check_ema(joined: Joined) -> None:
    plain = joined.dtype == torch.float64 and joined.calls[0].case.alpha in PLAIN
    x, alpha, dtype, options = joined.x, joined.coefficient, joined.dtype, joined.options
    varying = joined.varying
    roundings = bounds.VARYING if varying else WALK if plain else bounds.KERNEL
    expected = oracle.ema(x, alpha, **options)
    allowed = bounds.pointwise_bound(x, alpha, **options, roundings=roundings)
    bounds.assert_within_range(joined.y, expected, allowed, "y")
    if dtype != torch.float64 and not varying:  # float64 may exceed it: docs/numerics.md
        held = one_sign(x, options["initial_state"]) & (alpha[:, 0] >= 1e-5) & (alpha[:, 0] <= 1)
        limit = bounds.row_bound(expected[held.numpy()], dtype)
        bounds.assert_within(joined.y[held], expected[held.numpy()], limit, "y by row")
    options = {**options, **joined.grad_state}
    exact = oracle.ema_backward(joined.grad_y, x, alpha, **options)
    within = bounds.gradient_bounds(joined.grad_y, x, alpha, **options, roundings=roundings)
    grad_x = torch.cat([call.by_row(result.grad_x) for call, result in joined])
    bounds.assert_within_range(grad_x, exact.x, within.x, "grad x")
    if varying or not plain:  # else it is summed by parts, and not as by a loop
        joined.check_coefficient(exact.alpha, within.alpha, "alpha")
    joined.check_start(exact.initial_state, within.initial_state)


def check_recurrence(joined: Joined) -> None:
    a, b, options = joined.coefficient, joined.x, joined.options
    tiles = bounds.STEPWISE if joined.dtype == torch.float64 else bounds.KERNEL
    roundings = bounds.VARYING if joined.varying else tiles
    expected = oracle.linear_recurrence(a, b, **options)
    allowed = bounds.recurrence_bound(a, b, **options, roundings=roundings)
    bounds.assert_within_range(joined.y, expected, allowed, "recurrence y")
    exact, within = bounds.recurrence_gradients(
        joined.grad_y, a, b, **options, **joined.grad_state, roundings=roundings
    )
    joined.check_coefficient(exact[0], within[0], "a")
    joined.check_samples(exact[1], within[1], "b")
    joined.check_start(exact[2], within[2])


def check(*batch: Case, ops: dict[str, Function] = OPS) -> None:
    """Runs cases of one operator, dtype and length; raises AssertionError where any is wrong."""
    joined = Joined(batch, ops)
    joined.check_state()
    (check_ema if batch[0].op == "ema" else check_recurrence)(joined)


def choose_batch(random: random.Random) -> Batch:
    kind = random.random()
    op = random.choice(("ema", "ema", "linear_recurrence"))
    varying = random.random() < (0.6 if op == "linear_recurrence" else 0.3)
    if kind < 0.003:  # rows that are cut into segments; the oracle walks along varying ones
        length, most_rows, varying = random.randint(131_072, 200_000), 2, random.random() < 0.1
    elif kind < 0.1:  # several tiles, on several threads where there are many rows
        length, most_rows = random.randint(65, 3000), random.choice((3, 40))
    elif kind < 0.2:  # many neighbouring rows
        length, most_rows = random.randint(1, 100), 300
    else:
        length, most_rows = random.randint(1, random.choice((40, 150))), 12
    dtype = random.choice(list(DTYPES))
    alphas = tuple(ALPHAS)
    if dtype == "float64" and not varying:
        alphas = PLAIN if random.random() < 0.2 else ("slow", "quick")
    needs_y = varying or op == "linear_recurrence"
    if length > LONGEST_OUTSIDE or (needs_y and dtype == "float16"):
        alphas = tuple(alpha for alpha in alphas if alpha != "outside")
    return Batch(
        op=op,
        varying=varying and length > 1,
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
    shape = (*rows[:dim], batch.length, *rows[dim:])

    def broadcast(sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Some of the sizes, others 1, and some leading axes left out."""
        kept = [size if random.random() < 0.6 else 1 for size in sizes]
        return tuple(kept[random.randint(0, len(kept)) :] if random.random() < 0.3 else kept)

    def with_time(kept: tuple[int, ...], size: int) -> tuple[int, ...]:
        """`kept`, axes of the shape, with this size along time; 1 stands for no axis as well."""
        kept = (1,) * (len(shape) - len(kept)) + kept if size > 1 else kept
        axis = dim - len(shape) + len(kept)
        return (*kept[:axis], size, *kept[axis + 1 :]) if axis >= 0 else kept

    alpha = random.choice(batch.alphas)
    alpha_shape = None
    if batch.varying or alpha == "outside" or random.random() < 0.7:
        alpha_shape = with_time(broadcast(shape), batch.length if batch.varying else 1)
    x_shape = shape
    if batch.op == "linear_recurrence" and random.random() < 0.5:
        # what a lacks, b has
        padded = (1,) * (len(shape) - len(alpha_shape or ())) + (alpha_shape or ())
        others = (1,) * len(shape) if random.random() < 0.3 else broadcast(shape)
        others = (1,) * (len(shape) - len(others)) + others
        x_shape = tuple(
            other if has == size else size
            for size, has, other in zip(shape, padded, others, strict=True)
        )
    kinds = list(SIGNALS)
    needs_y = batch.varying or batch.op == "linear_recurrence"
    if needs_y and (batch.dtype == "float16" or alpha == "outside"):
        kinds = [kind for kind in kinds if kind not in LARGE]
    return Case(
        seed=random.getrandbits(32),
        op=batch.op,
        dtype=batch.dtype,
        length=batch.length,
        rows=rows,
        dim=dim,
        x_shape=x_shape,
        alpha=alpha,
        alpha_shape=alpha_shape,
        alpha_dtype=random.choice(list(DTYPES)),
        alpha_layout=random.choice(list(LAYOUTS)),
        state_shape=broadcast(rows) if batch.has_state else None,
        state_dtype=random.choice(list(DTYPES)),
        returns_state=batch.returns_state,
        x=random.choice(kinds),
        grad_y=random.choice(kinds if random.random() < 0.2 else kinds[:-1]),
        layout=random.choice(list(LAYOUTS)),
        grad_layout=random.choice(list(LAYOUTS)),
        reverse=random.random() < 0.5,
        threads=random.choice((1, 1, 1, 2, 3)),
        strategy=random.choice(("", "", "rows", "lanes", "cut")),
    )


def batches(seed: int) -> Iterator[list[Case]]:
    choice = random.Random(seed)
    while True:
        batch = choose_batch(choice)
        yield [choose_case(choice, batch) for _ in range(batch.count)]


class Found(Exception):  # noqa: N818 - it is what a fuzzer is for
    """A case that fails; says how to run it again."""


def fuzz(seconds: float, seed: int = 0, ops: dict[str, Function] = OPS) -> int:
    """Runs cases for so long and returns their number; raises Found at the first that is wrong."""
    end, count = time.monotonic() + seconds, 0
    for batch in batches(seed):
        if time.monotonic() >= end:
            return count
        try:
            check(*batch, ops=ops)
        except Exception:
            raise Found(blame(batch, ops)) from None
        count += len(batch)
    raise AssertionError("batches() ended")


def blame(batch: list[Case], ops: dict[str, Function]) -> str:
    """The line that runs the failing case of a batch, and how it fails."""
    for case in batch:
        try:
            check(case, ops=ops)
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
