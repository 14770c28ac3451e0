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
    narrow: int = 0  # accesses below 128 bits in an aligned trip, which are not samples
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
RARE = "what a last tile lacks is cleared, and what one thread or few have to do is done, by loops"
#: Of rows, over the bar because ...
SAMPLES = (
    "a sample of 2 bytes takes as many instructions as one of 4; 7.5 rounds bfloat16 by integers"
)
GRADIENT = "x runs through the average too, and kappa is scanned as well"
SPLIT = "each tile folds 31 messages, in every warp, so that one barrier does"
VARYING = "of each sample the coefficient is converted to float64 and multiplied into a ratio"
NEXT = "besides, y of the stretch of lanes behind"
FOLD = "each tile folds 31 maps, in every warp, so that one barrier does"
JOINED = "what slots and warps tell each other is joined by loops, and a row by one thread"
LOOK_BACK = "a tile a block, whose look-back takes a barrier"
SUMS = "alpha's sums take a barrier, and x runs through the average too"


#: Loops in a trip of tiles that few enter: they scan once more where powers underflow, clear what
#: the last tile of a row lacks, join what a tile's warps add to alpha's gradient (one thread does),
#: and put NaN (of bfloat16 on 7.5).
TILE_LOOPS = 5


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


def split(
    kind: str, forward: float = MOST_PER_BYTE, backward: float = MOST_PER_BYTE
) -> Iterator[Expected]:
    """Aligned SplitRows of one dtype; a tile's sums for the gradient are no samples."""
    for gradient, ceiling in ((False, forward), (True, backward)):
        yield Expected(
            f"SplitRows<Tiling<{kind}, 256, true, {str(gradient).lower()}>>",
            aligned=True,
            moves=(2, 1) if gradient else (1, 1),
            narrow=5 if gradient else 0,
            inner=TILE_LOOPS,
            per_byte=ceiling,
            why=f"{SAMPLES}; {SPLIT}" if ceiling > MOST_PER_BYTE else RARE,
        )


def varying(
    kind: str,
    items: int,
    forward: tuple[float, float] = (MOST_PER_BYTE, MOST_PER_BYTE),
    backward: tuple[float, float] = (MOST_PER_BYTE, MOST_PER_BYTE),
) -> Iterator[Expected]:
    """Varying of one dtype, `items` a thread where not twice as many: ceilings of the aligned, by
    rows and of split rows.
    """
    halves = kind not in STORAGES[:2]
    for adjoint, ceilings in ((False, forward), (True, backward)):
        for is_split, ceiling in zip((False, True), ceilings, strict=True):
            twice = not adjoint and (halves or is_split)
            own = 2 * items if twice else items
            reasons = [VARYING, SAMPLES, *[FOLD] * is_split] if ceiling > MOST_PER_BYTE else []
            yield Expected(
                f"Varying<{kind}, AlignedRows<{kind}, {'256' if is_split else '{8,32,256}'}, "
                f"{own}, {{false,true}}>, {str(adjoint).lower()}, {str(is_split).lower()}>",
                aligned=True,
                moves=(2, 1),
                narrow=int(adjoint),
                per_byte=ceiling,
                why="; ".join(reasons + [NEXT] * adjoint),
            )
    yield Expected(f"Varying<{kind}, AnyRows<{kind}, {{8,32,256}}, 8>, {{false,true}}, false>")
    yield Expected(f"Varying<{kind}, AnyRows<{kind}, 256, 8>, {{false,true}}, true>")
    yield Expected(f"Varying<{kind}, Columns<{kind}, 8>, {{false,true}}, {{false,true}}>")


def lanes(
    kind: str,
    forward: tuple[float, float] = (MOST_PER_BYTE, MOST_PER_BYTE),
    backward: tuple[float, float] = (MOST_PER_BYTE, MOST_PER_BYTE),
) -> Iterator[Expected]:
    """Lanes of one dtype, 16 bytes a thread: ceilings of rows and of split rows."""
    for gradient, ceilings in ((False, forward), (True, backward)):
        for is_split, ceiling in zip((False, True), ceilings, strict=True):
            reasons = [JOINED] + [LOOK_BACK] * is_split + [SUMS] * gradient
            reasons += [SAMPLES] * (ceiling > MOST_PER_BYTE)
            yield Expected(
                f"Lanes<{kind}, true, {str(gradient).lower()}, {str(is_split).lower()}>",
                aligned=True,
                moves=(2, 1) if gradient else (1, 1),
                per_byte=ceiling,
                barriers=1 + gradient + is_split,
                inner=5 if gradient else 3,
                why="; ".join(reasons),
            )


KERNELS = [
    Expected("write_answer"),  # probe.cu
    *rows("Native<float>", False, {}),
    *rows("Native<double>", False, {}),
    *rows("Float16", False, {}),
    *rows("BFloat16", False, {}),
    *rows("Native<float>", True, {}),
    *rows("Native<double>", True, {}),
    *rows("Float16", True, {}),
    *rows("BFloat16", True, {8: 2.6, 256: 2.7}, f"{SAMPLES}; {GRADIENT}"),
    Expected(f"RowTiles<Tiling<{STORAGE}, {{8,32,256}}, false, {{false,true}}>>"),
    Expected(f"SplitHeads<Tiling<{STORAGE}, 256, {{false,true}}, {{false,true}}>>"),
    *split("Native<float>"),
    *split("Native<double>"),
    *split("Float16", backward=2.6),
    *split("BFloat16", 2.6, 2.7),
    Expected(f"SplitRows<Tiling<{STORAGE}, 256, false, {{false,true}}>>"),
    *varying("Native<float>", 16),
    *varying("Native<double>", 8),
    *varying("Float16", 32, (MOST_PER_BYTE, 3.0), (MOST_PER_BYTE, 2.8)),
    *varying("BFloat16", 32, (2.8, 3.3), (2.6, 3.1)),
    Expected(f"SplitSums<Tiling<{STORAGE}, 256, {{false,true}}, true>>"),
    *lanes("Native<float>"),
    *lanes("Native<double>"),
    *lanes("Float16"),
    *lanes("BFloat16", backward=(2.7, 2.8)),
    Expected(f"Lanes<{STORAGE}, false, {{false,true}}, {{false,true}}>"),
    Expected(f"LaneSums<{STORAGE}, {{false,true}}>"),
    Expected(f"{{SumAlongTerms,SumAlongResults}}<{STORAGE}>"),
]
