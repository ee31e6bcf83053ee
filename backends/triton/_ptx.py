"""Two nibbles at a time on NVIDIA: what _codes.py says, in a quarter of the instructions.

Four bytes become eight numbers of 16 bits.  An integer q below 16 in the last bits of a number whose unit is 1 (128 in
bfloat16, 1024 in float16) adds q to it; an e2m1 number across exponent and fraction is itself, times a power of two.
So the work is to spread the bytes, to mask, and one multiply-add.
"""

import triton
import triton.language as tl

_SPREAD = """
    .reg .b32 near, far, near_high, far_high;
    prmt.b32 near, $4, 0, 0x4140;
    prmt.b32 far, $4, 0, 0x4342;
"""


def _integers(kind, one, base):
    """(base + q) * 1 + zeros: the number's unit is 1, and zeros, $5 and $6, are -(base + zero point).

    `base` is the upper byte of a number and the lower one is 0, so that moving bytes sets it.
    """
    return f"""{{
    .reg .b32 low, high, near, far, near_high, far_high, one, base;
    mov.b32 one, {one};
    mov.b32 base, {base};
    and.b32 low, $4, 0x0F0F0F0F;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 near, low, base, 0x4140;
    prmt.b32 far, low, base, 0x4342;
    prmt.b32 near_high, high, base, 0x4140;
    prmt.b32 far_high, high, base, 0x4342;
    fma.rn.{kind} $0, near, one, $5;
    fma.rn.{kind} $1, far, one, $6;
    fma.rn.{kind} $2, near_high, one, $5;
    fma.rn.{kind} $3, far_high, one, $6;
}}"""


def _e2m1(kind, shift, mask, factor):
    """Sign to the top, exponent and fraction `shift` up; times `factor`, which makes up for the bias, and doubles."""
    lines = [f".reg .b32 factor, zero; mov.b32 factor, {factor}; mov.b32 zero, 0x80008000;"]
    for source, target, out in (("near", "near_high", "$0"), ("far", "far_high", "$1")):
        lines += _spread_sign(source, target, 12, shift, mask)
        lines += [f"fma.rn.{kind} {out}, {target}, factor, zero;"]
    for source, target, out in (("near", "near_high", "$2"), ("far", "far_high", "$3")):
        lines += _spread_sign(source, target, 8, shift - 4, mask)
        lines += [f"fma.rn.{kind} {out}, {target}, factor, zero;"]
    return "{" + _SPREAD + "\n".join(lines) + "}"


def _spread_sign(source, target, sign, shift, mask):
    return [
        f"shl.b32 {target}, {source}, {shift};",
        f"and.b32 {target}, {target}, {mask};",
        f"{{ .reg .b32 sign; shl.b32 sign, {source}, {sign};",
        f"lop3.b32 {target}, sign, 0x80008000, {target}, 0xEA; }}",
    ]


INTEGERS_BF16 = tl.constexpr(_integers("bf16x2", "0x3F803F80", "0x43434343"))
INTEGERS_FP16 = tl.constexpr(_integers("f16x2", "0x3C003C00", "0x64646464"))
E2M1_BF16 = tl.constexpr(_e2m1("bf16x2", 6, "0x01C001C0", "0x7F007F00"))
E2M1_FP16 = tl.constexpr(_e2m1("f16x2", 9, "0x0E000E00", "0x78007800"))


# q - 8 in two's complement: bit 3 turned over, and copied to the bits above, which is adding 30 times itself.
SIGNED = tl.constexpr("""{
    .reg .b32 low, high, low_sign, high_sign;
    shr.u32 high, $2, 4;
    lop3.b32 low, $2, 0x0F0F0F0F, 0x08080808, 0x6A;
    lop3.b32 high, high, 0x0F0F0F0F, 0x08080808, 0x6A;
    and.b32 low_sign, low, 0x08080808;
    and.b32 high_sign, high, 0x08080808;
    mad.lo.u32 $0, low_sign, 30, low;
    mad.lo.u32 $1, high_sign, 30, high;
}""")


def _fours(kind, one, base):
    """The same of two words of four nibbles: each nibble is moved to the end of its half, where `base` is added."""
    lines = [f".reg .b32 one, moved; mov.b32 one, {one};"]
    for index in range(4):
        lines += [
            f"shr.u32 moved, $4, {4 * index};",
            f"lop3.b32 moved, moved, 0x000F000F, {base}, 0xEA;",
            f"fma.rn.{kind} ${index}, moved, one, $5;",
        ]
    return "{" + "\n".join(lines) + "}"


FOURS_BF16 = tl.constexpr(_fours("bf16x2", "0x3F803F80", "0x43004300"))
FOURS_FP16 = tl.constexpr(_fours("f16x2", "0x3C003C00", "0x64006400"))


@triton.jit
def fours(words, zeros, ZEROS: tl.constexpr, DOT: tl.constexpr):
    """The four nibbles of 16-bit words, the lowest first, as DOT, bfloat16 or float16; zeros as in `pairs`."""
    offset = _offset(words, zeros, ZEROS, DOT)
    if tl.bfloat16 == DOT:
        four = tl.inline_asm_elementwise(
            FOURS_BF16, "=r,=r,=r,=r,r,r", [words, offset],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        four = tl.inline_asm_elementwise(
            FOURS_FP16, "=r,=r,=r,=r,r,r", [words, offset],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    return four


@triton.jit
def _offset(codes, zeros, ZEROS: tl.constexpr, DOT: tl.constexpr):
    """-(unit + zero point), what is added to unit + q, in the shape of codes."""
    UNIT: tl.constexpr = 128 if tl.bfloat16 == DOT else 1024
    if ZEROS:
        offset = tl.broadcast_to((-UNIT - zeros.to(tl.int32)).to(DOT), codes.shape)
    else:
        offset = tl.full(codes.shape, -(UNIT + 8), DOT)
    return offset


@triton.jit
def pairs(codes, zeros, ZEROS: tl.constexpr, KIND: tl.constexpr, DOT: tl.constexpr):
    """The low and the high halves of bytes, codes and zeros of one shape or broadcast to it, as DOT.

    DOT is bfloat16, float16 or, for symmetric int4, int8.
    """
    if tl.int8 == DOT:
        both = tl.inline_asm_elementwise(SIGNED, "=r,=r,r", [codes], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        offset = _offset(codes, zeros, ZEROS, DOT)
        if tl.bfloat16 == DOT:
            both = tl.inline_asm_elementwise(
                INTEGERS_BF16 if KIND == "int4" else E2M1_BF16, "=r,=r,=r,=r,r,r,r", [codes, offset],
                dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            both = tl.inline_asm_elementwise(
                INTEGERS_FP16 if KIND == "int4" else E2M1_FP16, "=r,=r,=r,=r,r,r,r", [codes, offset],
                dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
            )  # fmt: skip
    return both


# Two words of two bytes each: the low bytes as a pair of float16, then the high bytes.  What _bytes.halves says.
INT8_HALVES = tl.constexpr("""{
    .reg .b32 high, offset;
    mov.b32 offset, 0xE480E480;
    shr.u32 high, $2, 8;
    lop3.b32 $0, $2, 0x00FF00FF, 0x64806480, 0x6A;
    lop3.b32 high, high, 0x00FF00FF, 0x64806480, 0x6A;
    add.rn.f16x2 $0, $0, offset;
    add.rn.f16x2 $1, high, offset;
}""")

E4M3_HALVES = tl.constexpr("""{
    .reg .b32 sorted;
    .reg .b16 low, high;
    prmt.b32 sorted, $2, 0, 0x3120;
    mov.b32 {low, high}, sorted;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}""")

E5M2_HALVES = tl.constexpr("""{
    prmt.b32 $0, $2, 0, 0x2404;
    and.b32 $1, $2, 0xFF00FF00;
}""")


def _e4m3_halves():
    """Where no instruction converts: the byte below copies of its sign, moved up by 7, times 256; NaN adds NaN."""
    lines = [".reg .b32 bits, size, broken, nan, factor; mov.b32 nan, 0x3F803F80; mov.b32 factor, 0x5C005C00;"]
    for index, spread in ((0, "0xA280"), (1, "0xB391")):
        lines += [
            f"prmt.b32 bits, $2, 0, {spread};",
            "shl.b32 bits, bits, 7;",
            "and.b32 bits, bits, 0xBF80BF80;",
            "abs.f16x2 size, bits;",
            "set.eq.u32.f16x2 broken, size, nan;",
            f"fma.rn.f16x2 ${index}, bits, factor, broken;",
        ]
    return "{" + "\n".join(lines) + "}"


E4M3_BITS_HALVES = tl.constexpr(_e4m3_halves())


@triton.jit
def after_previous(CHAINED: tl.constexpr):
    """The first line of every kernel: wait until what the kernel before wrote can be read.

    CHAINED kernels are launched while the one before still runs (programmatic dependent launch, Hopper and later), so
    that the way from one to the next is hidden: 0.4 to 1.3 us a kernel on an H100.  No kernel tells the next to start
    before its own programs have ended: those of two small kernels would then crowd on the processors that are free,
    and 16 rows of W4A16, 4096 x 4096, took 13.1 us instead of 7.8.
    """
    if CHAINED:
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
