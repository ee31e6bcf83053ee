"""The chips that kernels are compiled for without being there, and what a program may take of one of them.

NVIDIA: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".  AMD: the tables of LLVM's
AMDGPUUsage and the ISA documents.  Units, bandwidth and memory are those of the fastest product that was sold with the
chip, as are the rates, from the vendors' data sheets, without sparsity.  They serve `in_flight_needed` and limits.py.
"""

from dataclasses import dataclass

KIB = 1024
LATENCY = 700e-9  # seconds from a load to its data in a busy memory system: 600 to 800 ns on these chips


@dataclass(frozen=True)
class Chip:
    """Limits of one unit (an SM, or a CU; two CUs of an RDNA chip share nothing that matters here).

    registers: 32-bit registers of a SIMD's file for each lane, times SIMDs: what resident waves share.
    granule: registers are handed to a wave in multiples of this.
    """

    name: str
    vendor: str  # cuda or hip
    arch: int | str  # as Triton's GPUTarget wants it
    wave: int  # lanes
    shared_block: int  # bytes of shared memory (LDS) that one program may take
    shared_unit: int  # bytes that all programs on a unit share
    simds: int
    lane_registers: int  # registers of one SIMD for one lane
    granule: int
    waves_simd: int  # resident at most
    units: int
    bandwidth: float  # bytes/s
    product: str

    def occupancy(self, registers: int, shared: int, warps: int) -> int:
        """Programs of `warps` waves that can be resident on a unit at once.

        Args:
            registers: of one lane.
            shared: bytes of one program.
        """
        given = -(-max(registers, 1) // self.granule) * self.granule
        waves = self.simds * min(self.waves_simd, self.lane_registers // given)
        reserved = KIB if self.vendor == "cuda" else 0  # the system's own, in every program
        by_shared = self.shared_unit // (shared + reserved) if shared + reserved else waves
        return min(waves // warps, by_shared)

    @property
    def waves(self) -> int:
        return self.simds * self.waves_simd

    @property
    def rates(self) -> dict[str, float]:
        """What is multiplied -> operations/s, a multiply and an add being two."""
        return RATES[self.name]

    @property
    def in_flight_needed(self) -> float:
        """Bytes that a unit must have asked for at any time, to keep memory busy (Little's law)."""
        return self.bandwidth * LATENCY / self.units


def _rates(half: float, int8: float, fp8: float, float32: float) -> dict[str, float]:
    """In teraoperations; `half` is bfloat16 and float16, float32 at full precision on whichever unit is faster."""
    return {"half": half * 1e12, "int8": int8 * 1e12, "fp8": fp8 * 1e12, "float32": float32 * 1e12}


RATES = {  # fp8 is multiplied as float16 on sm_80, gfx90a and gfx1100
    "sm_80": _rates(312, 624, 312, 19.5),
    "sm_90": _rates(989, 1979, 1979, 67),
    "sm_100": _rates(2250, 4500, 4500, 80),
    "gfx90a": _rates(191, 191, 191, 47.9),
    "gfx942": _rates(1307, 2615, 2615, 163),
    "gfx950": _rates(2516, 5033, 5033, 157),
    "gfx1100": _rates(123, 123, 123, 61),
    "gfx1201": _rates(195, 389, 389, 48.7),
}
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", "cuda", 80, 32, 163 * KIB, 164 * KIB, 4, 512, 8, 16, 108, 2.0e12, "A100"),
        Chip("sm_90", "cuda", 90, 32, 227 * KIB, 228 * KIB, 4, 512, 8, 16, 132, 4.8e12, "H200"),
        Chip("sm_100", "cuda", 100, 32, 227 * KIB, 228 * KIB, 4, 512, 8, 16, 148, 8.0e12, "B200"),
        Chip("gfx90a", "hip", "gfx90a", 64, 64 * KIB, 64 * KIB, 4, 512, 8, 8, 104, 1.6e12, "MI250X, one die"),
        Chip("gfx942", "hip", "gfx942", 64, 64 * KIB, 64 * KIB, 4, 512, 8, 8, 304, 5.3e12, "MI300X"),
        Chip("gfx950", "hip", "gfx950", 64, 160 * KIB, 160 * KIB, 4, 512, 8, 8, 256, 8.0e12, "MI355X"),
        Chip("gfx1100", "hip", "gfx1100", 32, 64 * KIB, 64 * KIB, 2, 1536, 24, 16, 96, 0.96e12, "RX 7900 XTX"),
        Chip("gfx1201", "hip", "gfx1201", 32, 64 * KIB, 64 * KIB, 2, 1536, 24, 16, 64, 0.64e12, "RX 9070 XT"),
    )
}


def find(name: str) -> Chip:
    """The chip called `name`; ValueError lists them where there is none."""
    if name not in CHIPS:
        raise ValueError(f"--target is {name!r}; the targets are {', '.join(CHIPS)}")
    return CHIPS[name]
