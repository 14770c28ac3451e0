"""The nastiest arguments to the public function and to the registered operators.

Each case runs in a forked child of one process that has torch loaded: an error, or a right result,
is a pass, and a signal is a failure. As a script this file is that process.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
from cases import csr, nested, quantized
from torch import Tensor

from ema_ext import ema, linear_recurrence

MIB = 1 << 20

Case = Callable[[], object]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def freed(tensor: Tensor) -> Tensor:
    """A tensor that has given its memory back, as sharded training does with parameters."""
    tensor.untyped_storage().resize_(0)
    return tensor


def huge(*shape: int) -> Tensor:
    """One element under a shape that no memory holds."""
    return torch.zeros(()).expand(shape)


# --- arguments that the public function refuses: how, and what the message says -----------------

X = torch.zeros(2, 3, 5)

REFUSED: dict[str, tuple[Case, str]] = {
    "sparse x": (lambda: ema(X.to_sparse(), 0.5), "TypeError: x .*sparse"),
    "sparse csr x": (lambda: ema(csr(), 0.5), "TypeError: x .*sparse_csr"),
    "sparse alpha": (lambda: ema(X, torch.eye(3).to_sparse()), "TypeError: alpha .*sparse"),
    "sparse initial_state": (
        lambda: ema(X, 0.5, initial_state=torch.zeros(2, 3).to_sparse()),
        "TypeError: initial_state .*sparse",
    ),
    "mkldnn x": (lambda: ema(X.to_mkldnn(), 0.5), "TypeError: x .*mkldnn"),
    "quantized x": (lambda: ema(quantized(2, 5), 0.5), "TypeError: x .*qint8"),
    "quantized alpha": (lambda: ema(X, quantized(3, 1)), "TypeError: alpha .*qint8"),
    "complex x": (lambda: ema(X + 0j, 0.5), "TypeError: x must be real"),
    "complex alpha": (lambda: ema(X, torch.tensor(0.5j)), "TypeError: alpha must be real"),
    "integer x": (lambda: ema(X.int(), 0.5), "TypeError: x .*int32"),
    "integer alpha": (lambda: ema(X, torch.tensor(1)), "TypeError: alpha .*int64"),
    "nested x": (lambda: ema(nested(torch.strided), 0.5), "TypeError: x .*nested"),
    "jagged x": (lambda: ema(nested(torch.jagged), 0.5), "TypeError: x .*nested"),
    "nested alpha": (lambda: ema(X, nested(torch.strided)), "TypeError: alpha .*nested"),
    "meta alpha": (
        lambda: ema(X, torch.zeros((3, 1), device="meta")),
        "RuntimeError: alpha .*meta",
    ),
    "meta x with a cpu state": (
        lambda: ema(X.to("meta"), 0.5, initial_state=torch.zeros(2, 3)),
        "RuntimeError: initial_state .*cpu",
    ),
    "0-dim x": (lambda: ema(torch.tensor(1.0), 0.5), "ValueError: x .*0-dim"),
    "65 dimensions": (lambda: ema(torch.zeros([1] * 65), 0.5), "RuntimeError: .*x has 65 dim"),
    "output beyond all memory": (
        lambda: ema(huge(1 << 20, 1 << 30), 0.5),
        "RuntimeError: .*memory",
    ),
    "state beyond all memory": (
        lambda: ema(huge(1 << 31, 1 << 20, 0), 0.5, initial_state=0.0, return_state=True),
        "RuntimeError: .*memory",
    ),
    "x whose memory was freed": (
        lambda: ema(freed(noise(4, 50)), 0.5),
        "RuntimeError: .*x has .*no memory",
    ),
    "alpha whose memory was freed": (
        lambda: ema(noise(4, 50), freed(torch.rand(4, 1))),
        "RuntimeError: .*alpha has .*no memory",
    ),
    "quantized a": (lambda: linear_recurrence(quantized(3, 1), X), "TypeError: a .*qint8"),
    "quantized b": (lambda: linear_recurrence(0.5, quantized(2, 5)), "TypeError: b .*qint8"),
    "mkldnn b": (lambda: linear_recurrence(0.5, X.to_mkldnn()), "TypeError: b .*mkldnn"),
    "nested a": (lambda: linear_recurrence(nested(torch.strided), X), "TypeError: a .*nested"),
    "jagged b": (lambda: linear_recurrence(0.5, nested(torch.jagged)), "TypeError: b .*nested"),
    "a and b that broadcast beyond all memory": (
        lambda: linear_recurrence(huge(1 << 20, 1), huge(1 << 30)),
        "RuntimeError: .*memory",
    ),
    "a whose memory was freed": (
        lambda: linear_recurrence(freed(torch.rand(4, 50)), noise(4, 50)),
        "RuntimeError: .*a has .*no memory",
    ),
    "alpha per step whose memory was freed": (
        lambda: ema(noise(4, 50), freed(torch.rand(50))),
        "RuntimeError: .*alpha has .*no memory",
    ),
    "initial_state whose memory was freed": (
        lambda: ema(noise(4, 50), 0.5, initial_state=freed(torch.rand(4).double())),
        "RuntimeError: .*initial_state has .*no memory",
    ),
}


# --- strange arguments that have a right result ---------------------------------------------------


def right(x: Tensor, alpha: Any, **options: Any) -> None:
    bounds.check_forward(ema(x, alpha, **options), x, alpha, label="hostile", **options)


def right_recurrence(a: Tensor, b: Tensor, **options: Any) -> None:
    y = linear_recurrence(a, b, **options)
    bounds.check_recurrence(y, a, b, label="hostile", **options)


def overlapping_views() -> None:
    sliding = torch.rand(300).as_strided((7, 200), (3, 1), 9)
    right_recurrence(sliding, noise(300).as_strided((7, 200), (3, 1), 5))
    right_recurrence(sliding.mT, noise(300).as_strided((200, 7), (1, 3), 11), dim=0)
    right_recurrence(torch.rand(3).as_strided((40, 40), (0, 0), 2), noise(40))
    right(noise(300).as_strided((7, 200), (3, 1), 5), 0.3)
    right(noise(300).as_strided((200, 7), (1, 3), 11), 0.3, dim=0)
    right(noise(300).as_strided((40, 40), (0, 0), 299), 0.3)
    right(noise(64).as_strided((5, 60), (1, 1)), torch.rand(5, 1))


def expanded_over_half_of_the_address_space() -> None:
    """Empty, but with more rows than an int holds: nothing may be counted in 32 bits."""
    assert ema(huge(0, 1 << 40), 0.5).shape == (0, 1 << 40)
    assert ema(huge(1 << 62, 0), 0.5, dim=0).numel() == 0
    assert ema(huge(1 << 31, 1 << 31, 0), 0.5).numel() == 0


def more_elements_than_32_bits_count() -> None:
    """Rows far apart: the offset of the last in elements is beyond 2^32, its index is not."""
    stride = (1 << 31) + 64
    low = torch.empty(2 * stride + 64, dtype=torch.float16)  # mapped, and hardly ever touched
    x = low.as_strided((3, 40), (stride, 1)).copy_(noise(3, 40))
    right(x, 0.3)
    right(x.mT, 0.3, dim=0)
    right_recurrence(x.abs().clamp(max=1), x)
    right_recurrence(x.mT, noise(40, 1), dim=0)


def tensor_alpha_outside_the_unit_interval() -> None:
    alpha = torch.tensor([[-0.5], [1.5], [2.5], [-1e-3], [1 + 1e-6]])
    right(noise(5, 60), alpha)
    right(noise(5, 60).mT.contiguous().mT, alpha)
    right_recurrence(noise(60), noise(5, 60))
    right_recurrence(alpha, noise(5, 60))


def tensor_alpha_not_finite() -> None:
    x = noise(3, 50)
    y = ema(x, torch.tensor([[torch.nan], [torch.inf], [0.5]]))
    assert torch.equal(y[:, 0], x[:, 0])
    assert not y[:2, 1:].isfinite().any()
    right(x[2:], 0.5)


def many_threads_at_once() -> None:
    x, s = noise(40, 3000), noise(40)

    def everything() -> list[Tensor]:
        results = []
        for shape in ((40, 1), (3000,)):
            leaves = [x.detach(), noise(*shape).sigmoid(), s.detach()]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            y = ema(*leaves[:2], initial_state=leaves[2])
            results += [y, *torch.autograd.grad(y, leaves, x)]
        return results

    expected = everything()
    wrong = []

    def work() -> None:
        for _ in range(3):
            if not all(map(torch.equal, everything(), expected)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def inputs_deleted_before_the_backward() -> None:
    x, s = noise(4, 3000).requires_grad_(), noise(4).requires_grad_()
    alpha = torch.full((4, 1), 0.1, requires_grad=True)

    def graph(*leaves: Tensor) -> Tensor:
        x, alpha, s = (leaf * 1 for leaf in leaves)  # only the graph holds these
        return ema(x, alpha, initial_state=s)

    y = graph(x, alpha, s)
    gc.collect()
    junk = [torch.full((4, 3000), torch.nan) for _ in range(8)]
    grads = torch.autograd.grad(y, (x, alpha, s), torch.ones_like(y))
    assert len(junk) == 8
    bounds.check_backward(grads, torch.ones(4, 3000), x, alpha, initial_state=s, label="hostile")


def saved_outputs_changed_in_place() -> None:
    """The gradients to coefficients per sample are made of y: torch must see that it is another."""
    b, a = noise(4, 30).requires_grad_(), torch.rand(30, requires_grad=True)
    calls: tuple[tuple[Callable[[], Tensor], bool], ...] = (
        (lambda: linear_recurrence(a, b), True),
        (lambda: ema(b, a), True),
        (lambda: ema(b, a[:1]), False),
        (lambda: linear_recurrence(0.5, b), False),
    )
    for call, kept in calls:
        y = call()
        with torch.no_grad():
            y.mul_(2)
        refused = False
        try:
            y.sum().backward()
        except RuntimeError as error:
            refused = "modified by an inplace operation" in str(error)
        assert refused == kept


def saved_inputs_changed_in_place() -> None:
    for changed in range(3):
        inputs = [noise(4, 30), torch.full((4, 1), 0.1), noise(4)]
        x, alpha, s = (tensor.requires_grad_() for tensor in inputs)
        y = ema(x * 1, alpha, initial_state=s)
        with torch.no_grad():
            inputs[changed].mul_(2)
        refused = False
        try:
            y.sum().backward()
        except RuntimeError as error:
            refused = "modified by an inplace operation" in str(error)
        # x * 1 and the state in x's shape and dtype are tensors of their own
        assert refused or changed != 1


def interrupted() -> None:
    """Ctrl-C while the kernel runs: KeyboardInterrupt once it has ended, and then all goes on."""
    x, pid = noise(400, 50_000), os.getpid()

    def interrupt() -> None:
        time.sleep(0.02)
        os.kill(pid, signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    try:
        for _ in range(1000):
            ema(x, 0.1)
    except KeyboardInterrupt:
        right(noise(3, 100), 0.1)
    else:
        raise AssertionError("no KeyboardInterrupt")


def after_fork() -> None:
    """In a child of a process whose threads have run: whatever torch.exp does there, ema does."""
    x = noise(64, 20_000)
    torch.set_num_threads(2)
    expected = ema(x, 0.1)

    def ends(call: Case, seconds: int) -> bool:
        child = os.fork()
        if child == 0:
            signal.alarm(seconds)
            call()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    if ends(x.exp, 2):
        assert ends(lambda: torch.equal(ema(x, 0.1), expected) or os._exit(2), 60)


def out_of_memory(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Every allocation of a call may fail: the output's, the state's, the segments', the sums'."""
    torch.set_num_threads(1)
    x, weights = noise(3, 4 * 65_536).requires_grad_(), torch.full((4 * 65_536,), 0.1)
    weights.requires_grad_()
    call(x[:, :100], weights[:100]).sum().backward()  # what is loaded, is loaded now
    x.grad = weights.grad = None
    taken = [torch.empty(MIB, dtype=torch.uint8) for _ in range(64)]  # what the heap has left
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    failed = 0
    while True:  # with ever more room, until there is enough
        x.grad = weights.grad = None
        resource.setrlimit(resource.RLIMIT_AS, (used + failed * MIB // 2, -1))
        try:
            call(x, weights).sum().backward()
            break
        except (RuntimeError, MemoryError):
            failed += 1
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    assert failed > 0
    del taken


OUT_OF_MEMORY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "out of memory": lambda x, w: ema(x, w[0], return_state=True)[0],
    "out of memory with weights per step": lambda x, w: ema(x, w, return_state=True)[0],
    "out of memory in linear_recurrence": lambda x, w: linear_recurrence(w, x),
}


RIGHT: dict[str, Case] = {
    f.__name__: f
    for f in (
        overlapping_views,
        expanded_over_half_of_the_address_space,
        more_elements_than_32_bits_count,
        tensor_alpha_outside_the_unit_interval,
        tensor_alpha_not_finite,
        many_threads_at_once,
        inputs_deleted_before_the_backward,
        saved_inputs_changed_in_place,
        saved_outputs_changed_in_place,
        interrupted,
        after_fork,
    )
}
for name, call in OUT_OF_MEMORY.items():
    RIGHT[name] = functools.partial(out_of_memory, call)


# --- garbage for every argument of every registered operator --------------------------------------

TENSORS: dict[str, Case] = {
    "None": lambda: None,
    "number": lambda: 3,
    "str": lambda: "x",
    "list": lambda: [1.0],
    "0-dim": lambda: torch.tensor(0.5),
    "empty": lambda: torch.zeros(0),
    "empty rows": lambda: torch.zeros(0, 3, 40),
    "empty time": lambda: torch.zeros(2, 3, 0),
    "too short": lambda: noise(2, 3, 39),
    "too long": lambda: noise(2, 3, 41),
    "fewer rows": lambda: noise(1, 3, 40),
    "more rows": lambda: noise(3, 3, 40),
    "transposed shape": lambda: noise(40, 3, 2),
    "one dimension": lambda: noise(40),
    "two dimensions": lambda: noise(2, 3),
    "four dimensions": lambda: noise(1, 2, 3, 40),
    "65 dimensions": lambda: torch.zeros([1] * 65),
    "huge rows": lambda: huge(1 << 40, 3, 40),
    "huge time": lambda: huge(2, 3, 1 << 40),
    "huge and empty": lambda: huge(1 << 31, 1 << 31, 0),
    "float64": lambda: noise(2, 3, 40, dtype=torch.float64),
    "float16": lambda: noise(2, 3, 40, dtype=torch.float16),
    "bfloat16": lambda: noise(2, 3, 40, dtype=torch.bfloat16),
    "float8": lambda: noise(2, 3, 40).to(torch.float8_e5m2),
    "integer": lambda: torch.zeros(2, 3, 40, dtype=torch.int64),
    "bool": lambda: torch.zeros(2, 3, 40, dtype=torch.bool),
    "complex": lambda: noise(2, 3, 40) + 0j,
    "imaginary view": lambda: (noise(2, 3, 40) + 1j).conj().imag,
    "sparse": lambda: noise(2, 3, 40).to_sparse(),
    "csr": csr,
    "mkldnn": lambda: noise(2, 3, 40).to_mkldnn(),
    "quantized": lambda: quantized(2, 3, 40),
    "nested": lambda: nested(torch.strided),
    "jagged": lambda: nested(torch.jagged),
    "meta": lambda: torch.zeros((2, 3, 40), device="meta"),
    "freed": lambda: freed(noise(2, 3, 40)),
    "requires grad": lambda: noise(2, 3, 40).requires_grad_(),
    "overlapping": lambda: noise(300).as_strided((2, 3, 40), (1, 1, 1)),
    "expanded": lambda: noise(1, 1, 1).expand(2, 3, 40),
    "nan": lambda: torch.full((2, 3, 40), torch.nan),
}
#: What no tensor argument may be, and what none but the samples may be.
NEVER = (
    *("str", "list", "65 dimensions", "float8", "integer", "bool", "complex"),
    *("sparse", "csr", "mkldnn", "quantized", "nested", "jagged", "freed"),
)
#: Of those what can be made of a good argument, so that nothing but the kind is wrong.
MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "float8": lambda t: t.to(torch.float8_e5m2),
    "integer": Tensor.int,
    "bool": Tensor.bool,
    "complex": lambda t: t + 0j,
    "sparse": Tensor.to_sparse,
    "mkldnn": Tensor.to_mkldnn,
    "quantized": lambda t: quantized(*t.shape),
    "freed": freed,
}
ONLY_SAMPLES = ("empty", "empty rows", "more rows", "too short", "too long", "four dimensions")

VALUES: dict[str, dict[str, Case]] = {
    "Tensor": TENSORS,
    "Optional[Tensor]": TENSORS,
    "float": {
        str(v): (lambda v=v: v)
        for v in (
            None,
            "x",
            1j,
            torch.nan,
            torch.inf,
            -torch.inf,
            1e308,
            -7.0,
            1.5,
            5e-324,
            1,
            True,
        )
    },
    "int": {
        str(v): (lambda v=v: v)
        for v in (None, "x", 1.5, -1, 3, 64, 1 << 31, 1 << 62, -(1 << 63), (1 << 64) - 1, True)
    },
    "bool": {str(v): (lambda v=v: v) for v in (None, "x", 2, 0.5, True, False)},
}

#: What a good call has under each name; a name that is not here is like x.
GOOD: dict[str, Case] = {
    "alpha": lambda: torch.rand(3, 1),
    "a": lambda: torch.rand(3, 1),
    "initial_state": lambda: noise(2, 3),
    "grad_state": lambda: noise(2, 3),
    "float": lambda: 0.3,
    "int": lambda: 2,
    "bool": lambda: False,
}


def garbage() -> Iterator[tuple[str, Case]]:
    """Calls of every operator with one argument at a time replaced, grouped by argument."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("ema_ext::")]
    for schema in sorted(schemas, key=str):
        op = torch.ops.ema_ext.__getattr__(schema.name.partition("::")[2])
        op = getattr(op, schema.overload_name or "default")
        for i, replaced in enumerate(schema.arguments):

            def calls(i: int = i, schema: Any = schema, op: Any = op) -> None:
                kind = str(schema.arguments[i].type)
                values = dict(VALUES[kind])
                if "Tensor" in kind:
                    for name, make in MADE.items():
                        values[f"{name}, good shape"] = lambda make=make: make(
                            _good(schema.arguments[i])
                        )
                for name, value in values.items():
                    arguments = [_good(argument) for argument in schema.arguments]
                    arguments[i] = value()
                    os.write(2, f"\n{name}".encode())  # the last one before a signal
                    try:
                        result = op(*arguments)
                    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError):
                        continue
                    assert name.partition(",")[0] not in NEVER, f"{name} is taken"
                    samples = schema.arguments[i].name in ("x", "grad_y", "b", "terms")
                    assert samples or name not in ONLY_SAMPLES, f"{name} is taken"
                    for tensor in result if isinstance(result, tuple) else (result,):
                        if tensor.device.type == "cpu" and tensor.layout == torch.strided:
                            tensor.isfinite().all()  # reads every element

            yield f"{op} {replaced.name}", calls


def _good(argument: Any) -> Any:
    kind = str(argument.type)
    make = GOOD.get(argument.name if "Tensor" in kind else kind, lambda: noise(2, 3, 40))
    return make()


# --- the process that forks -----------------------------------------------------------------------

MEMORY = 24 << 30  # of addresses, so that a call that asks for all memory is refused


def outcome(case: Case) -> str:
    """'right', 'Error: message', 'signal N after ...' or 'still running'."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        signal.alarm(120)
        if "ASAN_OPTIONS" not in os.environ:  # it reserves terabytes of addresses
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, -1))
        try:
            case()
            text = "right"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(2, f"\0{text[:2000]}".encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == 0:
        return said.rpartition("\0")[2]
    return f"exit code {code} after {said[-3000:]}"


# Cases about the process's own memory and threads, which a sanitizer makes others.
if "ASAN_OPTIONS" in os.environ:
    for name in [name for name in REFUSED if "beyond all memory" in name]:
        del REFUSED[name]
    for name in (*OUT_OF_MEMORY, "after_fork"):
        del RIGHT[name]


def all_cases() -> dict[str, Case]:
    """What is to run in this process."""
    refused = {name: case for name, (case, _) in REFUSED.items()}
    return {**refused, **RIGHT, **dict(garbage())}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    run = subprocess.run(
        [sys.executable, __file__],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found: dict[str, str] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, outcomes: dict[str, str]) -> None:
    """Catches a crash, or a result, where only an error that names the argument will do."""
    message = REFUSED[case][1]
    assert re.match(message, outcomes[case], re.DOTALL), outcomes[case]


@pytest.mark.parametrize("case", RIGHT)
def test_right(case: str, outcomes: dict[str, str]) -> None:
    """Catches what the case's name says going wrong: a wrong result, an error, a signal."""
    assert outcomes[case] == "right", outcomes[case]


@pytest.mark.parametrize("case", [name for name, _ in garbage()])
def test_garbage_for_an_operator(case: str, outcomes: dict[str, str]) -> None:
    """Catches an operator that trusts its caller: called directly, it must not crash either."""
    assert outcomes[case] == "right", outcomes[case]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    nested(torch.jagged).sum()  # the modules that it takes are then there in every child
    ema(torch.zeros(2, device="meta"), 0.5)
    print(json.dumps({name: outcome(case) for name, case in all_cases().items()}))
