"""What the README and the recipes show is true: it runs, CI types it, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RECIPES = ROOT / "docs" / "recipes.md"
CI = ROOT / ".ci" / "run"

FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")
SCRIPT = re.compile(r"\S+\.py\b")

#: The word after `sh` that keeps a fence out of CI.
EXEMPT = {"long", "gpu"}


def fences(language: str, document: Path = README) -> dict[str, tuple[str, str]]:
    """Line number by name -> the words after the language, and the source as if it were alone in
    the document: tracebacks then have the document's lines."""
    text = document.read_text(encoding="utf-8")
    found = {}
    for match in FENCE.finditer(text):
        if match[1] == language:
            line = text.count("\n", 0, match.start(3))
            found[f"line {line + 1}"] = match[2].strip(), "\n" * line + match[3]
    return found


@pytest.mark.parametrize("language", ["python", "sh"])
def test_there_are_fences(language: str) -> None:
    """Catches a change of the README's markup that leaves the tests below without a case."""
    assert fences(language)


SNIPPETS = [
    (document, name) for document in (README, RECIPES) for name in fences("python", document)
]


@pytest.mark.parametrize(
    ("document", "name"), SNIPPETS, ids=[f"{path.name} {name}" for path, name in SNIPPETS]
)
def test_python_runs(
    document: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an example that a reader cannot paste and run, or that is not what the peer gives."""
    monkeypatch.chdir(tmp_path)
    mark, source = fences("python", document)[name]
    if mark == "torchrun":
        Path("example.py").write_text(source, encoding="utf-8")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node", "2", "example.py"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, run.stderr
        return
    assert not mark
    exec(compile(source, document, "exec"), {"__name__": "__main__"})


def test_recipes_are_held_to_a_peer() -> None:
    """Catches a recipe that states its own numbers, or a peer's without saying of which version."""
    sections = RECIPES.read_text(encoding="utf-8").split("\n## ")[1:]
    named = {section.split("\n")[0] for section in sections}
    assert {"pandas, times", "polars, ewm_mean_by", "minGRU", "RSI as TA-Lib"} <= named
    for section in sections:
        if not section.startswith("Streaming"):
            peer = re.search(r"peer = torch\.tensor\([^#]*\)  # \S+ \d+\.\d+", section)
            assert peer, section.split("\n")[0]
            assert "torch.testing.assert_close(y" in section


@pytest.mark.skipif(not CI.exists(), reason="the sdist leaves .ci out")
@pytest.mark.parametrize("name", fences("sh"))
def test_commands_are_those_of_ci(name: str) -> None:
    """Catches a command that CI does not type, and that may have ceased to work."""
    mark, source = fences("sh")[name]
    if mark:
        assert mark in EXEMPT
        return
    script = CI.read_text(encoding="utf-8")
    for command in source.strip().splitlines():
        assert command in script


def test_what_it_points_to_is_there() -> None:
    """Catches a link, a picture or a script of a command that was moved or never made."""
    links = LINK.findall(README.read_text(encoding="utf-8"))
    scripts = [path for _, source in fences("sh").values() for path in SCRIPT.findall(source)]
    local = [path for path in links if "://" not in path]
    assert local
    assert scripts
    assert [path for path in local + scripts if not (ROOT / path).exists()] == []
