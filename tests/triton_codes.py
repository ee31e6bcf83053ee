"""Every stored code becomes the number it stands for: triton_products.py checks it in the interpreter, which keeps
bfloat16 as its bits, all that `decoded`, `nibbles` and `bytes_` move; triton_gpu.py on a GPU, words and attention.
"""

import torch
import triton
import triton.language as tl
from llmkernels.backends.triton._bytes import E4M3, E4M3_BITS, E5M2_BITS, INT8, INT8_BITS, decoded, halves
from llmkernels.backends.triton._codes import bytes_, nibbles

import llmkernels
from llmkernels import use

CACHES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
WORDS = {INT8.value: torch.int8, E4M3_BITS.value: torch.float8_e4m3fn, E5M2_BITS.value: torch.float8_e5m2}
CODES = torch.arange(256).to(torch.uint8)


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


@triton.jit
def halve(words, low, high, KIND: tl.constexpr, PTX: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    low_half, high_half = halves(tl.load(words + at), KIND, PTX)
    tl.store(low + at, low_half)
    tl.store(high + at, high_half)


def codes_become_bfloat16():
    """Without an instruction that rounds, as AMD's chips get them."""
    zeros = (torch.arange(256) % 13).to(torch.int8)
    signed, low = CODES.view(torch.int8), (CODES & 15).float()
    e2m1 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12])  # doubled
    for how, kind, with_zeros, stored, want in (
        ("nibbles", "int4", False, CODES, low - 8),
        ("nibbles", "int4", True, CODES, low - zeros),
        ("nibbles", "mxfp4", False, CODES, e2m1[low.long()]),
        ("bytes", "int8", False, signed, signed.float()),
        ("bytes", "int8", True, signed, signed.float() - zeros),
        ("decoded", INT8_BITS.value, False, signed, signed.float()),
        ("decoded", E4M3_BITS.value, False, CODES, CODES.view(torch.float8_e4m3fn).float()),
        ("decoded", E5M2_BITS.value, False, CODES, CODES.view(torch.float8_e5m2).float()),
    ):
        out = torch.zeros(256, dtype=torch.int16)
        unpack[(1,)](stored, zeros, out, how, kind, with_zeros)
        assert_same(out.view(torch.bfloat16), want.bfloat16(), (how, kind, with_zeros))


def words_become_float16(device, ptx=False, converts=False):
    """All 65536 words.  ptx: by the code for NVIDIA; converts: the chip turns e4m3 itself."""
    for kind, dtype in (WORDS | ({E4M3.value: torch.float8_e4m3fn} if converts else {})).items():
        words = torch.arange(-(2**15), 2**15).to(torch.int16)
        low, high = (torch.zeros(2**16, dtype=torch.float16, device=device) for _ in range(2))
        halve[(64,)](words.to(device), low, high, kind, ptx)
        want = words.view(dtype).half().view(-1, 2)
        assert_same(low.cpu() + 0, want[:, 0] + 0, ("low", kind, ptx))  # no sum that they are for knows a -0
        assert_same(high.cpu() + 0, want[:, 1] + 0, ("high", kind, ptx))


def attention_reads_codes(device, dtype, cache, step=1):
    """One key a sequence: out is its value, which has all codes, and lse its score, of every `step`th code."""
    codes = CODES[::step]
    values = CODES.view(cache).expand(len(codes), 256)[None, None].contiguous()
    integers = {"block_table": [[0]], "seq_lens": [1], "cu_seqlens_q": [0, 1]}
    call = {name: torch.tensor(value, dtype=torch.int32, device=device) for name, value in integers.items()}
    size = 2.0**-20  # float16 has such numbers only as subnormals
    for channel in (6, 9):
        keys = torch.zeros(1, 1, len(codes), 32, dtype=torch.uint8)
        keys[..., channel] = codes
        q = torch.zeros(1, len(codes), 32, dtype=dtype)
        q[..., channel] = size
        with use("triton", policy="strict"):
            out, lse = llmkernels.paged_attention(
                q.to(device), keys.view(cache).to(device), values.to(device), scale=1.0, return_lse=True, **call
            )
        score = codes.view(cache).float() * size
        fits = score.isfinite()
        assert torch.allclose(lse[0].cpu()[fits], score[fits], rtol=1e-6, atol=0), (dtype, cache, channel)
        assert lse[0].cpu()[score.isnan()].isnan().all(), (dtype, cache, channel)
        assert_same(out[0, 0].cpu() + 0, CODES.view(cache).to(dtype) + 0, (dtype, cache))  # sums know no -0


def assert_same(got, want, what):
    same = (got == want) & (got.signbit() == want.signbit()) | (got.isnan() & want.isnan())
    assert same.all(), (what, (~same).nonzero()[:8, 0], got[~same][:8], want[~same][:8])
