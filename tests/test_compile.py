"""torch.compile and torch.export: one graph for all lengths, each operator as its fake says.

tests/test_transforms.py holds what torch.func does and what is refused while compiling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, LAYOUTS, signal
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from ema_ext import EMA, ema, linear_recurrence

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on compiling


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


class Graphs:
    """The backend aot_eager, which counts the graphs it is given.

    torch 2.13 may hand over one graph twice (seen: at the first tensor alpha, at the second float),
    so tests look at what later calls add.
    """

    def __init__(self) -> None:
        self.count = 0
        self.backend = lookup_backend("aot_eager")

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.count += 1
        return self.backend(graph, inputs)


def compiled(f: Callable[..., Any], **options: Any) -> tuple[Any, Graphs]:
    """f compiled as one graph, and the counter of graphs."""
    graphs = Graphs()
    return torch.compile(f, fullgraph=True, backend=graphs, **options), graphs


def outputs_and_gradients(f: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    y, state = f(*inputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return [y, state, *torch.autograd.grad(y.square().sum() + state.sum(), wanted)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_layer_forward_and_backward(backend: str) -> None:
    """Catches a graph break in the layer, and a kernel that inductor calls with other strides."""
    module = EMA(0.3, 4, dim=1, channel_dim=2)
    x = signal(2, 9, 4, dtype=torch.float32).transpose(0, 1).contiguous().transpose(0, 1)
    x = x.requires_grad_()

    logit = module.logit
    quick = torch.compile(lambda x: module(2 * x, 0.5, True), fullgraph=True, backend=backend)
    got = outputs_and_gradients(lambda x, _: quick(x), x, logit)
    want = outputs_and_gradients(lambda x, _: module(2 * x, 0.5, True), x, logit)
    # elementwise parts are fused and reassociated: the gradients are sums of up to 18 products
    for a, b in zip(got, want, strict=True):
        bound = 2 * 18 * torch.finfo(torch.float32).eps * b.abs().max()
        assert a.shape == b.shape
        assert (a - b).abs().max() <= (bound if backend == "inductor" else 0)
    assert got[0].stride() == want[0].stride()


def test_inductor_with_a_coefficient_per_step() -> None:
    """Catches a backward that inductor cannot lower, or whose strides it takes for others."""

    def call(x: Tensor, alpha: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        y = ema(x, alpha, initial_state=s)
        return linear_recurrence(alpha.sin(), y, initial_state=s, return_state=True)

    x, alpha = signal(2, 3, 9).mT.requires_grad_(), signal(3, seed=1).sigmoid().requires_grad_()
    inputs = [x, alpha, signal(2, 9, seed=2).requires_grad_()]
    got, want = (
        outputs_and_gradients(f, *inputs) for f in (torch.compile(call, fullgraph=True), call)
    )
    for a, b in zip(got, want, strict=True):
        assert a.stride() == b.stride()
        # sin is inductor's own, to an ulp, and enters each of the 3 steps of 18 rows
        assert (a - b).abs().max() <= 3 * 18 * torch.finfo(torch.float64).eps * b.abs().max()


def test_no_graph_per_length() -> None:
    """Catches a Python number made of a size: each new length would compile anew."""
    call, graphs = compiled(lambda x, a: ema(x, a, return_state=True), dynamic=True)
    counts = []
    for length in (5, 8, 33, 64, 1000):
        x = signal(3, length).requires_grad_()
        alpha = torch.tensor(0.3).double().requires_grad_()
        got = outputs_and_gradients(call, x, alpha)
        want = outputs_and_gradients(lambda x, a: ema(x, a, return_state=True), x, alpha)
        assert all(map(torch.equal, got, want))
        counts.append(graphs.count)
    assert counts == counts[:1] * 5


def test_tensor_alpha_is_no_constant() -> None:
    """Catches an alpha read on the host: the second value would recompile, or be the first."""
    call, graphs = compiled(ema)
    x = signal(3, 9)
    counts = []
    for value in (0.1, 0.2, 0.3, 1.0):
        alpha = torch.tensor(value).double()
        assert torch.equal(call(x, alpha), ema(x, alpha))
        counts.append(graphs.count)
    assert counts == counts[:1] * 4


def test_float_alpha_is_a_constant() -> None:
    """Catches a float that becomes symbolic, which the operator's schema cannot take as exact."""
    call, graphs = compiled(lambda x, alpha: ema(x, alpha))
    x = signal(3, 9)
    counts = []
    for value in (0.1, 0.2, 0.3, 0.4):
        assert torch.equal(call(x, value), ema(x, value))
        counts.append(graphs.count)
    assert counts == sorted(set(counts))  # each value adds
    for value in (0.1, 0.2, 0.3, 0.4):
        assert torch.equal(call(x, value), ema(x, value))
    assert graphs.count == counts[-1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


class Model(torch.nn.Module):
    """Every kind of coefficient, and a state."""

    def __init__(self) -> None:
        super().__init__()
        self.smooth = EMA(0.2, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.smooth(x, 0.5, True)
        y = ema(y, x.sigmoid())
        y = linear_recurrence(x[:, :1].tanh(), y, initial_state=state)
        return ema(y, 0.4, reverse=True), state


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, tmp_path: Path) -> None:
    """Catches an operator that cannot be exported, or a saved program that needs the length."""
    length = torch.export.Dim("length", min=2, max=4096)
    model, x = Model(), signal(2, 3, 20, dtype=torch.float32)
    program = torch.export.export(model, (x,), dynamic_shapes=({2: length},), strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in (20, 33):
        x = signal(2, 3, size, dtype=torch.float32)
        assert all(map(torch.equal, loaded(x), model(x)))


def operator_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments for every registered operator."""
    x, s = signal(2, 3, 5), signal(2, 5, seed=1)
    per_row = signal(2, 1, 5, seed=2).sigmoid()
    weights = signal(3, 1, seed=4).sigmoid()
    y, g = signal(2, 3, 5, seed=3), signal(2, 3, 5, seed=5)
    return {
        "ema.default": (x, 0.3, s, 1, False),
        "ema.Samples": (x, 0.3, 1, True),
        "ema.Tensor": (x, per_row, s, 1, True),
        "ema_with_state.default": (x, 0.3, None, 1, False),
        "ema_with_state.Tensor": (x, per_row, s, -2, False),
        "ema_backward.default": (x, s, 0.3, True, 1, False),
        "ema_backward.Samples": (x, 0.3, -2, True),
        "ema_backward.Tensor": (x, s, signal(2, 3, 5, seed=3), per_row, s, 1, False),
        "ema_backward.Varying": (g, s, x, weights, y, s, 1, False),
        "linear_recurrence.default": (weights, x, s, 1, False),
        "linear_recurrence_with_state.default": (per_row, x, s, 1, True),
        "linear_recurrence_backward.default": (g, s, weights, y, s, 1, False),
        "sum_to.default": (x, weights),
    }


def overloads() -> list[str]:
    """Every operator that the library registers, as name.overload."""
    names = {str(name) for name in torch._C._dispatch_get_all_op_names()}
    own = sorted(name.removeprefix("ema_ext::") for name in names if name.startswith("ema_ext::"))
    return [name if "." in name else f"{name}.default" for name in own]


@pytest.mark.parametrize("name", overloads())
def test_opcheck(name: str) -> None:
    """Catches a schema that lies about aliases, or a fake that has other shapes or strides."""
    packet, overload = name.split(".")
    op = getattr(getattr(torch.ops.ema_ext, packet), overload)
    opcheck(op, operator_calls()[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", [name for name in overloads() if name != "sum_to.default"])
def test_dim_from_the_end(name: str) -> None:
    """Catches an operator, its fake or its vmap that takes a negative dim for another dimension."""
    packet, overload = name.split(".")
    op = getattr(getattr(torch.ops.ema_ext, packet), overload)
    arguments = list(operator_calls()[name])
    at = next(i for i, argument in enumerate(arguments) if type(argument) is int)
    assert arguments[at] in (1, -2)
    for fake in (False, True):
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
            arguments[at] = 1
            wanted = results(op(*arguments))
            arguments[at] = -2
            got = results(op(*arguments))
        assert [tensor.shape for tensor in got] == [tensor.shape for tensor in wanted]
        if not fake:
            assert all(map(torch.equal, got, wanted))

    stacked = [a.expand(4, *a.shape) if isinstance(a, Tensor) else a for a in arguments]
    mapped = results(
        torch.vmap(op, in_dims=tuple(0 if isinstance(a, Tensor) else None for a in arguments))(
            *stacked
        )
    )
    for tensor, one in zip(mapped, results(op(*arguments)), strict=True):
        assert all(torch.equal(each, one) for each in tensor)


def results(returned: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return returned if isinstance(returned, tuple) else (returned,)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, on tracing
@pytest.mark.parametrize("call", [{}, {"dim": 0, "reverse": True}], ids=["usual", "reverse"])
def test_compiled_autograd(call: dict[str, Any]) -> None:
    """Catches a backward of the usual call that torch.compile cannot trace."""
    x = signal(7, 50).requires_grad_()
    ema(x, 0.3, **call).square().sum().backward()
    wanted, x.grad = x.grad, None
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        ema(x, 0.3, **call).square().sum().backward()
    assert torch.equal(x.grad, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_and_meta(dtype: torch.dtype, layout: str) -> None:
    """Catches a fake that promises contiguous strides, or a state in the wrong dtype."""
    x = LAYOUTS[layout](signal(3, 4, 5, dtype=dtype))
    want = ema(x, 0.3, dim=1, return_state=True)
    with FakeTensorMode() as mode:
        fake = ema(mode.from_tensor(x), 0.3, dim=1, return_state=True)
    meta = ema(x.to("meta"), 0.3, dim=1, return_state=True)
    for got in (fake, meta):
        for a, b in zip(got, want, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert fake[0].stride() == want[0].stride()
    assert meta[0].stride() == torch.empty_like(x.to("meta")).stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_leaves_dtypes(dtype: torch.dtype) -> None:
    """Catches an average rounded to bfloat16 because a matrix product around it is."""
    x = signal(3, 9, dtype=dtype).requires_grad_()
    module = EMA(0.3)
    want = module(x, 0.0, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(x, 0.0, True)
        assert torch.equal(ema(x, 0.3), ema(x.detach(), 0.3))
        y, state = linear_recurrence(torch.tensor(0.3), x, return_state=True)
    assert (y.dtype, state.dtype) == (dtype, want[1].dtype)
    assert all(map(torch.equal, got, want))
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in want]


class Gated(torch.nn.Module):
    """A coefficient per step and a learned one."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = torch.nn.Parameter(signal(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = linear_recurrence(self.logit.sigmoid(), ema(x, x.sigmoid()))
        return y


@pytest.mark.parametrize("module", [EMA(0.3, 3), Gated()], ids=["EMA", "per step"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, module: Any) -> None:
    """Catches a backward that uses what the first forward kept and the second did not."""
    x = signal(3, 9).requires_grad_()

    def gradients(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        module.zero_grad()
        x.grad = None
        call(x).square().sum().backward()
        assert x.grad is not None
        assert module.logit.grad is not None
        return [x.grad, module.logit.grad]

    got = gradients(lambda x: checkpoint(module, x, use_reentrant=reentrant))
    assert all(map(torch.equal, got, gradients(module)))


@pytest.mark.parametrize("f", [ema, lambda x, alpha: linear_recurrence(alpha, x)], ids=["ema", "a"])
@pytest.mark.parametrize("shape", [(), (3, 1), (9,), (3, 9)])
def test_saved_tensor_hooks(shape: tuple[int, ...], f: Callable[..., Tensor]) -> None:
    """Catches a tensor kept outside save_for_backward: offloading to disk or host misses it."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.clone())
        return len(packed) - 1

    x, alpha = signal(3, 9).requires_grad_(), signal(*shape, seed=1).sigmoid().requires_grad_()
    want = torch.autograd.grad(f(x, alpha).square().sum(), [x, alpha])
    with saved_tensors_hooks(pack, lambda index: packed[index]):
        loss = f(x, alpha).square().sum()
    assert any(tensor.shape == x.shape for tensor in packed)
    assert all(map(torch.equal, torch.autograd.grad(loss, [x, alpha]), want))


def test_no_global_state() -> None:
    """Catches a call that leaves a mode, a default or a seed changed, or remembers the last one."""

    def state() -> list[Any]:
        return [
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
            torch.get_rng_state().tolist(), torch.is_deterministic_algorithms_warn_only_enabled(),
        ]  # fmt: skip

    before = state()
    x, alpha = signal(3, 9).requires_grad_(), torch.tensor(0.3).double().requires_grad_()
    first = ema(x, alpha, return_state=True)
    ema(10 * x, 0.9, reverse=True).sum().backward()
    with pytest.raises(ValueError, match="alpha"):
        ema(x, 2.0)
    assert all(map(torch.equal, ema(x, alpha, return_state=True), first))
    assert state() == before
