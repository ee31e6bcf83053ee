"""One-byte numbers and floats.  Where the chip does not convert them itself, integer arithmetic on the bits does.

e5m2  s eeeee mm     is the upper half of a float16
e4m3  s eeee mmm     shifted into a float32 it is 2^120 times too small, its subnormals included; s 1111 111 is NaN
"""

import torch
import triton
import triton.language as tl

from ._ptx import E4M3_BITS_HALVES, E4M3_HALVES, E5M2_HALVES, INT8_HALVES

PLAIN, INT8, E4M3, E5M2, INT8_BITS, E4M3_BITS, E5M2_BITS = map(tl.constexpr, range(7))
"""How the elements of an array are stored; FP8 with _BITS is passed as uint8."""

_KINDS = {torch.int8: (INT8_BITS, INT8), torch.float8_e4m3fn: (E4M3_BITS, E4M3), torch.float8_e5m2: (E5M2_BITS, E5M2)}


def words_of(x, chip):
    """(16-bit words of two neighbours each, their kind), as `halves` takes them; None where x is no whole words."""
    whole = x.dtype in _KINDS and x.stride(-1) == 1 and x.shape[-1] % 2 == 0 and x.data_ptr() % 2 == 0
    if not whole or any(step % 2 for step in (x.storage_offset(), *x.stride()[:-1])):
        return None
    converts = x.dtype == torch.int8 or (x.dtype == torch.float8_e4m3fn and chip.fp8 and not chip.rdna)
    return x.view(torch.int16), _KINDS[x.dtype][converts].value


def stored(x, chip):
    """(x as a kernel is handed it, its kind)."""
    if x.dtype not in _KINDS:
        return x, PLAIN.value
    converts = not chip.amd if x.dtype == torch.int8 else chip.fp8
    kind = _KINDS[x.dtype][converts].value
    return (x.view(torch.uint8) if kind in (E4M3_BITS.value, E5M2_BITS.value) else x), kind


@triton.jit
def decoded(x, dtype: tl.constexpr, KIND: tl.constexpr):
    """The values of stored elements in `dtype`, in which float16, bfloat16 and float32 hold them exactly."""
    if KIND == E5M2_BITS:
        value = (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    elif KIND == E4M3_BITS:
        wide = x.to(tl.int8, bitcast=True).to(tl.int32)  # the sign fills what lies above it
        value = ((wide << 20) & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36
        value = tl.where((wide & 0x7F) == 0x7F, float("nan"), value)
    else:
        value = x
    return exactly(value.to(tl.float32), dtype) if KIND >= INT8_BITS else value.to(dtype)


@triton.jit
def halves(words, KIND: tl.constexpr, PTX: tl.constexpr):
    """The low and the high bytes of 16-bit words as float16, which holds them exactly."""
    if PTX:
        CODE: tl.constexpr = (
            INT8_HALVES if KIND == INT8
            else E4M3_HALVES if KIND == E4M3
            else E4M3_BITS_HALVES if KIND == E4M3_BITS
            else E5M2_HALVES
        )  # fmt: skip
        low, high = tl.inline_asm_elementwise(
            CODE, "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        low, high = _upper(words << 8, KIND), _upper(words, KIND)
    return low, high


@triton.jit
def _upper(words, KIND: tl.constexpr):
    """The upper bytes of int16 words as float16.  Where AMD has no conversion, LLVM does this for two words at once."""
    if KIND == INT8:  # 1024 + 128 + the number
        found = (((words >> 8) & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    elif KIND == E4M3:
        found = (words >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif KIND == E4M3_BITS:
        bits = (words >> 1) & -0x4080  # sign, 0, exponent and fraction; 2^8 times too small
        bits |= (bits + 0x80) & 0x4000  # the fifth bit of the exponent of NaN, whose others are all 1
        found = bits.to(tl.float16, bitcast=True) * 256.0
    else:
        found = (words & -0x100).to(tl.float16, bitcast=True)
    return found


@triton.jit
def exactly(x, dtype: tl.constexpr):
    """float32 values that `dtype` holds exactly.  bfloat16 is their upper half: rounding takes AMD six instructions."""
    if tl.bfloat16 == dtype:
        found = (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        found = x.to(dtype)
    return found


@triton.jit
def encoded(x, KIND: tl.constexpr):
    """float32 `x` as INT8, E4M3_BITS or E5M2_BITS: rounded to nearest even, saturated; NaN is 0 in int8.

    Integer arithmetic on every chip, so that every chip stores the same bytes.
    """
    if KIND == INT8:
        x = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -128.0), 127.0)
        code = ((x + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2^23: integers are as far as float32 reaches
    else:
        MANTISSA: tl.constexpr = 3 if KIND == E4M3_BITS else 2
        BIAS: tl.constexpr = 7 if KIND == E4M3_BITS else 15
        LARGEST: tl.constexpr = 448.0 if KIND == E4M3_BITS else 57344.0
        SHIFT: tl.constexpr = 23 - MANTISSA
        HALF: tl.constexpr = (1 << (SHIFT - 1)) - 1
        UNIT: tl.constexpr = 2.0 ** (SHIFT + 1 - BIAS)  # its last bit is worth the smallest subnormal
        sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
        size = tl.minimum(tl.abs(x), LARGEST)
        bits = size.to(tl.uint32, bitcast=True)
        normal = ((bits + HALF + ((bits >> SHIFT) & 1)) >> SHIFT) - ((127 - BIAS) << MANTISSA)
        tiny = (size + UNIT).to(tl.uint32, bitcast=True) & 0xFF
        rounded = tl.where(size < 2.0 ** (1 - BIAS), tiny, normal)
        code = (sign | tl.where(x == x, rounded, 0x7F)).to(tl.uint8)
    return code
