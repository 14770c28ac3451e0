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


#: Of rows below the bar: the reason for TILE_LOOPS.
RARE = "what is not finite is scanned once more, and what a last tile lacks is cleared, by loops"
#: Of rows, over the bar because ...
SAMPLES = (
    "a sample of 2 bytes takes as many instructions as one of 4; 7.5 rounds bfloat16 by integers"
)
GRADIENT = (
    "and x runs through the average too, with registers for half as many samples to share a scan"
)
SPLIT = "each tile folds 31 messages, in every warp, so that one barrier does"
LANES = "each row of a thread is scanned over warps by itself, for few samples of it"


#: Loops in a trip of tiles that few enter: they scan once more what is not finite or whose powers
#: underflow, and clear what the last tile of a row lacks.
TILE_LOOPS = 4


def rows(
    kind: str, gradient: bool, ceilings: dict[int, float], why: str = ""
) -> Iterator[Expected]:
    """Aligned RowTiles of one dtype, by threads per row; ceilings of those above the bar."""
    for team in (8, 32, 256):
        yield Expected(
            f"RowTiles<Tiling<{kind}, {team}, true, {str(gradient).lower()}>>",
            aligned=True,
            moves=(2, 1) if gradient else (1, 1),
            inner=TILE_LOOPS,
            per_byte=ceilings.get(team, MOST_PER_BYTE),
            why=why if team in ceilings else RARE,
        )


def split(kind: str, forward: float, backward: float) -> Iterator[Expected]:
    """Aligned SplitRows of one dtype; a tile's sums for the gradient are no samples."""
    for gradient, ceiling in ((False, forward), (True, backward)):
        yield Expected(
            f"SplitRows<Tiling<{kind}, 256, true, {str(gradient).lower()}>>",
            aligned=True,
            moves=(2, 1) if gradient else (1, 1),
            narrow=4 if gradient else 0,
            inner=TILE_LOOPS,
            per_byte=ceiling,
            why=SPLIT,
        )


def lanes(
    kind: str,
    forward: float,
    backward: float,
    moves: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (2, 1)),
) -> Iterator[Expected]:
    """Lanes of one dtype, 16 bytes a thread."""
    common = {"aligned": True, "inner": 40, "narrow": 12, "why": LANES}
    for gradient, ceiling in ((False, forward), (True, backward)):
        yield Expected(
            f"Lanes<{kind}, true, {str(gradient).lower()}>",
            per_byte=ceiling,
            barriers=3 if gradient else 2,
            moves=moves[gradient],
            **common,
        )


KERNELS = [
    Expected("write_answer"),  # probe.cu
    *rows("Native<float>", False, {}),
    *rows("Native<double>", False, {}),
    *rows("Float16", False, {256: 2.7}, SAMPLES),
    *rows("BFloat16", False, {8: 3.1, 32: 3.2, 256: 3.5}, SAMPLES),
    *rows("Native<float>", True, {}),
    *rows("Native<double>", True, {}),
    *rows("Float16", True, {8: 4.1, 32: 4.1, 256: 4.8}, f"{SAMPLES}; {GRADIENT}"),
    *rows("BFloat16", True, {8: 4.7, 32: 4.7, 256: 5.3}, f"{SAMPLES}; {GRADIENT}"),
    Expected(f"RowTiles<Tiling<{STORAGE}, {{8,32,256}}, false, {{false,true}}>>"),
    Expected(f"SplitHeads<Tiling<{STORAGE}, 256, {{false,true}}, {{false,true}}>>"),
    *split("Native<float>", 3.3, 3.1),
    *split("Native<double>", 3.3, 3.4),
    *split("Float16", 4.1, 5.4),
    *split("BFloat16", 5.0, 5.9),
    Expected(f"SplitRows<Tiling<{STORAGE}, 256, false, {{false,true}}>>"),
    *(Expected(names) for storage in STORAGES for names in varying(storage)),
    Expected(f"SplitSums<Tiling<{STORAGE}, 256, {{false,true}}, true>>"),
    *lanes("Native<float>", 4.2, 5.2),
    *lanes("Native<double>", 3.8, 4.8, ((4, 1), (4, 1))),  # each store is passed by itself
    *lanes("Float16", 7.8, 11.5),
    *lanes("BFloat16", 10.9, 13.5),
    Expected(f"Lanes<{STORAGE}, false, {{false,true}}>"),
    Expected(f"LaneSums<{STORAGE}, {{false,true}}>"),
    Expected(f"{{SumAlongTerms,SumAlongResults}}<{STORAGE}>"),
]
