"""Triton's products beyond the conformance cases, in the interpreter, in a process of its own: Triton decides once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BEFORE = """
import torch
from llmkernels.quant import quantize
from llmkernels.backends.triton import _linear, _tiles, lora_gemm, norm_linear_activation, quantized_gemm

PLAIN = {"norm_weight": None, "norm_bias": None, "residual": None, "bias": None, "eps": 1e-6, "return_residual": False}

def weight(name, features=70, columns=328):
    torch.manual_seed(0)
    dense = torch.randn(features, columns) / columns**0.5
    order = torch.randperm(columns) if "actorder" in name else None
    return quantize(dense, name, permutation=order, input_scale=torch.tensor([0.03]) if "static" in name else None)

def near(got, want, dtype=torch.float32):
    allowed = (16 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2) * want.abs().max()
    assert (got.double() - want).abs().max() <= allowed, ((got.double() - want).abs().max(), allowed)
"""


def interpreted(program):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]


def test_any_number_of_programs_may_share_the_columns():
    interpreted("""
for rows in (3, 20):
    for scheme in ("w4a16_g128", "w8a8", "fp8_block"):
        w, x = weight(scheme), torch.randn(rows, 328)
        answers = []
        for split in (1, 2, 4, 8):
            few, many = _tiles.tiles_few, _tiles.tiles
            _linear.tiles_few = lambda *a: few(*a) | {"SPLIT": split, "WIDE": 64, "SLICES": 2}
            _linear.tiles = lambda *a: many(*a) | {"SPLIT": split, "BLOCK_K": 64}
            answers.append(quantized_gemm.run(x, w, bias=None).double())
        for answer in answers[1:]:
            near(answer, answers[0])
""")


def test_rows_around_the_sizes_of_tiles():
    interpreted("""
dense = torch.randn(70, 72)
for rows in (15, 16, 17, 31, 32, 33, 65):
    x = torch.randn(rows, 72)
    got = norm_linear_activation.run(x, dense, norm="none", activation="none", **PLAIN)
    near(got, x.double() @ dense.double().T)
""")


def test_a_weight_unpacked_once_multiplies_like_one_unpacked_in_every_tile():
    interpreted("""
from llmkernels.quant import SCHEMES
_linear.LEAST_COLUMNS = 0
for name in SCHEMES:
    w, x = weight(name), torch.randn(17, 328)
    _linear.MANY = 1
    unpacked = quantized_gemm.run(x, w, bias=None).double()
    _linear.MANY = 1 << 30
    near(quantized_gemm.run(x, w, bias=None), unpacked)
""")


def test_a_nan_among_fp8_codes_makes_its_output_nan():
    interpreted("""
for rows in (2, 20):
    w = weight("fp8_row_a16", 5, 40)
    w.values.view(torch.uint8)[3, 7] = 0x7F
    y = quantized_gemm.run(torch.ones(rows, 40), w, bias=None)
    assert y.isnan().tolist() == [[False, False, False, True, False]] * rows
""")


def test_small_and_large_scales_in_one_row_of_float16():
    """What is unpacked for many rows is divided by the row's largest scale: float16 ends at 65504 and 6e-8."""
    interpreted("""
w = weight("w4a16_g32", 64, 256)
w.scales[0] *= 1e6
w.scales[1] *= 1e-7
x = (torch.randn(20, 256) * 1e-3).half()
want = x.double() @ w.dequantize(torch.float64).T
got = quantized_gemm.run(x, w, bias=None).double()
for feature in range(64):
    if feature != 1:
        assert (got[:, feature] - want[:, feature]).abs().max() < 2**-9 * want[:, feature].abs().max(), feature
""")


def test_a_weight_is_described_once_and_not_copied():
    interpreted("""
w, x = weight("w4a16_g128", 128, 256), torch.randn(2, 256)
quantized_gemm.run(x, w, bias=None)
form = w.packed["triton"]
assert form.values.data_ptr() == w.values.data_ptr() and form.scales.data_ptr() == w.scales.data_ptr()
norm_linear_activation.run(x, w, norm="rms", activation="swiglu", **PLAIN)
assert w.packed["triton"] is form
""")


def test_integer_sums_that_int32_cannot_hold_are_refused():
    interpreted("""
from llmkernels.quant import QuantizedWeight
values = torch.ones(1, 1, dtype=torch.int8).expand(1, 2**17)
w = QuantizedWeight(values, torch.ones(1, 1), None, None, "w8a8")
(refusal,) = quantized_gemm.refuse(torch.zeros(1, 2**17), w, bias=None)
assert refusal[0] == "SHAPE" and "131072" in refusal[1]
""")


def test_schemes_beside_those_of_the_cases():
    interpreted("""
from llmkernels.registry import get
reference = get("quantized_gemm").contract.reference
for name in ("fp8_block_a16", "fp8_tensor_a16", "w8a8_zp", "w8a8_g64_zp", "w4a8_zp", "w8a8_actorder",
             "w4a8_g32_zp_actorder", "w8a16_g64_zp_actorder", "w4a8_static"):
    w = weight(name, 150, 300)
    for rows in (3, 20):
        x = torch.randn(rows, 300)
        want = reference(x.double(), w)
        assert (quantized_gemm.run(x, w, bias=None) - want).abs().max() < 1e-4 * want.abs().max(), (name, rows)
""")


def test_codes_become_bfloat16_without_a_rounding_instruction():
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_codes.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stdout + done.stderr[-2000:]
