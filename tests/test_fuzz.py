"""The fuzzer finds what is planted, says how to run it again, and finds nothing else."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch

import ema_ext

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import fuzz

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Function = Callable[..., Any]


def last_digits(x: torch.Tensor, alpha: Any, **options: Any) -> Any:
    """Every y off by half as much again as its bound."""
    result = ema_ext.ema(x, alpha, **options)
    y = result[0] if options["return_state"] else result
    options = {name: options[name] for name in ("dim", "initial_state", "reverse")}
    bound = bounds.pointwise_bound(x, alpha, **options)
    y.data.add_(torch.from_numpy((1.5 * bound).astype("float64")))
    return result


def dropped_carry(x: torch.Tensor, alpha: Any, *, dim: int, **options: Any) -> Any:
    """From sample 16 of a row on its past is forgotten."""
    varies = isinstance(alpha, torch.Tensor) and x.shape[dim] in alpha.shape
    if x.shape[dim] <= 16 or varies or options["reverse"] or options["return_state"]:
        return ema_ext.ema(x, alpha, dim=dim, **options)
    head, tail = x.split([16, x.shape[dim] - 16], dim)
    ends = ema_ext.ema(head, alpha, dim=dim, **options), ema_ext.ema(tail, alpha, dim=dim)
    return torch.cat(ends, dim)


class Doubled(torch.autograd.Function):
    """The identity with a wrong derivative."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return grad * (1 + 2**-6)


def wrong_gradient_to_alpha(x: torch.Tensor, alpha: Any, **options: Any) -> Any:
    if isinstance(alpha, torch.Tensor):
        alpha = Doubled.apply(alpha)
    return ema_ext.ema(x, alpha, **options)


def wrong_gradient_to_the_state(
    x: torch.Tensor, alpha: Any, *, initial_state: Any, **options: Any
) -> Any:
    if initial_state is not None:
        initial_state = Doubled.apply(initial_state)
    return ema_ext.ema(x, alpha, initial_state=initial_state, **options)


def wrong_gradient_to_a(a: Any, b: torch.Tensor, **options: Any) -> Any:
    if isinstance(a, torch.Tensor):
        a = Doubled.apply(a)
    return ema_ext.linear_recurrence(a, b, **options)


def wrong_gradient_to_b(a: Any, b: torch.Tensor, **options: Any) -> Any:
    return ema_ext.linear_recurrence(a, Doubled.apply(b), **options)


def coefficients_one_step_late(a: Any, b: torch.Tensor, *, dim: int, **options: Any) -> Any:
    if isinstance(a, torch.Tensor) and a.dim() == b.dim():
        a = a.roll(1, dim)
    return ema_ext.linear_recurrence(a, b, dim=dim, **options)


@pytest.mark.parametrize(
    ("op", "wrong", "says"),
    [
        ("ema", last_digits, " y"),
        ("ema", dropped_carry, " y"),
        ("ema", wrong_gradient_to_alpha, "grad alpha"),
        ("ema", wrong_gradient_to_the_state, "grad initial_state"),
        ("linear_recurrence", coefficients_one_step_late, " y"),
        ("linear_recurrence", wrong_gradient_to_a, "grad a"),
        ("linear_recurrence", wrong_gradient_to_b, "grad b"),
    ],
)
def test_finds_what_is_planted(
    op: str, wrong: Function, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a fuzzer that looks away, or whose reproducer is not the case that failed."""
    ops = {**fuzz.OPS, op: wrong}
    monkeypatch.setattr(bounds, "WORST", {})  # these errors are none of the package's
    with pytest.raises(fuzz.Found) as found:
        fuzz.fuzz(60, seed=4, ops=ops)
    message, line = str(found.value).splitlines()
    assert says.strip() in message
    call = ast.parse(line.partition("-c ")[2].strip('"').partition("; ")[2], mode="eval")
    case = eval(compile(ast.Expression(call.body.args[0]), "case", "eval"), vars(fuzz))
    with pytest.raises(AssertionError):
        fuzz.check(case, ops=ops)
    fuzz.check(case)


def test_finds_nothing_else() -> None:
    """Catches a fuzzer that nobody has run since the operators changed."""
    assert fuzz.fuzz(5, seed=1) > 0


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command line that no longer starts."""
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--seconds", "0.1", "--seed", "3"])
    runpy.run_path(fuzz.__file__, run_name="__main__")
    assert "none wrong" in capsys.readouterr().out
