"""Stored codes as bfloat16 without an instruction that rounds, as AMD's chips get them: every code, in the interpreter.

The interpreter keeps bfloat16 as its bits, which is all that these functions move.  test_triton_products.py runs this.
"""

import torch
import triton
import triton.language as tl
from llmkernels.backends.triton._bytes import E4M3_BITS, E5M2_BITS, INT8_BITS, decoded
from llmkernels.backends.triton._codes import bytes_, nibbles


@triton.jit
def unpack(codes, zeros, out, HOW: tl.constexpr, KIND: tl.constexpr, ZEROS: tl.constexpr):
    at = tl.arange(0, 256)
    stored, zero = tl.load(codes + at), tl.load(zeros + at)
    if HOW == "nibbles":
        found = nibbles(stored, zero, ZEROS, KIND, tl.bfloat16)
    elif HOW == "bytes":
        found = bytes_(stored, zero, ZEROS, KIND, tl.bfloat16, False)
    else:
        found = decoded(stored, tl.bfloat16, KIND)
    tl.store(out + at, found.to(tl.int16, bitcast=True))


codes = torch.arange(256).to(torch.uint8)
zeros = (torch.arange(256) % 13).to(torch.int8)
signed, low = codes.view(torch.int8), (codes & 15).float()
e2m1 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12])  # doubled
for how, kind, with_zeros, stored, want in (
    ("nibbles", "int4", False, codes, low - 8),
    ("nibbles", "int4", True, codes, low - zeros),
    ("nibbles", "mxfp4", False, codes, e2m1[low.long()]),
    ("bytes", "int8", False, signed, signed.float()),
    ("bytes", "int8", True, signed, signed.float() - zeros),
    ("decoded", INT8_BITS.value, False, signed, signed.float()),
    ("decoded", E4M3_BITS.value, False, codes, codes.view(torch.float8_e4m3fn).float()),
    ("decoded", E5M2_BITS.value, False, codes, codes.view(torch.float8_e5m2).float()),
):
    out = torch.zeros(256, dtype=torch.int16)
    unpack[(1,)](stored, zeros, out, how, kind, with_zeros)
    got = out.view(torch.bfloat16)
    same = (out == want.bfloat16().view(torch.int16)) | (got.isnan() & want.isnan())
    assert same.all(), (how, kind, with_zeros, stored[~same][:8], got[~same][:8], want[~same][:8])
