"""Every kernel of the library, and what tools/sass.py holds it to.

`{a,b}` stands for either, so that one line names all instantiations of a template. What is not
named here fails the gate, and so does a name that the library lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Expected:
    names: str
    aligned: bool = False  # samples move by 128 bits: held to the bar on instructions per byte
    moves: tuple[int, int] = (1, 1)  # bytes of samples read to bytes written, if aligned
    barriers: int = 1  # per trip, at most
    narrow: int = 0  # accesses below 128 bits in an aligned trip: not samples
    why: str = ""  # for more than one barrier, for narrow accesses

    def __iter__(self) -> Iterator[str]:
        parts = re.split(r"\{(.*?)\}", self.names)  # odd ones were in braces
        choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
        return ("".join(choice) for choice in product(*choices))


KERNELS = [
    Expected("write_answer"),  # probe.cu
]
