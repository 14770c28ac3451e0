"""The benchmarks' own machinery, on inputs too small to time anything."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import bounds
import numpy as np
import oracle
import pytest
import torch
from cases import signal

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

import accuracy  # noqa: E402
import bars  # noqa: E402
import bench  # noqa: E402
import compare  # noqa: E402
import loops  # noqa: E402
import roofline  # noqa: E402
from bars import BARS, Bar, Entry  # noqa: E402
from measure import Contender, Effort, peak_bytes, take_turns  # noqa: E402
from methods import (  # noqa: E402
    ALPHA,
    BACK,
    BACK_LEARN,
    BOTH,
    FORUM,
    FORWARD,
    LEARN,
    PEERS,
    Problem,
    difference,
    installed_peers,
)

from ema_ext import ema, linear_recurrence  # noqa: E402

ALL = SimpleNamespace(max_seconds=60.0, max_gib=1.0)
SHORT = Effort(rounds=3, sample=1e-6, budget=600)
TINY = (Problem((1, 200)), Problem((4, 50), layout="transposed"), Problem((3, 20, 2), dim=1))


def methods() -> list[Any]:
    return [bench.OURS, bench.CLONE, bench.CUMSUM, *FORUM, *installed_peers()[0]]


@pytest.fixture(scope="module")
def tiny_run() -> Any:
    """A run of everything over tiny problems, on one and two threads."""
    run = bench.Run("cpu", [1, 2])
    some = [method for method in methods() if not method.compiles]
    entries = [
        Entry(method.name, which, threads)
        for method in some
        for which in (FORWARD, BOTH, LEARN)
        for threads in ((1, 2) if method.everywhere else (1,))
    ]
    plan = dict.fromkeys(TINY, entries)
    bench.measure_times(run, plan, some, SHORT, ALL, lambda problems: problems)
    return run


def test_contenders_take_turns() -> None:
    """Catches one contender timed after the other, and a number of threads that stays set."""
    calls: list[str] = []
    threads = torch.get_num_threads()
    contenders = {name: Contender(lambda n=name: calls.append(n), 1) for name in "abc"}
    samples = take_turns(contenders, Effort(rounds=20, sample=0, budget=1))
    assert {len(some) for some in samples.values()} == {20}
    turns = calls[-6 * 19 :: 2]  # all rounds but the first sample's; a warm-up before each call
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    assert torch.get_num_threads() == threads


def test_tiny_run(tiny_run: Any) -> None:
    """Catches a method that a pass or a layout breaks, and a table that loses a timing."""
    for problem in TINY:
        for which in (FORWARD, BOTH, LEARN):
            assert len(tiny_run.samples[problem, Entry("ema_ext", which, 2)]) == SHORT.rounds
    assert (TINY[0], Entry("for-loop (forum)", BOTH)) in tiny_run.samples
    assert not tiny_run.skipped
    text = bench.everything(tiny_run)
    assert text.count("\n") == len(tiny_run.samples) + 1
    table = bench.against_torch(tiny_run, TINY, "tiny")
    assert table.count("\n") == len(TINY) + 1
    assert " - " not in table


def furthest(x: torch.Tensor, roundings: bounds.Roundings) -> float:
    """The largest error that these make, in units of the largest |y|."""
    bound = bounds.pointwise_bound(x, ALPHA, roundings=roundings).max()
    return float(bound / np.abs(oracle.ema(x, ALPHA)).max())


def test_methods_compute_the_same() -> None:
    """Catches a peer with another meaning of alpha, another start, or another axis."""
    length = 2000
    row = Problem((1, length))
    run = bench.Run("cpu", [1])
    bench.measure_differences(run, methods(), ALL, row)
    assert {"ema_ext", "for-loop (forum)", "weight matrix (forum)"} <= set(run.differences)
    x = row.input("cpu")
    # More roundings than any of them has; what conv1d leaves out; ema_ext's own error.
    most = bounds.Roundings(base=2 * length, per_step=4, truncation=1e-8)
    assert run.differences["ema_ext"] == 0
    assert max(run.differences.values()) <= furthest(x, most)


def test_plan_covers_every_bar() -> None:
    """Catches a bar whose timings the plan, or the plan of the bars alone, leaves out."""
    entries = bench.plan([1, 2], methods(), quick=True)
    for plan in (entries, bench.only_bars(entries)):
        for bar in BARS:
            assert {bar.ours, bar.other} <= set(plan[bar.problem])


def test_verdicts() -> None:
    """Catches a ratio upside down, and a bar that counts as met though it was not measured."""
    problem, fast, slow = Problem((1, 10)), Entry("ema_ext"), Entry("other")
    run = bench.Run("cpu", [1])
    at_most, at_least = Bar(problem, fast, slow, 0.4, True), Bar(problem, fast, slow, 4, False)
    assert bench.verdict(run, at_most)["met"] is None
    run.samples = {(problem, fast): [1.0, 9.0], (problem, slow): [5.0, 3.0]}
    found = [bench.verdict(run, bar) for bar in (at_most, at_least)]
    assert [v["measured"] for v in found] == [1 / 3, 3.0]
    assert [v["met"] for v in found] == [True, False]
    assert bench.bar_table(found).endswith("2 bars: 1 met, 1 missed, 0 not measured.")


def as_json(run: Any) -> dict[str, Any]:
    """As compare.py finds it in a file."""
    found: dict[str, Any] = json.loads(json.dumps(bench.as_json(run, [], "test")))
    return found


@pytest.fixture
def steady(tiny_run: Any) -> dict[str, Any]:
    """A run's JSON with samples of a known spread: the lower quartile is 1 % above the least."""
    data = as_json(tiny_run)
    for time in data["times"]:
        least = min(time["seconds"])
        time["seconds"] = [least * factor for factor in (1, 1.01, 1.02, 1.03, 1.04)]
    return data


def scaled(data: dict[str, Any], method: str | None, factor: float) -> dict[str, Any]:
    """The same with a method (None: all) slower on the first problem (None: on all)."""
    data = copy.deepcopy(data)
    for time in data["times"]:
        if method is None or (time["method"], time["name"]) == (method, TINY[0].name):
            time["seconds"] = [seconds * factor for seconds in time["seconds"]]
    return data


def test_compare_finds_what_moved(steady: dict[str, Any]) -> None:
    """Catches a change that noise swallows, and one without a sign."""
    passes = 3 * 2  # of the first problem: passes times threads
    text, lost = compare.report(steady, scaled(steady, "ema_ext", 1.5))
    assert lost
    assert text.count("(+50%") == passes
    text, lost = compare.report(steady, scaled(steady, "ema_ext", 1 / 1.5))
    assert not lost
    assert text.count("(-33%") == passes


def test_compare_leaves_noise_alone(steady: dict[str, Any]) -> None:
    """Catches a slower machine, or a step inside the runs' own spread, reported as a change."""
    for after in (steady, scaled(steady, None, 3.0), scaled(steady, "ema_ext", 1.03)):
        text, lost = compare.report(steady, after)
        assert not lost
        assert text.startswith("0 of")
    noisy = copy.deepcopy(steady)
    for time in noisy["times"]:
        time["seconds"] = [min(time["seconds"]) * factor for factor in (1, 1.2, 1.4, 1.6, 1.8)]
    assert compare.report(noisy, scaled(noisy, "ema_ext", 1.5))[1] is False


def test_compare_tells_a_lost_bar(steady: dict[str, Any]) -> None:
    """Catches a verdict that turns without a word."""
    bar = {"problem": "1x10", "claim": "a / b", "bar": "<= 2", "measured": 1.0, "met": True}
    before, after = steady | {"bars": [bar]}, steady | {"bars": [bar | {"met": False}]}
    assert compare.report(before, after)[1]
    assert not compare.report(after, before)[1]


def test_compare_command(steady: dict[str, Any], tmp_path: Path) -> None:
    """Catches an exit status that hides the loss from a script."""
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, data in zip(paths, (steady, scaled(steady, "ema_ext", 2.0)), strict=True):
        path.write_text(json.dumps(data))
    script = str(BENCHMARKS / "compare.py")
    for first, second, status in ((0, 0, 0), (0, 1, 1), (1, 0, 0)):
        command = [sys.executable, script, str(paths[first]), str(paths[second])]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (run.returncode, run.stderr) == (status, "")


class FakeGpu:
    """A clock for the host and one stream of work beside it, in place of torch.cuda."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0  # of the host, in seconds
        self.done = 0.0  # when the stream will have done all that it was given
        self.allocated = self.peak = 100
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(gpu.now, gpu.done)

            def elapsed_time(self, end: Any) -> float:
                assert end.at <= gpu.now, "nobody waited for the event"
                return 1e3 * float(end.at - self.at)

        for name, value in {
            "Event": Event,
            "synchronize": self.synchronize,
            "reset_peak_memory_stats": lambda: setattr(self, "peak", self.allocated),
            "memory_allocated": lambda: self.allocated,
            "max_memory_allocated": lambda: self.peak,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def synchronize(self) -> None:
        self.now = max(self.now, self.done)

    def launch(self, host: float, device: float, scratch: int = 0) -> None:
        """A call that takes the host so long, and then the device, with memory in between."""
        self.now += host
        self.done = max(self.now, self.done) + device
        self.peak = max(self.peak, self.allocated + scratch)


def test_cuda_time_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the time of the launches alone, a timer read too early, and the queue before."""
    gpu = FakeGpu(monkeypatch)
    contenders = {
        "long": Contender(lambda: gpu.launch(host=1e-6, device=1e-3)),
        "short": Contender(lambda: gpu.launch(host=1e-5, device=1e-7)),
    }
    gpu.launch(host=0, device=5)
    samples = take_turns(contenders, Effort(rounds=4, sample=1e-2, budget=1), "cuda")
    assert samples["long"] == pytest.approx([1e-3] * 4, abs=1e-6)  # and the first launch
    # as fast as it can be launched, and what the device does last
    assert samples["short"] == pytest.approx([1e-5] * 4, abs=1e-7)
    assert torch.get_num_threads() >= 1


def test_cuda_memory_is_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a peak of an earlier call, and what was there before counted as well."""
    gpu = FakeGpu(monkeypatch)
    gpu.launch(0, 0, scratch=1000)
    assert peak_bytes(lambda: gpu.launch(0, 0, scratch=30), "cuda") == 30


def test_cuda_plan() -> None:
    """Catches problems or passes of the GPU's tables that are not measured, and bars of the CPU."""
    some = [bench.OURS, bench.CLONE, bench.CUMSUM]
    entries = bench.plan([1], some, quick=True, device="cuda")
    for problem in bench.LARGE:
        passes = {entry.which for entry in entries[problem] if entry.method == "ema_ext"}
        assert passes == {FORWARD, BOTH, LEARN, BACK, BACK_LEARN}
    assert bars.IN_CACHE not in entries
    assert all(entry.threads == 1 for some in entries.values() for entry in some)


class Module(ModuleType):
    """A package that is not installed here, with these functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
        super().__init__(name)
        self.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, self)


def test_cuda_peers_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gates and tokens exchanged or the coefficients of a filter: by stand-ins that take
    the packages' arguments and compute on the CPU."""

    def gated(gates: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        assert gates.shape == tokens.shape
        assert gates.is_contiguous()
        assert tokens.is_contiguous()
        return linear_recurrence(gates, tokens)

    def filtered(b: Any, a: Any, x: Any) -> Any:
        y, state = np.empty_like(x), np.zeros(len(x))
        for n in range(x.shape[1]):
            y[:, n] = state = b[0] * x[:, n] - a[1] * state
        return y

    def audio(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, clamp: bool) -> torch.Tensor:
        assert not clamp
        return torch.from_numpy(filtered(b.numpy(), a.numpy(), x.detach().numpy()))

    for name in ("accelerated_scan", "cupyx", "cupyx.scipy", "torchaudio"):
        Module(monkeypatch, name)
    Module(monkeypatch, "accelerated_scan.warp", scan=gated)
    Module(monkeypatch, "fpscan", pscan=gated)
    Module(monkeypatch, "torchlpc", linear_recurrence=gated)
    Module(monkeypatch, "torchaudio.functional", lfilter=audio)
    Module(monkeypatch, "cupy", asarray=np.asarray)
    Module(monkeypatch, "cupyx.scipy.signal", lfilter=filtered)

    problem = Problem((3, 1024))
    x = problem.input("cpu")
    allowed = furthest(x, bounds.LOOP) + furthest(x, bounds.KERNEL)
    peers = [peer for peer in PEERS.values() if peer.device == "cuda"]
    assert len(peers) == 5
    for peer in peers:
        assert peer.takes(problem, "cuda")
        assert not peer.takes(problem, "cpu")
        y: Any = peer.calls(problem, x)[FORWARD]()
        assert difference(y.detach(), ema(x, ALPHA)) <= allowed


def test_failing_peer_is_left_out() -> None:
    """Catches one peer that was built for another machine and takes the whole run along."""

    def fail() -> None:
        raise RuntimeError("no kernel image\nis available")

    peer = bench.Method("peer", lambda *_: {FORWARD: fail})
    run = bench.Run("cpu", [1], absent=[])
    found = bench.calls(run, TINY[0], [Entry("peer"), Entry("ema_ext")], [peer, bench.OURS], ALL)
    assert list(found) == [Entry("ema_ext")]
    assert "raised RuntimeError: no kernel image" in bench.left_out(run)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says is not so here")
def test_no_gpu_is_one_sentence() -> None:
    """Catches a traceback, or a benchmark of the CPU, where a GPU was asked for."""
    command = [sys.executable, str(BENCHMARKS / "bench.py"), "--device", "cuda"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert run.stderr == "--device cuda: torch sees no CUDA device on this machine\n"


def test_roofline_meets_what_it_is_calibrated_on() -> None:
    """Catches units, and a constant that was changed without a look at the published points."""
    h100 = next(gpu for gpu in roofline.GPUS if gpu.arch == "9.0")
    forward = roofline.PASSES[0]
    cub = roofline.Kernel(per_byte=36 / 8, tile=1 << 40)  # no anchors
    row = roofline.Shape(1, 1 << 20)
    ours = roofline.seconds(h100, forward, cub, row, 4)
    assert ours - roofline.LAUNCH == pytest.approx(14e-6, rel=0.05)  # CUB launches one less
    row = roofline.Shape(1, 1 << 32)
    for sample, measured in ((4, 0.78), (2, 0.43)):
        cub = roofline.Kernel(per_byte=36 / 2 / sample, tile=1 << 40)
        time = roofline.seconds(h100, forward, cub, row, sample)
        reached = 2 * sample * row.length / time / h100.bandwidth
        assert reached == pytest.approx(measured, rel=0.1)


def test_roofline_knows_every_limit() -> None:
    """Catches a limit that no kernel is ever held to, and a share of more than a copy."""
    t4, h100 = roofline.GPUS[0], roofline.GPUS[2]
    forward, long = roofline.PASSES[0], roofline.Shape(1, 1 << 28)

    def share(gpu: Any, **counts: Any) -> float:
        return roofline.share(gpu, forward, roofline.Kernel(**counts), long, 4)

    assert 0.98 < share(h100, per_byte=2.5) < 1
    assert share(h100, per_byte=25) == pytest.approx(0.16, abs=0.01)  # 8.9 * 0.4 of 25, to 0.9
    assert share(h100, per_byte=2.5, tile=1024) == pytest.approx(0.17, abs=0.01)  # anchors
    assert share(h100, per_byte=2.5, doubles=1) > 0.98
    assert share(t4, per_byte=2.5, doubles=1) == pytest.approx(0.44, abs=0.01)


def test_roofline_command(tmp_path: Path) -> None:
    """Catches counts of another kernel or architecture, and a table that misses the docs."""
    names = (
        "SplitRows<Tiling<Native<float>, 256, true, {}>>",
        "RowTiles<Tiling<Native<float>, 32, true, {}>>",
    )
    rows = [
        {"kernel": name.format(gradient), "arch": gpu.arch, "read": 64, "written": 64}
        | {"threads": 256, "doubles": 0, "per_byte": 2.5 if gpu.arch == "9.0" else 1000.0}
        for name in names
        for gradient in ("true", "false")
        for gpu in roofline.GPUS
    ]
    gate, document = tmp_path / "sass.json", tmp_path / "cuda.md"
    gate.write_text(json.dumps(rows))
    document.write_text("<!-- roofline: begin -->\n<!-- roofline: end -->\n")
    roofline.main(["--gate", str(gate), "--write", str(document)])
    lines = [line for line in document.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(roofline.GPUS) * len(roofline.PASSES)
    fast = [line for line in lines if line.endswith(("99% |", "100% |"))]
    assert [line.split(" | ")[0] for line in fast] == ["| H100 SXM"] * 2


@pytest.mark.parametrize("alpha", [1e-5, 0.1, 1.0])
def test_exact_loops(alpha: float) -> None:
    """Catches a wrong loop behind the accuracy tables: held to the tests' own oracle."""
    x, g = signal(500), signal(500, seed=1)
    y, size = loops.ema_exact(x.numpy(), alpha)
    gradient, terms = loops.grad_alpha_exact(g.numpy(), x.numpy(), y, alpha)
    # The oracle's own error, three roundings a step, is the larger one.
    error = 3 * (len(x) + 1) * oracle.UNIT
    assert np.all(np.abs(y - oracle.ema(x, alpha)) <= error * size)
    expected = oracle.ema_backward(g, x, alpha).alpha
    reach = bounds.gradient_bounds(g, x, alpha, roundings=bounds.LOOP).alpha
    assert abs(gradient - expected) <= reach
    assert terms >= abs(gradient)
    narrow = x.float()
    bound = bounds.pointwise_bound(narrow, alpha, roundings=bounds.LOOP)
    assert np.all(
        np.abs(loops.ema_float32(narrow.numpy(), alpha) - oracle.ema(narrow, alpha)) <= bound
    )


def test_accuracy_tables() -> None:
    """Catches a measure in other units than the tests' bounds, and a table with a gap."""
    assert bounds.KERNEL.base / 2 == accuracy.K
    some = [method for method in accuracy.METHODS if method.package == "torch"]
    alphas = (1e-3, 1.0)
    tables = accuracy.measure(some, alphas, [5.0], [10, 3000])
    by_row, by_sample = tables[accuracy.BY_ROW], tables[accuracy.BY_SAMPLE]
    for name in ("ema_ext, float32", "ema_ext, bfloat16"):
        assert max(by_row[name].values()) <= bounds.ULPS
        assert max(by_sample[name].values()) <= 1
    assert by_row["sequential loop, float32"][1e-3] > bounds.ULPS
    assert set(tables[accuracy.GRADIENT]) >= {"ema_ext, float32", "sequential loop, float32"}
    assert "- |" not in accuracy.markdown(tables, alphas).replace("|--:", "").replace("|---", "")
