"""Every kernel of the library, and what tools/sass.py holds it to.

`{a,b}` stands for either, so that one line names all instantiations of a template. What is not
named here fails the gate, and so does a name that the library lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

#: The bar. A kernel above it is named with its own ceiling, so that it grows no further unseen.
MOST_PER_BYTE = 2.5


@dataclass(frozen=True)
class Expected:
    names: str
    aligned: bool = False  # samples move by 128 bits: held to the bar on instructions per byte
    moves: tuple[int, int] = (1, 1)  # bytes of samples read to bytes written, if aligned
    barriers: int = 1  # per trip, at most
    narrow: int = 0  # accesses below 128 bits in an aligned trip: not samples
    inner: int = 0  # loops inside the main loop that neither wait nor walk, and that few enter
    per_byte: float = MOST_PER_BYTE  # instructions, at most
    why: str = ""  # for whatever is not as by default

    def __iter__(self) -> Iterator[str]:
        parts = re.split(r"\{(.*?)\}", self.names)  # odd ones were in braces
        choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
        return ("".join(choice) for choice in product(*choices))


STORAGES = ("Native<float>", "Native<double>", "Float16", "BFloat16")
STORAGE = f"{{{','.join(STORAGES)}}}"


def varying(storage: str) -> Iterator[str]:
    """Without the bar: products of coefficients are composed in float64, sample by sample."""
    for rows in ("AlignedRows", "AnyRows"):
        yield f"Varying<{storage}, {rows}<{storage}, {{8,32,256}}>, {{false,true}}, false>"
        yield f"Varying<{storage}, {rows}<{storage}, 256>, {{false,true}}, true>"
    yield f"Varying<{storage}, Columns<{storage}>, {{false,true}}, {{false,true}}>"


KERNELS = [
    Expected("write_answer"),  # probe.cu
    Expected(f"RowTiles<Tiling<{STORAGE}, {{8,32,256}}, true, false>>", aligned=True),
    Expected(f"RowTiles<Tiling<{STORAGE}, {{8,32,256}}, true, true>>", aligned=True, moves=(2, 1)),
    Expected(f"RowTiles<Tiling<{STORAGE}, {{8,32,256}}, false, {{false,true}}>>"),
    Expected(f"SplitHeads<Tiling<{STORAGE}, 256, {{false,true}}, {{false,true}}>>"),
    Expected(f"SplitRows<Tiling<{STORAGE}, 256, true, false>>", aligned=True),
    Expected(f"SplitRows<Tiling<{STORAGE}, 256, true, true>>", aligned=True, moves=(2, 1)),
    Expected(f"SplitRows<Tiling<{STORAGE}, 256, false, {{false,true}}>>"),
    *(Expected(names) for storage in STORAGES for names in varying(storage)),
    Expected(f"SplitSums<Tiling<{STORAGE}, 256, {{false,true}}, true>>"),
    Expected(f"Lanes<{STORAGE}, true, false>", aligned=True),
    Expected(f"Lanes<{STORAGE}, true, true>", aligned=True, moves=(2, 1)),
    Expected(f"Lanes<{STORAGE}, false, {{false,true}}>"),
    Expected(f"LaneSums<{STORAGE}, {{false,true}}>"),
    Expected(f"{{SumAlongTerms,SumAlongResults}}<{STORAGE}>"),
]
