"""Tables that commands keep up to date, between marks in a document."""

from __future__ import annotations

import sys


def with_block(document: str, name: str, text: str) -> str:
    """The document with this text between <!-- name: begin --> and <!-- name: end -->."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, opened, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        sys.exit(f"the document has no {begin} ... {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"
