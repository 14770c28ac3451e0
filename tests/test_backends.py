"""That a run of the tests goes through the kernels it says it does."""

from __future__ import annotations

import backends
import pytest
import torch
from cases import signal

import _ema_ext


def test_unknown_backend() -> None:
    """Catches a misspelt backend that leaves the tests with the CPU's kernels."""
    with pytest.raises(ValueError, match="must be cpu, cuda or executor, and is 'gpu'"):
        backends.choose("gpu")


@pytest.mark.parametrize("name", ["cpu", "executor"])
def test_the_summary_names_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches figures of one backend under the name of another."""
    monkeypatch.setattr(backends, "chosen", name)
    monkeypatch.setenv("EMA_EXT_EXECUTOR", "checks=False")
    said = backends.described()
    assert said.startswith(f"{name} backend")
    assert ("checks=False" in said) == (name == "executor")
    assert (_ema_ext.cpu_level() in said) == (name == "cpu")


def test_numbers_of_the_cpu_go_to_the_device() -> None:
    """Catches tests that cannot draw their numbers where the default device is another one."""
    with torch.device("meta"), backends.SeedsOfTheCpu():
        assert signal(3, 4).device.type == "meta"
        assert torch.rand(3, generator=torch.Generator()).device.type == "meta"
    with torch.device("cpu"), backends.SeedsOfTheCpu():
        assert torch.equal(signal(3), signal(3))
