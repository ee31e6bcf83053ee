"""The TPU generations that kernels are compiled for, and the numbers of them that sizes of blocks depend on.

VMEM: what the compiler lets a kernel take (libtpu says so when it is exceeded).  Matrix unit, bandwidth and rates: the
pages of Google's documentation "TPU v4", "v5e", "v5p", "v6e" and "TPU7x", and its JAX scaling book.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from .. import CACHE_AXES, emulated

MIB = 1 << 20
INTERPRETED = 1 << 30  # bytes


@dataclass(frozen=True)
class Chip:
    """One TensorCore.

    Args:
        kind: how its device_kind begins; the first that fits counts.
        topology: what libtpu calls one chip of it.
        matrix: rows and columns of the matrix unit.
        vmem: bytes.
        bandwidth: bytes/s of HBM.
        rate: bfloat16 operations/s.
        fp8, int8: whether the matrix unit multiplies them.
        pages: of a block of attention at most: each is a copy that the program spells out.
        decode_keys: of a block whose update is unrolled: as many as registers are not spilled for.
        narrow_keys: of an update whose scores or keys take more registers than they fill.
        features: of a weight that are multiplied at once by few rows, without and with zero points.
        registers: vector registers, of 4 KiB each.
        longest: columns of a product of many rows that are summed at once: on v7x the matrix unit adds up its results.
        byte_to: what the matrix unit multiplies by bfloat16, and bytes become at once.
        runs: of such sums by a weight as it is stored, how many stand one after the other before registers spill.
    """

    name: str
    kind: str
    topology: str
    matrix: int
    vmem: int
    bandwidth: float
    rate: float
    fp8: bool = False
    int8: bool = True
    pages: int = 16
    decode_keys: int = 768
    narrow_keys: int = 128
    features: tuple[int, int] = (512, 512)
    registers: int = 64
    longest: int = 512
    byte_to: jnp.dtype | None = None
    runs: int = 8

    @property
    def vmem_limit(self):
        """What a kernel may ask for: a part stays with XLA, for operands that it keeps there."""
        return self.vmem * 3 // 4

    @property
    def tile_rows(self):
        """Rows of queries that one pass over the keys serves."""
        return 2 * self.matrix


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4",
            "TPU v4",
            "v4:1x1x1",
            128,
            16 * MIB,
            1.2e12,
            275e12,
            int8=False,
            decode_keys=256,
            narrow_keys=32,
            features=(128, 128),
            registers=32,
        ),
        Chip("v5e", "TPU v5 lite", "v5e:1x1", 128, 128 * MIB, 0.82e12, 197e12),
        Chip("v5p", "TPU v5", "v5p:1x1x1", 128, 64 * MIB, 2.77e12, 459e12),
        Chip(
            "v6e",
            "TPU v6 lite",
            "v6e:1x1",
            256,
            128 * MIB,
            1.64e12,
            918e12,
            features=(512, 256),
            byte_to=jnp.dtype(jnp.bfloat16),
            runs=1,
        ),
        Chip(
            "v7x",
            "TPU7x",
            "tpu7x:1x1x1",
            256,
            64 * MIB,
            3.7e12,
            1150e12,
            fp8=True,
            features=(512, 256),
            longest=4096,
            byte_to=jnp.dtype(jnp.float8_e4m3fn),
        ),
    )
}


# Blocks of two pages, so that short sequences have several: what a test must see is how one follows the other.
INTERPRETER = Chip("the interpreter", "", "", 128, 16 * MIB, 0.0, 0.0, pages=2)


def current():
    """The chip that a program is compiled for; where none is known, v4, whose sizes fit every other."""
    if emulated():
        return INTERPRETER
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None and jax.default_backend() == "tpu":
        device = jax.devices()[0]
    kind = getattr(device, "device_kind", "")
    return next((chip for chip in CHIPS.values() if kind.startswith(chip.kind)), CHIPS["v4"])


def interpreter():
    """How an emulation runs a kernel: copies happen at the wait for them, and what nobody wrote is NaN."""
    return pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")


def too_large(*arrays):
    """The refusal of arrays that the interpreter, which copies them, has no room for."""
    if (held := sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)) > INTERPRETED:
        yield "SHAPE", f"arrays of {held} bytes; the interpreter takes at most {INTERPRETED}", "run it on a TPU"


def refuse_order(**caches):
    """The refusal of caches that would be copied whole in every call to have pages in one piece.

    A traced array has no order yet: there XLA copies, if it must.
    """
    for name, cache in caches.items():
        if not isinstance(cache, jax.Array) or isinstance(cache, jax.core.Tracer) or 1 in cache.shape[1:3]:
            continue
        order = tuple(cache.format.layout.major_to_minor)  # type: ignore[attr-defined]
        if order != CACHE_AXES:
            reason = f"{name} lies in memory in the order of axes {order}; a page is copied from {CACHE_AXES}"
            yield "LAYOUT", reason, "allocate it by llmkernels.jax_api.allocate_cache, and keep cache.format in jax.jit"
