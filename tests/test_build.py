"""What the build decides from the machine, with compilers and toolkits that are shell scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "build_backend"))
import ema_ext_build
import machine

NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-code) printf '%s\\n' {codes} ;;
  --dryrun) printf '#$ TOP=%s/bin/..\\n#$ INCLUDES="-I%s/include"\\n' {home} {home} >&2
            printf '#$ LIBRARIES= "-L%s/lib/stubs" "-L%s/lib"\\n' {home} {home} >&2 ;;
esac
"""

Toolkit = Callable[..., Path]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EMA_EXT_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toolkit:
    """Puts an nvcc on the PATH that stands apart from its toolkit, as a wrapper script does."""

    def install(release: str = "13.0", codes: str = "sm_75 sm_80 sm_90 sm_120") -> Path:
        home, wrappers = tmp_path / "cuda", tmp_path / "wrappers"
        (home / "bin").mkdir(parents=True)
        wrappers.mkdir()
        nvcc = wrappers / "nvcc"
        nvcc.write_text(NVCC.format(release=release, codes=codes, home=home))
        nvcc.chmod(0o755)
        monkeypatch.setenv("PATH", f"{wrappers}:/usr/bin:/bin")
        return home

    return install


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def test_cuda_is_built_for_a_cuda_torch(toolkit: Toolkit) -> None:
    """Catches a CUDA_HOME guessed from where the wrapper lies, and paths that are not nvcc's."""
    home = toolkit()
    cuda = machine.find_cuda("13.0")
    assert (cuda.nvcc, cuda.home) == ("13.0", str(home))
    assert cuda.include_dirs == [f"{home}/include"]
    assert cuda.library_dirs == [f"{home}/lib", f"{home}/lib/stubs"]
    assert "CUDA 13.0" in cuda.reason


def test_no_cuda_for_a_cpu_torch(toolkit: Toolkit) -> None:
    """Catches kernels nobody asked for, beside a torch that cannot hold a CUDA tensor."""
    toolkit()
    assert machine.find_cuda(None) == machine.Cuda("torch was a build without CUDA")


@pytest.mark.usefixtures("no_toolkit")
def test_no_cuda_without_nvcc() -> None:
    """Catches a build that fails where it should do without CUDA."""
    assert machine.find_cuda("13.0") == machine.Cuda("no nvcc was found")


def test_environment_switches_cuda_off(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches EMA_EXT_CUDA=0 read as a true value."""
    toolkit()
    monkeypatch.setenv("EMA_EXT_CUDA", "0")
    assert machine.find_cuda("13.0") == machine.Cuda("EMA_EXT_CUDA=0 was set")


def test_environment_switches_cuda_on(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches EMA_EXT_CUDA=1 overruled by the torch at hand."""
    toolkit()
    monkeypatch.setenv("EMA_EXT_CUDA", "1")
    assert machine.find_cuda(None).nvcc == "13.0"


@pytest.mark.usefixtures("no_toolkit")
def test_forced_cuda_needs_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a forced build that silently leaves out what it was asked for."""
    monkeypatch.setenv("EMA_EXT_CUDA", "1")
    with pytest.raises(SystemExit, match="EMA_EXT_CUDA=1 needs nvcc"):
        machine.find_cuda("13.0")


def test_other_switches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches EMA_EXT_CUDA=off taken for unset."""
    monkeypatch.setenv("EMA_EXT_CUDA", "off")
    with pytest.raises(SystemExit, match="must be 0 or 1, and is 'off'"):
        machine.find_cuda("13.0")


@pytest.mark.parametrize(
    ("codes", "archs"),
    [
        ("sm_50 sm_70 sm_75 sm_80 sm_86 sm_89 sm_90", "7.5 8.0 8.6 8.9 9.0+PTX"),
        (
            "sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_103 sm_120 sm_121",
            "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX",
        ),
    ],
    ids=["before Blackwell", "with Blackwell"],
)
def test_architectures_are_those_nvcc_knows(toolkit: Toolkit, codes: str, archs: str) -> None:
    """Catches an architecture that this nvcc refuses: older ones lack Blackwell."""
    toolkit(codes=codes)
    assert machine.find_cuda("13.0").archs == archs


def test_environment_names_architectures(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a default that overrules the user's list."""
    toolkit()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert machine.find_cuda("13.0").archs == "8.0;9.0+PTX"


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        ("7.5", ["-gencode=arch=compute_75,code=[sm_75]"]),
        ("8.6;8.9+PTX", ["-gencode=arch=compute_80,code=[sm_86,sm_89,compute_80]"]),
        (
            "8.0 10.0 12.0+PTX",
            [
                "-gencode=arch=compute_80,code=[sm_80]",
                "-gencode=arch=compute_90,code=[sm_100,sm_120,compute_90]",
            ],
        ),
        ("7.0 9.0a", [f"-gencode=arch=compute_{a},code=[sm_{a}]" for a in ("70", "90a")]),
    ],
)
def test_architectures_share_their_ptx(archs: str, flags: list[str]) -> None:
    """Catches code for a GPU that nobody asked for, a lost one, and PTX newer than the GPU."""
    assert machine.gencode_flags(archs) == flags


@pytest.mark.parametrize(("release", "loud"), [("12.6", False), ("13.2", False), ("14.0", True)])
def test_newer_toolkit_is_loud(
    toolkit: Toolkit, capfd: pytest.CaptureFixture[str], release: str, loud: bool
) -> None:
    """Catches a static runtime newer than the user's driver going in without a word."""
    toolkit(release=release)
    machine.find_cuda("13.0")
    assert (f"nvcc {release} is newer than torch's CUDA 13.0" in capfd.readouterr().err) == loud


@pytest.mark.parametrize(
    ("system", "arch"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "aarch64")]
)
def test_other_machines_are_refused(
    monkeypatch: pytest.MonkeyPatch, system: str, arch: str
) -> None:
    """Catches a compiler's error about an intrinsic where one sentence will do."""
    monkeypatch.setattr(machine, "system", lambda: system)
    monkeypatch.setattr(machine, "machine", lambda: arch)
    with pytest.raises(SystemExit, match=f"Linux x86-64 only; this is {system} {arch}"):
        machine.check_machine()


@pytest.mark.parametrize(
    "script", ["exit 1", "echo 11.4.0", "echo clang"], ids=["fails", "too old", "no version"]
)
def test_other_compilers_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str
) -> None:
    """Catches a compiler that does not know GCC's target pragmas, and none at all."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(SystemExit, match=r"needs g\+\+ 12 or newer"):
        machine.check_machine()
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    with pytest.raises(SystemExit, match=r"needs g\+\+ 12 or newer"):
        machine.check_machine()


def test_backend_uses_the_torch_that_is_there() -> None:
    """Catches a second torch fetched for the build where one is installed."""
    assert ema_ext_build.get_requires_for_build_wheel() == []


@pytest.mark.parametrize("version", [None, "2.12.1", "2.9.0+cu128"])
def test_backend_asks_for_a_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str | None
) -> None:
    """Catches a build against no torch, or against one that the runtime requirement replaces."""
    if version is not None:
        record = tmp_path / f"torch-{version}.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    monkeypatch.setattr(ema_ext_build, "_visible_site_packages", lambda: [str(tmp_path)])
    assert ema_ext_build.get_requires_for_build_wheel() == ["torch>=2.13"]
