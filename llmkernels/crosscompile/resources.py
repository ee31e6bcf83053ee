"""What a compiled kernel takes of its chip, read from the machine code and its metadata, never from the source.

NVIDIA: registers and the stack from cuobjdump, instructions from nvdisasm; both come with Triton.  AMD: the metadata at
the end of the assembly that LLVM wrote.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llmkernels.crosscompile.chips import Chip

# mma.sync; wgmma; tcgen05; MFMA and WMMA.  DMMA (float64) is nothing that kernels here want.
MATRIX_NVIDIA = re.compile(r"\b((?:H|I|Q|O|HG|IG|QG|UTCH|UTCI|UTCQ|UTCO)MMA)[.\w]*")
MATRIX_AMD = re.compile(
    r"\b(v_s?(?:mfma|wmma)(?:_scale)?_[a-z]\d+)_\d+x\d+x\d+(?:_\d+b)?_?([a-z]+\d+)"
)  # sum, then factors
LOADS_NVIDIA = re.compile(r"\b(?:LDG|LDGSTS)\.E(?:\.[A-Z]+)*(?:\.(8|16|U8|S8|U16|S16|64|128))?[.\s]")
LOADS_AMD = re.compile(r"\b(?:global|buffer)_load_(?:lds_)?(dwordx?\d?|b\d+|u?s?byte|u?s?short|[ui](?:8|16)|d16\w*)")
WIDTHS_AMD = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b32": 4, "b64": 8, "b96": 12, "b128": 16}
PLAIN = re.compile(r"tt\.dot .*?:\s*tensor<[\dx]+x(\w+)(?:,[^>]*)?> \* tensor")


@dataclass(frozen=True)
class Resources:
    """One kernel on one chip.  Registers are of a lane; bytes of a program, but in_flight, which is of a unit."""

    registers: int
    spills: int  # stores to the stack in the code (NVIDIA), registers of a lane that lie in memory (AMD)
    scalar_spills: int  # SGPRs kept in lanes of a VGPR: a few cycles, no memory
    shared: int
    matrix: dict[str, int]  # kind of matrix instruction -> how many there are in the code
    products: list[str]  # element types of the products in the source that matrix units can do
    programs: int  # resident on a unit at once, at most
    occupancy: float  # share of the chip's waves that can be resident
    in_flight: int  # bytes that a unit's resident programs can have asked memory for, at most


def measure(kernel: Any, chip: Chip, warps: int) -> Resources:
    """The resources of what triton.compile returned."""
    read = _nvidia if chip.vendor == "cuda" else _amd
    registers, spills, scalar, static, matrix, loaded, copies = read(kernel)
    shared = max(kernel.metadata.shared, static)
    programs = chip.occupancy(registers, shared, warps)
    each = max(warps * chip.wave * loaded, kernel.metadata.shared if copies else 0)
    return Resources(
        registers=registers,
        spills=spills,
        scalar_spills=scalar,
        shared=shared,
        matrix=dict(sorted(matrix.items())),
        products=products(kernel.asm["ttir"], chip),
        programs=programs,
        occupancy=round(programs * warps / chip.waves, 3),
        in_flight=programs * each,
    )


def products(ttir: str, chip: Chip) -> list[str]:
    """Element types of the tt.dot operations of a kernel that its chip has matrix instructions for.

    float32 counts where it may be rounded to TF32 or where the chip multiplies float32 as it is: not on RDNA, and not
    on NVIDIA with input precision ieee.
    """
    found = set()
    for line in ttir.splitlines():
        if "tt.dot_scaled" in line:
            found.add("scaled")
        elif "tt.dot " in line and (kind := PLAIN.search(line)):
            exact = "inputPrecision = tf32" not in line and "inputPrecision = bf16" not in line
            if kind[1] == "f32" and (chip.wave == 32) and (exact or chip.vendor == "hip"):
                continue
            found.add(kind[1])
    return sorted(found)


def _nvidia(kernel: Any) -> tuple[int, int, int, int, Counter, int, bool]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    spills = len(re.findall(r"\bSTL(?:\.\w+)*\b", code))
    loaded = sum(int((width or "32").strip("US")) // 8 for width in LOADS_NVIDIA.findall(code))
    tensor_copies = "UTMALDG" in code  # which fill shared memory, and say no width
    matrix = Counter(MATRIX_NVIDIA.findall(code))
    return numbers["REG"], spills, 0, numbers["SHARED"], matrix, loaded, tensor_copies


def _amd(kernel: Any) -> tuple[int, int, int, int, Counter, int, bool]:
    code = kernel.asm["amdgcn"]
    numbers = {name: int(value) for name, value in re.findall(r"\.(\w+(?:_count|_fixed_size)):\s+(\d+)", code)}
    # On chips with one file for both, vgpr_count holds the accumulation registers too.
    spills = max(numbers["vgpr_spill_count"], -(-numbers["private_segment_fixed_size"] // 4))
    loaded = sum(WIDTHS_AMD.get(width, 2) for width in LOADS_AMD.findall(code))
    matrix = Counter(f"{name}_{factors}" for name, factors in MATRIX_AMD.findall(code))
    return (
        numbers["vgpr_count"],
        spills,
        numbers["sgpr_spill_count"],
        numbers["group_segment_fixed_size"],
        matrix,
        loaded,
        False,
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([_folder() / name, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@cache
def _folder() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
