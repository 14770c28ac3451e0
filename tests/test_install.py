"""The installed package: where it works, what it refuses, and what sdist and wheel hold."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

from ema_ext import _library
from ema_ext._version import __version__

ROOT = Path(__file__).resolve().parent.parent


def python(
    *arguments: str, cwd: Path, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def installed() -> metadata.Distribution:
    """The installation's own record, which an egg-info folder in the checkout hides."""
    found = [d for d in metadata.distributions(name="ema_ext") if d.read_text("RECORD")]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("inside", [True, False], ids=["inside the checkout", "outside"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import ema_ext, torch; print(ema_ext.ema(torch.ones(3), 0.5).tolist())"],
        ["-m", "ema_ext.info"],
        ["-m", "pytest", "-q", str(ROOT / "tests/test_info.py"), "-k", "names_the_versions"],
    ],
    ids=["import", "info", "pytest"],
)
def test_works(arguments: list[str], inside: bool, tmp_path: Path) -> None:
    """Catches a compiled library that only the installed package finds: inside the checkout Python
    takes the package from the source folder."""
    result = python(*arguments, cwd=ROOT if inside else tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_old_torch_is_refused(tmp_path: Path) -> None:
    """Catches a torch without the stable ABI met by a linker's error about a symbol."""
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "__init__.py").write_text('__version__ = "2.12.1+cpu"')
    result = python("-c", "import ema_ext", cwd=tmp_path, path=tmp_path)
    expected = f"ImportError: ema_ext {__version__} needs torch 2.13 or newer, found torch 2.12.1"
    assert expected in result.stderr


@pytest.mark.parametrize("version", ["1.14", "2.9.1", "2.12.1+cu130", "2.12.0a0+git1234567"])
def test_versions_compare_as_numbers(version: str) -> None:
    """Catches 2.9 taken for newer than 2.13."""
    with pytest.raises(ImportError, match=re.escape(version)):
        _library.check_torch(version)


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0a0+git1234567", "2.14.1+cu130", "3.0"])
def test_newer_torch_is_accepted(version: str) -> None:
    """Catches a limit upwards: one build loads in every later torch."""
    _library.check_torch(version)


def test_missing_library_is_explained(tmp_path: Path) -> None:
    """Catches a bare ModuleNotFoundError for a module that the user has never heard of."""
    result = python(
        "-c", "import sys; sys.modules['_ema_ext'] = None; import ema_ext", cwd=tmp_path
    )
    assert "ImportError: the compiled library of ema_ext is missing: run `pip" in result.stderr


def test_stale_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pulled checkout that runs over the library of an earlier install."""
    monkeypatch.setattr(_library, "__version__", "999.0")
    with pytest.raises(ImportError, match=rf"999\.0 beside the compiled library of {__version__}"):
        _library.load()


def test_sdist_holds_the_sources_and_nothing_else(tmp_path: Path) -> None:
    """Catches a source left out of MANIFEST.in, and built or cached files packed into the sdist.

    The tree is copied without its egg-info folder, whose list of files setuptools would reuse.
    """
    left_behind = shutil.ignore_patterns(".git", ".*cache", ".venv", "build", "*.egg-info")
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=left_behind)
    (tree / "tests" / "__pycache__").mkdir(exist_ok=True)
    (tree / "tests" / "__pycache__" / "stray.pyc").touch()
    (tree / "csrc" / "stray.so").touch()
    build = "import ema_ext_build, sys; ema_ext_build.build_sdist(sys.argv[1])"
    result = python("-c", build, str(tmp_path), cwd=tree, path=tree / "build_backend")
    assert result.returncode == 0, result.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}

    written_by_setuptools = {"PKG-INFO", "setup.cfg"}
    packed = {n for n in names - written_by_setuptools if not n.startswith("ema_ext.egg-info/")}
    folders = [
        "benchmarks",
        "build_backend",
        "csrc",
        "docs",
        "ema_ext",
        "examples",
        "tests",
        "tools",
    ]
    sources = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    top = "CHANGELOG.md CONTRIBUTING.md LICENSE MANIFEST.in README.md _ema_ext.pyi pyproject.toml"
    assert packed == {*sources, *top.split(), "setup.py", ".clang-format"}


def test_installation_holds_the_package_and_the_library() -> None:
    """Catches tests, sources or a stray top-level module put into site-packages by the wheel."""
    record = installed()
    names = {
        re.sub(r"^_ema_ext\..*\.so$", "_ema_ext.so", str(file))
        for file in record.files or []
        if ".dist-info" not in str(file) and "__pycache__" not in str(file)
    }
    if json.loads(record.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"):
        assert all(name.startswith("__editable__") for name in names)
    else:
        package = {f"ema_ext/{path.name}" for path in (ROOT / "ema_ext").glob("*.py")}
        assert names == {*package, "ema_ext/py.typed", "_ema_ext.so"}
