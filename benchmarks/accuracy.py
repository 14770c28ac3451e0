"""How exact ema_ext is, beside the sequential float32 loop and other packages.

    python benchmarks/accuracy.py

Prints the tables of docs/numerics.md. The signals are noise of standard deviation 1 around several
means, the lengths go to 10^7 (`--quick`: 10^6). What is exact is computed with 113 bits from the
same input, already rounded to its dtype (loops.cpp). Three measures, each the worst over means and
lengths:

* by row: the largest error of a row, in ulp (of the result's dtype) of the row's largest |y|;
* by sample: |error[n]| / (K eps ema(|x|)[n] + eps/2 |y[n]|): how often the kernels round a sample
  that does not age (tests/bounds.py), and the rounding of the result. eps is that of the
  accumulate dtype in the first term and that of the result's in the second. A small tail after a
  large start shows here;
* the gradient to alpha: |error| / (eps sum_n |lambda[n] (x[n] - y[n-1])|), lambda the adjoint of y
  for a gradient of noise, eps that of the accumulate dtype.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import loops
import numpy as np
import torch

import ema_ext

K = 8  # eps: bounds.KERNEL of the tests
ALPHAS = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0)
MEANS = (0.0, 5.0, 1000.0)
LENGTHS = (1000, 10**5, 10**7)
QUICK_LENGTHS = (1000, 10**5, 10**6)

Array = Any


@dataclass(frozen=True)
class Method:
    """One implementation: y for x of `dtype` and shape (length,); `gradient` for the same and g."""

    name: str
    dtype: torch.dtype
    run: Callable[[torch.Tensor, float], torch.Tensor]
    gradient: Callable[[torch.Tensor, torch.Tensor, float], float] | None = None
    package: str = "torch"

    @property
    def label(self) -> str:
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}"


def loop(x: torch.Tensor, alpha: float) -> torch.Tensor:
    return torch.from_numpy(loops.ema_float32(x.numpy(), alpha))


def loop_gradient(g: torch.Tensor, x: torch.Tensor, alpha: float) -> float:
    y = loops.ema_float32(x.numpy(), alpha)
    return loops.grad_alpha_float32(g.numpy(), x.numpy(), y, alpha)


def kernel_gradient(g: torch.Tensor, x: torch.Tensor, alpha: float) -> float:
    weight = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(ema_ext.ema(x, weight), weight, g)
    return float(gradient)


def pandas_ewm(x: torch.Tensor, alpha: float) -> torch.Tensor:
    import pandas

    y = pandas.Series(x.numpy()).ewm(alpha=alpha, adjust=False).mean()
    return torch.from_numpy(y.to_numpy(dtype=np.float64).copy())


def scipy_lfilter(x: torch.Tensor, alpha: float) -> torch.Tensor:
    from scipy.signal import lfilter

    array = x.numpy()
    b, a = np.array([alpha], array.dtype), np.array([1, alpha - 1], array.dtype)
    start = (1 - b) * array[:1]
    return torch.from_numpy(lfilter(b, a, array, zi=start)[0])


METHODS = [
    *(
        Method("ema_ext", dtype, ema_ext.ema, kernel_gradient)
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ),
    Method("sequential loop", torch.float32, loop, loop_gradient),
    Method("scipy lfilter", torch.float32, scipy_lfilter, package="scipy"),
    Method("scipy lfilter", torch.float64, scipy_lfilter, package="scipy"),
    Method("pandas ewm", torch.float64, pandas_ewm, package="pandas"),
]


@dataclass(frozen=True)
class Exact:
    """A signal in float64, its exact y in long double, and ema(|x|): all that errors need."""

    x: Array
    y: Array
    size: Array

    @staticmethod
    def of(x: torch.Tensor, alpha: float) -> Exact:
        wide = x.double().numpy()
        return Exact(wide, *loops.ema_exact(wide, alpha))


def signal(length: int, mean: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(length, generator=generator, dtype=torch.float64)
    return (noise + mean).to(dtype)


def epsilons(dtype: torch.dtype) -> tuple[float, float]:
    """eps of the accumulate dtype and of the result's."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(wide).eps, torch.finfo(dtype).eps


def forward_errors(y: torch.Tensor, exact: Exact, dtype: torch.dtype) -> tuple[float, float]:
    """By row, in ulp, and by sample, in units of the bound."""
    n = len(y)
    inner, outer = epsilons(dtype)
    want = exact.y[:n]
    error = np.abs(y.double().numpy() - want).astype(np.float64)
    size = np.abs(want).astype(np.float64)
    ulp = 2.0 ** np.floor(np.log2(size.max())) * outer
    bound = K * inner * exact.size[:n] + outer / 2 * size
    return float(error.max() / ulp), float((error / bound).max())


def gradient_errors(
    methods: Sequence[Method], x: torch.Tensor, exact: Exact, alpha: float
) -> dict[Method, float]:
    """In units of eps times the sum of the terms' sizes, of those methods that have a gradient."""
    n = len(x)
    g = signal(n, 0.0, x.dtype, seed=1)
    want, size = loops.grad_alpha_exact(g.double().numpy(), exact.x[:n], exact.y[:n], alpha)
    unit = epsilons(x.dtype)[0] * size
    errors = {m: abs(m.gradient(g, x, alpha) - want) for m in methods if m.gradient}
    return {m: float(error / unit) if error else 0.0 for m, error in errors.items()}


#: measure -> method's label -> alpha -> worst error
Tables = dict[str, dict[str, dict[float, float]]]
BY_ROW = "error by row, ulp"
BY_SAMPLE = "error by sample / bound"
GRADIENT = "error of the gradient to alpha / (eps * sum of the terms' sizes)"


def measure(
    methods: Sequence[Method],
    alphas: Sequence[float],
    means: Sequence[float],
    lengths: Sequence[int],
    progress: Callable[[list[Any]], Any] = lambda items: items,
) -> Tables:
    """The worst errors over means and lengths."""
    tables: Tables = {title: {} for title in (BY_ROW, BY_SAMPLE, GRADIENT)}

    def note(title: str, method: Method, alpha: float, error: float) -> None:
        row = tables[title].setdefault(method.label, {})
        row[alpha] = max(row.get(alpha, 0.0), error)

    dtypes = dict.fromkeys(method.dtype for method in methods)
    cells = [(alpha, mean, dtype) for alpha in alphas for mean in means for dtype in dtypes]
    for alpha, mean, dtype in progress(cells):
        x = signal(max(lengths), mean, dtype)
        exact = Exact.of(x, alpha)
        some = [method for method in methods if method.dtype == dtype]
        for part in (x[:length] for length in lengths):
            for method in some:
                by_row, by_sample = forward_errors(method.run(part, alpha), exact, dtype)
                note(BY_ROW, method, alpha, by_row)
                note(BY_SAMPLE, method, alpha, by_sample)
            for method, error in gradient_errors(some, part, exact, alpha).items():
                note(GRADIENT, method, alpha, error)
    return tables


def readable(error: float) -> str:
    return f"{error:.2f}" if error < 100 else f"{error:.1e}"


def markdown(tables: Tables, alphas: Sequence[float]) -> str:
    parts = []
    for title, rows in tables.items():
        lines = [f"| {title}; alpha = | " + " | ".join(f"{alpha:g}" for alpha in alphas) + " |"]
        lines.append("|---" + "|--:" * len(alphas) + "|")
        for label, row in rows.items():
            lines.append(f"| {label} | " + " | ".join(readable(row[a]) for a in alphas) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="lengths to 10^6 only")
    options = parser.parse_args(arguments)
    from tqdm import tqdm

    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    methods = [method for method in METHODS if importlib.util.find_spec(method.package)]
    tables = measure(
        methods, ALPHAS, MEANS, lengths, lambda cells: tqdm(cells, desc="errors", file=sys.stderr)
    )
    absent = dict.fromkeys(m.name for m in METHODS if m not in methods)
    print(
        f"`python benchmarks/accuracy.py{' --quick' * options.quick}`: the worst over means "
        f"{', '.join(f'{mean:g}' for mean in MEANS)} and lengths "
        f"{', '.join(map(str, lengths))}; bound: {K} eps ema(\\|x\\|) + eps/2 \\|y\\|.\n"
    )
    print(markdown(tables, ALPHAS))
    for name in absent:
        print(f"\n{name}: not installed")


if __name__ == "__main__":
    main()
