"""Every wrong argument is refused by name, with the value given and the one expected."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import csr, nested, quantized
from torch import Tensor
from torch._subclasses import FakeTensorMode

from ema_ext import _library, ema, linear_recurrence

X = torch.zeros(2, 3, 5)
FLOATS = "torch.float16, torch.bfloat16, torch.float32, torch.float64"

# name: (arguments, error, what the message says)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x no tensor": ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    "x integer": ({"x": X.int()}, TypeError, rf"x .* {FLOATS}, got torch.int32; cast to float"),
    "x bool": ({"x": X.bool()}, TypeError, "x .* got torch.bool; cast to float"),
    "x complex": ({"x": X + 0j}, TypeError, "x must be real, got torch.complex64"),
    "x float8": (
        {"x": X.to(torch.float8_e5m2)},
        TypeError,
        rf"x must be one of {FLOATS}, got torch.float8_e5m2",
    ),
    "x sparse": ({"x": X.to_sparse()}, TypeError, "x must be a dense tensor.*torch.sparse_coo"),
    "x 0-dim": ({"x": torch.tensor(1.0)}, ValueError, "x must have at least 1 dim.* 0-dim"),
    "dim too large": ({"dim": 3}, IndexError, r"dim .*range of \[-3, 2\], but got 3"),
    "dim too small": ({"dim": -4}, IndexError, r"dim .*range of \[-3, 2\], but got -4"),
    "dim no int": ({"dim": 1.0}, TypeError, "dim must be an int, got float"),
    "alpha above 1": ({"alpha": 1.5}, ValueError, r"alpha must lie in \[0, 1\], got 1.5"),
    "alpha below 0": ({"alpha": -1e-9}, ValueError, r"alpha must lie in \[0, 1\], got -1e-09"),
    "alpha NaN": ({"alpha": math.nan}, ValueError, r"alpha must lie in \[0, 1\], got nan"),
    "alpha int": ({"alpha": 2}, ValueError, r"alpha must lie in \[0, 1\], got 2.0"),
    "alpha bool": ({"alpha": True}, TypeError, "alpha must be a float or a torch.*, got bool"),
    "alpha str": ({"alpha": "0.5"}, TypeError, "alpha must be a float or a torch.*, got str"),
    "alpha None": ({"alpha": None}, TypeError, "alpha must be a float or a torch.*, got NoneType"),
    "alpha complex": ({"alpha": 0.5j}, TypeError, "alpha must be a float.*, got complex"),
    "alpha list": ({"alpha": [0.5]}, TypeError, "alpha must be a float or a torch.*, got list"),
    "alpha integer tensor": (
        {"alpha": torch.tensor(1)},
        TypeError,
        "alpha must be one of .* got torch.int64; cast to float",
    ),
    "alpha complex tensor": (
        {"alpha": torch.tensor(0.5j)},
        TypeError,
        "alpha must be real, got torch.complex64",
    ),
    "alpha sparse": (
        {"alpha": torch.full((3, 1), 0.5).to_sparse()},
        TypeError,
        "alpha must be a dense tensor.*sparse_coo",
    ),
    "alpha does not expand": (
        {"alpha": torch.full((4, 1), 0.5)},
        ValueError,
        r"alpha of shape \(4, 1\) does not expand to x of shape \(2, 3, 5\)$",
    ),
    "alpha per channel without a time axis": (
        {"alpha": torch.full((3,), 0.5)},
        ValueError,
        r"alpha of shape \(3,\) .* \(2, 3, 5\); did you mean alpha\[:, None\]\?",
    ),
    "alpha per row without a time axis": (
        {"alpha": torch.full((2, 3), 0.5)},
        ValueError,
        r"alpha of shape \(2, 3\) .* \(2, 3, 5\); did you mean alpha\[:, :, None\]\?",
    ),
    "alpha would expand x": (
        {"alpha": torch.full((2, 2, 3, 1), 0.5)},
        ValueError,
        r"alpha of shape \(2, 2, 3, 1\) does not expand to x of shape \(2, 3, 5\)$",
    ),
    "alpha of other steps than x": (
        {"alpha": torch.full((4,), 0.5)},
        ValueError,
        r"alpha of shape \(4,\) does not expand to x of shape \(2, 3, 5\)$",
    ),
    "alpha on another device": (
        {"alpha": torch.full((3, 1), 0.5, device="meta")},
        RuntimeError,
        "alpha is on meta but x is on cpu",
    ),
    "initial_state str": (
        {"initial_state": "0"},
        TypeError,
        "initial_state must be a float or a torch.*, got str",
    ),
    "initial_state bool": (
        {"initial_state": False},
        TypeError,
        "initial_state must be a float or a torch.*, got bool",
    ),
    "initial_state integer": (
        {"initial_state": torch.zeros(2, 3, dtype=torch.long)},
        TypeError,
        "initial_state must be one of .* got torch.int64",
    ),
    "initial_state with a time axis": (
        {"initial_state": torch.zeros(2, 3, 1)},
        ValueError,
        r"initial_state of shape \(2, 3, 1\) does not expand to \(2, 3\).* without dim 2",
    ),
    "initial_state of another dim": (
        {"initial_state": torch.zeros(2, 3), "dim": 1},
        ValueError,
        r"initial_state of shape \(2, 3\) does not expand to \(2, 5\).* without dim 1",
    ),
    "initial_state on another device": (
        {"initial_state": torch.zeros(2, 3, device="meta")},
        RuntimeError,
        "initial_state is on meta but x is on cpu",
    ),
    "state of an empty series": (
        {"x": torch.zeros(2, 0), "return_state": True},
        ValueError,
        r"return_state: x of shape \(2, 0\) .* initial_state is None",
    ),
}


#: No argument may be one of these: made from zeros, and how that is said.
STRANGE: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "integer": (Tensor.int, TypeError, r"one of .*, got torch\.int32; cast to float"),
    "bool": (Tensor.bool, TypeError, r"one of .*, got torch\.bool; cast to float"),
    "complex": (lambda t: t + 0j, TypeError, r"real, got torch\.complex64"),
    "float8": (lambda t: t.to(torch.float8_e5m2), TypeError, r"one of .*, got torch\.float8_e5m2"),
    "quantized": (lambda t: quantized(*t.shape), TypeError, r"one of .*, got torch\.qint8"),
    "sparse": (Tensor.to_sparse, TypeError, r"a dense tensor .*, got torch\.sparse_coo"),
    "csr": (lambda _: csr(), TypeError, r"a dense tensor .*, got torch\.sparse_csr"),
    "mkldnn": (Tensor.to_mkldnn, TypeError, r"a dense tensor .*, got torch\._mkldnn"),
    "nested": (lambda _: nested(torch.strided), TypeError, "a dense tensor .*, got nested"),
    "jagged": (lambda _: nested(torch.jagged), TypeError, "a dense tensor .*, got nested"),
    "list": (Tensor.tolist, TypeError, r"a (float or a )?torch\.Tensor, got list"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x", lambda t: ema(t, 0.5)),
        ("alpha", lambda t: ema(X, t)),
        ("initial_state", lambda t: ema(X, 0.5, initial_state=t)),
        ("a", lambda t: linear_recurrence(t, X)),
        ("b", lambda t: linear_recurrence(0.5, t)),
        ("initial_state", lambda t: linear_recurrence(0.5, X, initial_state=t)),
    ],
    ids=["x", "alpha", "initial_state", "a", "b", "initial_state of a recurrence"],
)
def test_no_argument_may_be_strange(kind: str, name: str, call: Callable[[Any], object]) -> None:
    """Catches a check that one argument passes by, and an error that does not name it."""
    make, error, message = STRANGE[kind]
    with pytest.raises(error, match=f"^{name} must be {message}"):
        call(make(torch.zeros(2, 3)))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, requires_grad: bool) -> None:
    """Catches a check that only one of the two paths, with and without a gradient, passes."""
    changed, error, message = REFUSED[case]
    arguments = {"x": X, "alpha": 0.5, **changed}
    x = arguments["x"]
    if requires_grad and isinstance(x, torch.Tensor) and x.is_floating_point():
        arguments["x"] = x.clone().requires_grad_()
    with pytest.raises(error, match=message) as caught:
        ema(**arguments)
    assert caught.type is error


def test_nested_x() -> None:
    """Catches a nested tensor taken for a dense one: its rows differ in length."""
    rows = [torch.zeros(3), torch.zeros(5)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(TypeError, match=r"x must be a dense tensor.*nested"):
        ema(nested, 0.5)


def test_options_are_keywords() -> None:
    """Catches a signature in which a third positional argument has a meaning."""
    with pytest.raises(TypeError):
        ema(X, 0.5, 1)  # type: ignore[misc]


def test_cuda_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the dispatcher's page of text in the place of the reason and the way to rebuild."""
    reason = "this build has no CUDA kernels (why); (how to rebuild)"
    monkeypatch.setattr(_library, "cuda_unavailable_reason", lambda: reason)
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
        with pytest.raises(RuntimeError, match=re.escape(f"x is on cuda:0, but {reason}")):
            ema(x, 0.5)


def test_another_device_without_kernels() -> None:
    """Catches a foreign device taken for the cpu."""
    with FakeTensorMode():
        x = torch.empty(2, 3, device="xpu")
        with pytest.raises(RuntimeError, match="x is on xpu:0, but ema_ext has no kernels for xpu"):
            ema(x, 0.5)


def test_a_0_dim_tensor_on_the_cpu_may_stand_beside_any_device() -> None:
    """Catches a number in a tensor that has to be moved by hand."""
    x, number = X.to("meta"), torch.tensor(0.5)
    for function in (ema, lambda x, a, **s: linear_recurrence(a, x, **s)):
        assert function(x, number, initial_state=number).is_meta
        for other in (torch.full((3, 1), 0.5), torch.full((1,), 0.5)):
            with pytest.raises(RuntimeError, match=r"(alpha|a) is on cpu but (x|b) is on meta"):
                function(x, other)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_meta_tensors_are_checked(requires_grad: bool) -> None:
    """Catches a fake kernel that takes what the kernels do not."""
    x = torch.empty(7, device="meta", requires_grad=requires_grad)
    with pytest.raises(IndexError, match="dim"):
        ema(x, 0.5, dim=7)
    with pytest.raises(ValueError, match="x"):
        ema(x[0], 0.5)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="x"):
            ema(torch.empty(7, device="meta", dtype=dtype), 0.5)
