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
    narrow: int = 0  # accesses below 128 bits in an aligned trip: not samples, or pieces
    pieces: bool = False  # whether nvcc may store 128 bits by pieces, which count as samples
    inner: int = 0  # loops inside the main loop that neither wait nor walk, and that few enter
    per_byte: float = MOST_PER_BYTE  # instructions, at most
    why: str = ""  # for whatever is not as by default

    def __iter__(self) -> Iterator[str]:
        parts = re.split(r"\{(.*?)\}", self.names)  # odd ones were in braces
        choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
        return ("".join(choice) for choice in product(*choices))


STORAGES = ("Native<float>", "Native<double>", "Float16", "BFloat16")
STORAGE = f"{{{','.join(STORAGES)}}}"


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
VARYING = "maps of two float64 are composed, scanned over the team and followed, sample by sample"
NEXT = "besides, y of the stretch of lanes behind, and a coefficient that is constant"
SPLIT_VARYING = "a tile a trip, with all that it knows of its row, its ticket and its look-back"
LANES = (
    "each row is joined over warps by itself, and look-back and alpha's sums take a barrier each"
)
HALVES = f"{LANES}; {SAMPLES}; nvcc stores bfloat16 for 7.5 by words"
WIDE_LANES = f"{LANES}; half as many samples of float64 share that; nvcc stores them one by one"


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


def varying(
    kind: str,
    items: int,
    forward: dict[int, float],
    backward: dict[int, float],
    split: tuple[float, float],
) -> Iterator[Expected]:
    """Varying of one dtype: ceilings of the aligned by threads per row, and of a split row's."""
    for adjoint, ceilings in ((False, forward), (True, backward)):
        row = f"Varying<{kind}, AlignedRows<{kind}, "
        for team in (8, 32, 256):
            ceiling = ceilings[team]
            yield Expected(
                f"{row}{team}, {items}>, {str(adjoint).lower()}, false>",
                aligned=True,
                moves=(2, 1),
                narrow=3 * adjoint,
                per_byte=ceiling,
                why="; ".join([VARYING] * (ceiling > MOST_PER_BYTE) + [NEXT] * adjoint),
            )
        yield Expected(
            f"{row}256, {items}>, {str(adjoint).lower()}, true>",
            aligned=True,
            moves=(2, 1),
            narrow=2 + 6 * adjoint,
            barriers=4 + adjoint,
            inner=1,
            per_byte=split[adjoint],
            why=SPLIT_VARYING,
        )
    yield Expected(f"Varying<{kind}, AnyRows<{kind}, {{8,32,256}}, 8>, {{false,true}}, false>")
    yield Expected(f"Varying<{kind}, AnyRows<{kind}, 256, 8>, {{false,true}}, true>")
    yield Expected(f"Varying<{kind}, Columns<{kind}, 8>, {{false,true}}, {{false,true}}>")


def lanes(kind: str, forward: float, backward: float, pieces: int = 0) -> Iterator[Expected]:
    """Lanes of one dtype, 16 bytes a thread."""
    for gradient, ceiling in ((False, forward), (True, backward)):
        yield Expected(
            f"Lanes<{kind}, true, {str(gradient).lower()}>",
            aligned=True,
            moves=(2, 1) if gradient else (1, 1),
            per_byte=ceiling,
            barriers=3 if gradient else 2,
            narrow=pieces,
            pieces=pieces > 0,
            inner=45,
            why=LANES
            if ceiling <= MOST_PER_BYTE
            else WIDE_LANES
            if kind == STORAGES[1]
            else HALVES,
        )


TO_BAR = dict.fromkeys((8, 32, 256), MOST_PER_BYTE)

KERNELS = [
    Expected("write_answer"),  # probe.cu
    *rows("Native<float>", False, {}),
    *rows("Native<double>", False, {}),
    *rows("Float16", False, {256: 2.7}, SAMPLES),
    *rows("BFloat16", False, {8: 3.2, 32: 3.2, 256: 3.5}, SAMPLES),
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
    *varying("Native<float>", 16, {8: 2.9, 32: 3.0, 256: 3.1}, TO_BAR, (5.2, 3.9)),
    *varying("Native<double>", 8, {8: 2.5, 32: 2.6, 256: 2.7}, TO_BAR, (4.7, 3.5)),
    *varying("Float16", 16, {8: 5.3, 32: 5.5, 256: 5.8}, {8: 4.7, 32: 4.7, 256: 4.7}, (9.9, 6.7)),
    *varying("BFloat16", 16, {8: 5.7, 32: 5.9, 256: 6.3}, {8: 5.0, 32: 5.0, 256: 5.2}, (10.0, 7.0)),
    Expected(f"SplitSums<Tiling<{STORAGE}, 256, {{false,true}}, true>>"),
    *lanes("Native<float>", 2.5, 2.5),
    *lanes("Native<double>", 2.5, 2.8, pieces=12),
    *lanes("Float16", 3.7, 3.9),
    *lanes("BFloat16", 4.6, 4.5, pieces=24),
    Expected(f"Lanes<{STORAGE}, false, {{false,true}}>"),
    Expected(f"LaneSums<{STORAGE}, {{false,true}}>"),
    Expected(f"{{SumAlongTerms,SumAlongResults}}<{STORAGE}>"),
]
