"""Stored weights become numbers a matrix unit multiplies, exactly.  Parts of the kernels in _product.py.

int4   two a byte, even columns low: 0..15 - zero point          int8   -128..127 - zero point
mxfp4  two a byte: e2m1, doubled, so that they are integers      fp8    e4m3
"""

import triton
import triton.language as tl

from ._bytes import exactly


@triton.jit
def nibbles(codes, zeros, ZEROS: tl.constexpr, KIND: tl.constexpr, DOT: tl.constexpr):
    """The low halves of bytes as DOT; codes and zeros are of one shape, or broadcast to it.

    16 bits hold each number exactly; int8 does for int4 too.
    """
    low = codes & 15
    if KIND == "mxfp4" and tl.bfloat16 == DOT:  # on AMD, as below: on NVIDIA _ptx.py unpacks
        wide = low.to(tl.uint32)
        bits = ((wide & 7) << 22) | ((wide & 8) << 28)  # a float32 2^127 times too small
        found = exactly(bits.to(tl.float32, bitcast=True) * 1.7014118346046923e38, DOT)
    elif KIND == "mxfp4":
        value = (0xC8643210 >> ((low & 7) * 4).to(tl.uint32)) & 15  # twice 0, 0.5, 1, 1.5, 2, 3, 4, 6
        number = value.to(tl.int8)
        found = tl.where(low > 7, -number, number).to(DOT)
    elif tl.bfloat16 == DOT:
        found = exactly(low.to(tl.float32) - (zeros.to(tl.float32) if ZEROS else 8.0), DOT)
    elif ZEROS:
        found = (low.to(tl.int8) - zeros.to(tl.int8)).to(DOT)
    else:
        found = (low.to(tl.int8) - 8).to(DOT)
    return found


@triton.jit
def bytes_(codes, zeros, ZEROS: tl.constexpr, KIND: tl.constexpr, DOT: tl.constexpr, CONVERTS: tl.constexpr):
    """codes as DOT.  Of int8 with zero points, as DOT int8: codes still, since codes - zeros may take 9 bits.

    CONVERTS: the chip has instructions that round to bfloat16.
    """
    if KIND == "fp8" and codes.dtype == tl.uint8:
        found = e4m3(codes, DOT)
    elif KIND == "int8" and tl.bfloat16 == DOT and not CONVERTS:
        found = exactly(codes.to(tl.float32) - (zeros.to(tl.float32) if ZEROS else 0.0), DOT)
    elif ZEROS and tl.int8 != DOT:
        found = (codes.to(tl.int16) - zeros.to(tl.int16)).to(DOT)
    else:
        found = codes.to(DOT)
    return found


@triton.jit
def e4m3(codes, DOT: tl.constexpr):
    """e4m3 codes, uint8, as DOT: float16 of another bias.

    float8e4b8, the format of gfx942, has the same bits for numbers half as large, one zero, and one NaN.
    """
    wide = codes.to(tl.int16)
    broken = (wide & 0x7F) == 0x7F
    if tl.float8e4b8 == DOT:
        found = tl.where(broken, 128, tl.where(wide == 128, 0, wide)).to(tl.uint8).to(tl.float8e4b8, bitcast=True)
    else:
        half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        found = tl.where(broken, float("nan"), half).to(DOT)
    return found


@triton.jit
def scales_of(scales, KIND: tl.constexpr):
    """Stored scales in float32.  Of mxfp4, exponents of a power of two; half of it, since its codes are doubled."""
    if KIND == "mxfp4":
        power = scales.to(tl.int32)
        normal = tl.maximum(power - 1, 0) << 23
        small = tl.where(power == 1, 0x400000, 0x200000)  # 2^-127 and 2^-128, subnormal
        found = tl.where(power > 1, normal, small).to(tl.float32, bitcast=True)
    else:
        found = scales.to(tl.float32)
    return found
