"""Every Python fence of the README runs as it stands, alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def fences() -> dict[str, str]:
    """Name with line number -> source, with as many empty lines before it as the README has."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    found = {}
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(1))
        found[f"line {line + 1}"] = "\n" * line + match[1]
    return found


def test_there_are_fences() -> None:
    """Catches a change of the README's markup that leaves the next test without a case."""
    assert fences()


@pytest.mark.parametrize("name", fences())
def test_fence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an example that a reader cannot paste and run; a traceback has the README's lines."""
    monkeypatch.chdir(tmp_path)
    exec(compile(fences()[name], README, "exec"), {"__name__": "__main__"})
