"""The gate of tools/sass.py lets no kernel through that breaks one of its rules."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))

import sass  # noqa: E402
from sass_kernels import KERNELS, MOST_PER_BYTE, Expected  # noqa: E402
from sass_loops import Instruction, main_loop  # noqa: E402

ARCH = "9.0"
TOOLS = ("cuobjdump", "nvdisasm")

#: The planted kernel -> what the gate says of it.
FAULTS = {
    "Spills": "loads and stores of spilled registers",
    "Stack": "a stack of 64 bytes",
    "Narrow": "16 accesses of less than 128 bits a trip, allowed: 0",
    "TwoBarriers": "2 barriers a trip, allowed: 1",
    "ReadsTwice": "reads 128 and writes 64 bytes a trip, not 1 : 1",
    "TooMany": "instructions per byte, allowed: 2.5",
    "Computes": "1 inner loops that neither wait nor walk",
    "Crowded": "5 blocks fit a multiprocessor, planned: 6",
}
ALL = Expected("Scale<{Good," + ",".join(FAULTS) + "}>", aligned=True)


def missing_tools() -> str:
    missing = [] if shutil.which("nvcc") else ["nvcc"]
    for name in TOOLS:
        try:
            sass.tool(name)
        except SystemExit:
            missing.append(name)
    return ", ".join(missing)


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted kernels, compiled for one architecture."""
    if missing_tools():
        assert "CI" not in os.environ
        pytest.skip(f"there is no {missing_tools()}")
    path = tmp_path_factory.mktemp("sass") / "kernels.o"
    arch = ARCH.replace(".", "")
    nvcc = ["nvcc", "-O2", "-std=c++17", f"-I{ROOT / 'csrc'}", "-c", "-o", str(path)]
    nvcc += [f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]"]
    subprocess.run([*nvcc, str(ROOT / "tests" / "gate" / "kernels.cu")], check=True)
    return path


@pytest.fixture(scope="module")
def kernels(binary: Path) -> list[sass.Kernel]:
    return sass.kernels_of(binary)


def test_good_kernel_passes(kernels: list[sass.Kernel]) -> None:
    """Catches a gate that nothing passes, and miscounted bytes, barriers and registers."""
    (good,) = (kernel for kernel in kernels if kernel.name == "Scale<Good>")
    assert list(sass.broken_rules(good, ALL)) == []
    trip = good.loop.trip
    assert (trip.reads, trip.writes, trip.barriers, trip.doubles) == ({16: 4}, {16: 4}, 1, 0)
    # 4 vectors are loaded, 7 operations each of the loop's body, and stored; the rest is addresses.
    assert 8 + 28 <= trip.instructions <= 2 * (8 + 28)
    assert trip.cold == 0
    assert good.loop.longest.instructions > trip.instructions  # what waits and what walks
    assert good.bounds == sass.Bounds(threads=256, min_blocks=2)
    assert (good.shared, good.stack, good.spills) == (64, 0, 0)


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_kernel_fails(kernels: list[sass.Kernel], fault: str) -> None:
    """Catches a rule that is not applied, or that what nvcc prints has outgrown."""
    (kernel,) = (kernel for kernel in kernels if kernel.name == f"Scale<{fault}>")
    broken = list(sass.broken_rules(kernel, ALL))
    assert any(FAULTS[fault] in rule for rule in broken)
    if fault not in ("Spills", "Stack", "Narrow"):  # spilling makes a stack; 0 bytes are read wide
        assert len(broken) == 1
    if fault not in ("Spills", "Stack", "Crowded"):  # which hold for every kernel
        assert list(sass.broken_rules(kernel, replace(ALL, aligned=False))) == []


def test_names_are_exact(kernels: list[sass.Kernel]) -> None:
    """Catches a kernel that no one named, a name without a kernel, and a lost architecture."""
    good = [kernel for kernel in kernels if kernel.name == "Scale<Good>"]
    named = [Expected("Scale<Good>", aligned=True)]
    assert sass.complaints(good, named, [ARCH]) == []
    assert sass.complaints(good, [], [ARCH]) == ["Scale<Good> is not named in sass_kernels.py"]
    assert sass.complaints(good, named, [ARCH, "12.0"]) == [
        "Scale<Good> is not in the library for 12.0"
    ]
    assert sass.complaints(good, [Expected("Scale<{Good,Lost}>")], [ARCH]) == [
        "Scale<Lost> is not in the library for 9.0"
    ]


def test_command(binary: Path, tmp_path: Path) -> None:
    """Catches faults that do not reach the exit status, and a table that loses a kernel."""
    document = tmp_path / "table.md"
    document.write_text("before\n<!-- sass: begin -->\nold\n<!-- sass: end -->\nafter\n")
    command = [sys.executable, str(ROOT / "tools" / "sass.py"), str(binary)]
    command += ["--json", str(tmp_path / "sass.json"), "--write", str(document)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert "Scale<Good> is not named in sass_kernels.py" in run.stderr
    names = {row["kernel"] for row in json.loads((tmp_path / "sass.json").read_text())}
    assert names == set(ALL)
    text = document.read_text()
    assert text.startswith("before\n<!-- sass: begin -->\n| kernel |")
    assert text.endswith("|\n<!-- sass: end -->\nafter\n")
    assert all(f"| `{name}` |" in text for name in names)

    def faults(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            sass.main([str(binary), *arguments])
        return str(end.value)

    assert "out of date" not in faults("--check", str(document))
    document.write_text(text.replace("`Scale<Good>` | 9.0", "`Scale<Good>` | 8.0"))
    assert "out of date" in faults("--check", str(document))


def test_every_instantiation_is_named_once() -> None:
    """Catches two entries for one kernel, of which one would be ignored, and an unfounded one."""
    for entry in KERNELS:
        above = entry.per_byte > MOST_PER_BYTE
        assert bool(entry.why) == bool(above or entry.barriers > 1 or entry.narrow or entry.inner)
    names = [name for entry in KERNELS for name in entry]
    assert len(names) == len(set(names))
    assert list(Expected("A<{x,y}, {1,2}>")) == ["A<x, 1>", "A<x, 2>", "A<y, 1>", "A<y, 2>"]


def code(*lines: str) -> list[Instruction]:
    """Instructions as `@P0 BRA 0x10`."""
    found = []
    for line in lines:
        predicate, _, rest = (
            line.rpartition("@")[2].partition(" ") if "@" in line else ("", "", line)
        )
        opcode, _, operands = rest.partition(" ")
        found.append(Instruction(opcode, operands, predicate and f"@{predicate}"))
    return found


LOAD, STORE = "LDG.E.128 R4,[R2]", "STG.E.128 [R2],R4"


def test_waiting_is_told_from_work() -> None:
    """Catches a loop around the main loop's head, or one that waits, taken for the main loop."""
    main = main_loop(
        code(
            "MOV R1,R2",  # 0x00
            LOAD,  # 0x10, the head
            "@P0 BRA 0x50",  # 0x20
            "LDG.E.64.STRONG.GPU R6,[R8]",  # 0x30, waits
            "@!P1 BRA 0x30",  # 0x40
            "FADD R4,R4,R6",  # 0x50
            STORE,  # 0x60
            "@P2 BRA 0x10",  # 0x70
            "EXIT",
        )
    )
    assert main.is_loop
    assert (main.trip.instructions, main.trip.bytes, main.trip.cold) == (5, 32, 0)
    assert main.longest.instructions == 7
    assert main.computing == 0


def test_what_everyone_does_is_counted() -> None:
    """Catches an inner loop on the only way left out, and one that hides work on the side."""
    body = [LOAD, "FADD R4,R4,R6", "@P1 BRA 0x10", STORE, "@P2 BRA 0x0", "EXIT"]
    main = main_loop(code(*body))
    assert (main.trip.instructions, main.trip.cold) == (5, 1)
    aside = [LOAD, "@P0 BRA 0x40", "FADD R4,R4,R6", "@P1 BRA 0x20", STORE, "@P2 BRA 0x0", "EXIT"]
    main = main_loop(code(*aside))
    assert (main.trip.instructions, main.trip.cold, main.computing) == (4, 0, 1)


def test_the_longer_way_counts() -> None:
    """Catches a rare-looking branch that would go uncounted, and one without samples preferred."""
    main = main_loop(
        code(
            "@P0 BRA 0x60",  # to the way without accesses
            LOAD,
            "@P1 BRA 0x50",
            "FADD R4,R4,R6",
            "FADD R4,R4,R6",
            STORE,
            *["FADD R4,R4,R6"] * 9,
            "@P2 BRA 0x0",
            "EXIT",
        )
    )
    assert (main.trip.instructions, main.trip.bytes) == (16, 32)


def test_kernel_without_a_loop() -> None:
    """Catches the search for a loop where a block takes one tile, and dead code behind the exit."""
    doubles = ["DFMA R4,R4,R6,R8", "F2F.F64.F32 R4,R6"]
    main = main_loop(code(LOAD, "@P0 EXIT", *doubles, STORE, "EXIT", "BRA 0x60"))
    assert not main.is_loop
    assert (main.trip.instructions, main.trip.doubles, main.trip.bytes) == (6, 2, 32)


def test_peeled_trip() -> None:
    """Catches the first trip, taken out of the loop by the compiler, in place of the loop."""
    main = main_loop(code(LOAD, STORE, LOAD, "FADD R4,R4,R6", STORE, "@P0 BRA 0x20", "EXIT"))
    assert main.is_loop
    assert (main.trip.instructions, main.trip.bytes) == (4, 32)


def test_edges_are_not_the_main_loop() -> None:
    """Catches the tiles at a row's ends, which move as much and a scalar besides, in its place."""
    main = main_loop(
        code(
            "@P0 BRA 0x50",
            *[LOAD, "FADD R4,R4,R6", "FADD R4,R4,R6", STORE],  # a tile at an end
            "@P1 BRA 0x90",  # 0x50
            *[LOAD, STORE, "@P2 BRA 0x60"],  # 0x60, those between
            "@P3 BRA 0x0",  # 0x90
            "STG.E.64 [R2],R4",
            "EXIT",
        )
    )
    assert main.is_loop
    assert (main.trip.instructions, main.trip.bytes) == (3, 32)


def test_a_branch_that_looks_like_a_call() -> None:
    """Catches a loop that seems never to end, and one around it preferred for what it moves beside
    its samples.
    """
    main = main_loop(
        code(
            "MOV R1,R2",  # 0x00
            LOAD,  # 0x10
            STORE,  # 0x20
            "@P0 CALL.REL.NOINC 0x50",  # 0x30
            "BRA 0x10",  # 0x40
            LOAD,  # 0x50
            STORE,  # 0x60
            "STG.E.U16 [R2],R4",  # 0x70
            "@P1 BRA 0x0",  # 0x80
            "EXIT",
        )
    )
    assert (main.trip.instructions, main.trip.bytes, main.trip.cold) == (4, 32, 0)


def test_widths() -> None:
    """Catches modifiers read as a width, and 64 bits that pass for wide."""
    accesses = {
        "LDG.E.128.CONSTANT": 16,
        "LDG.E.LTC128B.64": 8,
        "LDG.E.ENL2.256": 32,
        "STG.E.EF.U16": 2,
        "ST.E": 4,
        "LDG.E.64.STRONG.GPU": 0,
        "LDS.128": 0,
    }
    for opcode, size in accesses.items():
        trip = main_loop(code(opcode, "EXIT")).trip
        assert (trip.bytes, trip.wide) == (size, size if size >= 16 else 0)


def test_converged_warps() -> None:
    """Catches the fall-back of a shuffle among diverged lanes counted as what runs."""
    main = main_loop(
        code(
            LOAD,  # 0x00
            "BRA.CONV ~URZ,0x30",  # 0x10: to the shuffle
            "CALL.REL.NOINC 0x100",  # 0x20
            "SHFL.UP PT,R4,R4,0x1,RZ",  # 0x30
            "BRA.DIV UR4,0x80",  # 0x40: away from it
            STORE,  # 0x50
            "@P0 BRA 0x0",  # 0x60
            "EXIT",  # 0x70
            "WARPSYNC.COLLECTIVE R3,0x90",  # 0x80
            "BRA 0x50",
        )
    )
    assert (main.trip.instructions, main.trip.cold) == (6, 0)
    assert main.longest.instructions == 6


def test_what_cannot_be_counted_raises() -> None:
    """Catches an indirect branch or a bulk copy that goes uncounted."""
    for opcode in ("BRX R2", "UBLKCP [UR4],[UR6],UR8"):
        with pytest.raises(ValueError, match=opcode.split()[0]):
            main_loop(code(opcode, "EXIT"))
