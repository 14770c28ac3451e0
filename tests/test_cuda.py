"""What only a GPU can show: streams, devices, graphs, that nothing waits, memory, huge tensors.

Plain pytest runs these where there is a GPU. tools/gpu.py runs them with all the other tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import bounds
import pytest
import torch
from cases import DTYPES, LAYOUTS, signal
from torch import Tensor

import _ema_ext
from ema_ext import ema, linear_recurrence

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(
        not _ema_ext.build_info()["cuda"],
        reason=f"built without CUDA kernels: {_ema_ext.build_info()['cuda_reason']}",
    ),
]

MIB, GIB = 1 << 20, 1 << 30
A_WHILE = 200_000_000  # clocks: about a tenth of a second

#: Shapes and dims that between them go to every kernel on a GPU of 16 to 200 multiprocessors.
SHAPES = {
    "teams of 8": ((20_000, 21), 1),
    "teams of 32": ((7000, 301), 1),
    "a block a row": ((500, 5001), 1),
    "a row over blocks": ((2, 300_001), 1),
    "channels last": ((200, 301, 64), 1),
    "channels last, long": ((2, 30_001, 64), 1),
}
every_kernel = pytest.mark.parametrize(("shape", "dim"), SHAPES.values(), ids=SHAPES)


def per_row(shape: tuple[int, ...], dim: int, device: str | torch.device = "cuda") -> Tensor:
    """An alpha per row, that learns."""
    rows = [1 if d == dim else size for d, size in enumerate(shape)]
    return signal(*rows, seed=5).abs().clamp(1e-4, 1).to(device).requires_grad_()


def everything(x: Tensor, alpha: Tensor, dim: int) -> list[Tensor]:
    """Outputs and gradients of both operators, by every kernel that this shape goes to."""
    x = x.detach().requires_grad_()
    y, state = ema(x, alpha, dim=dim, return_state=True)
    grads = torch.autograd.grad([y, state], [x, alpha], [x.detach(), state.detach()])
    z = linear_recurrence(1 - alpha.expand(x.shape).detach().to(x.dtype), x, dim=dim)
    return [y, state, *grads, z, *torch.autograd.grad(z, x, x.detach())]


def same_bits(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(got, want, strict=True))


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    """Catches code that the executor runs rightly and this GPU does not."""
    x = signal(*shape, dtype=dtype)
    alpha = per_row(shape, dim, "cpu")
    leaf, there = x.cuda().requires_grad_(), alpha.detach().cuda().requires_grad_()
    y = ema(leaf, there, dim=dim)
    grads = torch.autograd.grad(y, [leaf, there], x.cuda())
    bounds.check_forward(y.detach().cpu(), x, alpha.detach(), dim=dim)
    bounds.check_backward((*(g.cpu() for g in grads), None), x, x, alpha.detach(), dim=dim)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    """Catches an address that is not where 16 bytes may be read at once."""
    x = signal(30, 7001, dtype=torch.float32)
    view = LAYOUTS[layout](x.cuda())
    for dim in (0, 1):
        bounds.check_forward(ema(view, 0.2, dim=dim).cpu(), x, 0.2, dim=dim)


@every_kernel
def test_same_bits_under_load(shape: tuple[int, ...], dim: int) -> None:
    """Catches bits that depend on which block comes first, while another stream takes turns."""
    x, alpha = signal(*shape, dtype=torch.float32).cuda(), per_row(shape, dim)
    want = everything(x, alpha, dim)
    other, noise = torch.cuda.Stream(), torch.rand(4096, 4096, device="cuda")
    for _ in range(10):
        with torch.cuda.stream(other):
            noise.mm(noise)
        assert same_bits(everything(x, alpha, dim), want)


@every_kernel
def test_other_stream(shape: tuple[int, ...], dim: int) -> None:
    """Catches a kernel on the default stream: it would read x before it is there."""
    x, alpha = signal(*shape, dtype=torch.float32).cuda(), per_row(shape, dim)
    want = everything(x, alpha, dim)
    late = torch.full_like(x, torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(A_WHILE)
        late.copy_(x)
        got = everything(late, alpha, dim)
    stream.synchronize()
    assert same_bits(got, want)


def test_streams_side_by_side() -> None:
    """Catches a workspace that two streams share."""
    shape, dim = SHAPES["a row over blocks"]
    alpha = per_row(shape, dim)
    xs = [signal(*shape, dtype=torch.float32, seed=seed).cuda() for seed in range(8)]
    want = [everything(x, alpha, dim) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(5):
        got = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(everything(x, alpha, dim))
        torch.cuda.synchronize()
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@every_kernel
def test_second_device(shape: tuple[int, ...], dim: int) -> None:
    """Catches a launch on the current device in place of the tensor's."""
    x = signal(*shape, dtype=torch.float32)
    got = everything(x.to("cuda:1"), per_row(shape, dim, "cuda:1"), dim)
    assert torch.cuda.current_device() == 0
    assert {tensor.device for tensor in got} == {torch.device("cuda:1")}
    bounds.check_forward(got[0].cpu(), x, per_row(shape, dim, "cpu").detach(), dim=dim)


@every_kernel
def test_graph_replays(shape: tuple[int, ...], dim: int) -> None:
    """Catches messages of the last replay that are taken for this one's, and captured addresses
    that are no longer ours."""
    x, alpha = signal(*shape, dtype=torch.float32).cuda(), per_row(shape, dim)
    everything(x, alpha, dim)  # what is loaded or set up once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything(x, alpha, dim)
    for seed in range(1, 6):
        x.copy_(signal(*shape, dtype=torch.float32, seed=seed))
        want = everything(x, alpha, dim)
        for _ in range(3):
            for tensor in got:
                tensor.detach().fill_(torch.nan)
            graph.replay()
            assert same_bits(got, want)


@contextmanager
def no_synchronization() -> Iterator[None]:
    """An error where torch waits for the GPU, and a failure where anything else does."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(A_WHILE)
        done = torch.cuda.Event()
        done.record()
        yield
        assert not done.query(), "the call waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@every_kernel
def test_nothing_waits(shape: tuple[int, ...], dim: int) -> None:
    """Catches a value read back to the host, a cudaMalloc, a cudaStreamSynchronize."""
    x, alpha = signal(*shape, dtype=torch.float32).cuda(), per_row(shape, dim)
    everything(x, alpha, dim)
    with no_synchronization():
        everything(x, alpha, dim)


def test_alpha_on_either_side() -> None:
    """Catches an alpha on the GPU that is read back, and one on the CPU that is taken for a device
    pointer or whose gradient stays on the GPU."""
    x = signal(3, 50_000, dtype=torch.float32).cuda()
    want = ema(x, 0.25)
    there = torch.tensor(0.25, device="cuda", requires_grad=True)
    here = torch.tensor(0.25, requires_grad=True)
    ema(x, here)
    with no_synchronization():
        got = ema(x, there)
    assert got.equal(want)
    assert ema(x, here).equal(want)
    gradients = [torch.autograd.grad(ema(x, a).sum(), a)[0] for a in (there, here)]
    assert [gradient.device.type for gradient in gradients] == ["cuda", "cpu"]
    assert gradients[0].item() == gradients[1].item()


def test_devices_may_not_be_mixed() -> None:
    """Catches a pointer of the CPU handed to a kernel."""
    x = torch.ones(3, 8, device="cuda")
    with pytest.raises(RuntimeError, match=r"alpha.*cpu.*cuda"):
        ema(x, torch.full([3, 1], 0.5))
    with pytest.raises(RuntimeError, match=r"initial_state.*cpu.*cuda"):
        ema(x, 0.5, initial_state=torch.zeros(3))


def peak(call: Callable[[], object]) -> int:
    """By how many bytes a call raises what torch's allocator has handed out."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_peak_memory(layout: str, dim: int) -> None:
    """Catches a contiguous() of the input and a workspace of the samples' size."""
    x = LAYOUTS[layout](torch.ones(64, 64, 4096, device="cuda")).requires_grad_()
    most = x.numel() * x.element_size() * 33 // 32 + MIB
    assert peak(lambda: ema(x.detach(), 0.1, dim=dim)) <= most
    g = torch.ones_like(x)
    for alpha in (0.1, torch.full([], 0.1, device="cuda", requires_grad=True)):
        wanted = [x, alpha] if isinstance(alpha, Tensor) else [x]
        y = ema(x, alpha, dim=dim)
        assert peak(lambda y=y, wanted=wanted: torch.autograd.grad(y, wanted, g)) <= most


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((1, (1 << 31) + 1001), 1), (((1 << 23) + 3, 257), 1), ((3, (1 << 20) + 5, 700), 1)],
    ids=["one row", "many rows", "channels last"],
)
def test_more_than_31_bits(shape: tuple[int, ...], dim: int) -> None:
    """Catches an index or an offset that does not go beyond 2^31."""
    samples = torch.Size(shape).numel()
    assert samples > 1 << 31
    if torch.cuda.mem_get_info()[0] < 2 * samples * 2 + GIB:
        pytest.skip("the GPU has too little memory")
    x = torch.ones(shape, dtype=torch.bfloat16, device="cuda")
    end = x.narrow(dim, shape[dim] - 200, 200)
    end.select(dim, 100).mul_(3)
    y = ema(x, 0.5, dim=dim)
    expected = ema(end.contiguous(), 0.5, dim=dim, initial_state=1.0)
    assert y.narrow(dim, shape[dim] - 200, 200).equal(expected)
    assert y.narrow(dim, 0, shape[dim] - 200).eq(1).all()


@pytest.mark.parametrize("rows", [65_536, 1_000_003])
def test_more_rows_than_a_grid_has(rows: int) -> None:
    """Catches rows in grid.y, which stops at 65 535."""
    x = signal(rows, 9, dtype=torch.float32)
    bounds.check_forward(ema(x.cuda(), 0.5).cpu(), x, 0.5)
