"""Triton's products beyond the conformance cases, and its codes, in the interpreter.

    TRITON_INTERPRET=1 python tests/triton_products.py      one JSON object: check -> what failed, null where nothing

test_triton_products.py runs this in a process of its own, because Triton decides when it is imported whether it
interprets.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
import triton_codes
from llmkernels.backends.triton import _linear, _tiles, norm_linear_activation, paged_attention, quantized_gemm
from triton_cases import BYTES

from llmkernels.bench.subject import Subject
from llmkernels.inputs import inputs
from llmkernels.quant import SCHEMES, QuantizedWeight, quantize
from llmkernels.registry import get

PLAIN = {"norm_weight": None, "norm_bias": None, "residual": None, "bias": None, "eps": 1e-6, "return_residual": False}


def any_number_of_programs_may_share_the_columns():
    few, many = _tiles.tiles_few, _tiles.tiles
    for rows in (3, 20):
        for scheme in ("w4a16_g128", "w8a8", "fp8_block"):
            w, x = weight(scheme), torch.randn(rows, 328)
            answers = []
            for split in (1, 2, 4, 8):
                with mock.patch.multiple(
                    _linear,
                    tiles_few=lambda *a, split=split: few(*a) | {"SPLIT": split, "WIDE": 64, "SLICES": 2},
                    tiles=lambda *a, split=split: many(*a) | {"SPLIT": split, "BLOCK_K": 64},
                ):
                    answers.append(quantized_gemm.run(x, w, bias=None).double())
            for answer in answers[1:]:
                near(answer, answers[0])


def rows_around_the_sizes_of_tiles():
    dense = torch.randn(70, 72)
    for rows in (15, 16, 17, 31, 32, 33, 65):
        x = torch.randn(rows, 72)
        got = norm_linear_activation.run(x, dense, norm="none", activation="none", **PLAIN)
        near(got, x.double() @ dense.double().T)


def a_weight_unpacked_once_multiplies_like_one_unpacked_in_every_tile():
    for name in SCHEMES:
        w, x = weight(name), torch.randn(17, 328)
        with mock.patch.multiple(_linear, LEAST_COLUMNS=0, MANY=1):
            unpacked = quantized_gemm.run(x, w, bias=None).double()
        with mock.patch.multiple(_linear, LEAST_COLUMNS=0, MANY=1 << 30):
            near(quantized_gemm.run(x, w, bias=None), unpacked)


def a_nan_among_fp8_codes_makes_its_output_nan():
    for rows in (2, 20):
        w = weight("fp8_row_a16", 5, 40)
        w.values.view(torch.uint8)[3, 7] = 0x7F
        y = quantized_gemm.run(torch.ones(rows, 40), w, bias=None)
        assert y.isnan().tolist() == [[False, False, False, True, False]] * rows


def small_and_large_scales_in_one_row_of_float16():
    """What is unpacked for many rows is divided by the row's largest scale: float16 ends at 65504 and 6e-8."""
    w = weight("w4a16_g32", 64, 256)
    w.scales[0] *= 1e6
    w.scales[1] *= 1e-7
    x = (torch.randn(20, 256) * 1e-3).half()
    want = x.double() @ w.dequantize(torch.float64).T
    got = quantized_gemm.run(x, w, bias=None).double()
    for feature in range(64):
        if feature != 1:
            assert (got[:, feature] - want[:, feature]).abs().max() < 2**-9 * want[:, feature].abs().max(), feature


def a_weight_is_described_once_and_not_copied():
    w, x = weight("w4a16_g128", 128, 256), torch.randn(2, 256)
    quantized_gemm.run(x, w, bias=None)
    form = w.packed["triton"]
    assert form.values.data_ptr() == w.values.data_ptr()
    assert form.scales.data_ptr() == w.scales.data_ptr()
    norm_linear_activation.run(x, w, norm="rms", activation="swiglu", **PLAIN)
    assert w.packed["triton"] is form


def integer_sums_that_int32_cannot_hold_are_refused():
    values = torch.ones(1, 1, dtype=torch.int8).expand(1, 2**17)
    w = QuantizedWeight(values, torch.ones(1, 1), None, None, "w8a8")
    (refusal,) = quantized_gemm.refuse(torch.zeros(1, 2**17), w, bias=None)
    assert refusal[0] == "SHAPE"
    assert "131072" in refusal[1]


def schemes_beside_those_of_the_cases():
    reference = get("quantized_gemm").contract.reference
    for name in ("fp8_block_a16", "fp8_tensor_a16", "w8a8_zp", "w8a8_g64_zp", "w4a8_zp", "w8a8_actorder",
                 "w4a8_g32_zp_actorder", "w8a16_g64_zp_actorder", "w4a8_static"):  # fmt: skip
        w = weight(name, 150, 300)
        for rows in (3, 20):
            x = torch.randn(rows, 300)
            want = reference(x.double(), w)
            assert (quantized_gemm.run(x, w, bias=None) - want).abs().max() < 1e-4 * want.abs().max(), (name, rows)


def codes_become_bfloat16_without_a_rounding_instruction():
    triton_codes.codes_become_bfloat16()


def words_of_two_codes_become_float16():
    triton_codes.words_become_float16("cpu")


def attention_reads_codes_as_the_numbers_they_stand_for():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for cache in triton_codes.CACHES:
            triton_codes.attention_reads_codes("cpu", dtype, cache, step=51)


def attention_over_bytes_whose_channels_are_no_power_of_two():
    contract = get("paged_attention").contract
    for case in BYTES:
        for dtype in ("float16", "bfloat16"):
            subject = Subject(contract, case.name, dtype, inputs(contract, case, dtype, "cpu"))
            wrong, _, _ = subject.judge(subject.answers(paged_attention.run, subject.copy()))
            assert not wrong, f"{case.name} {dtype}: {wrong}"


CHECKS = [
    any_number_of_programs_may_share_the_columns,
    rows_around_the_sizes_of_tiles,
    a_weight_unpacked_once_multiplies_like_one_unpacked_in_every_tile,
    a_nan_among_fp8_codes_makes_its_output_nan,
    small_and_large_scales_in_one_row_of_float16,
    a_weight_is_described_once_and_not_copied,
    integer_sums_that_int32_cannot_hold_are_refused,
    schemes_beside_those_of_the_cases,
    codes_become_bfloat16_without_a_rounding_instruction,
    words_of_two_codes_become_float16,
    attention_reads_codes_as_the_numbers_they_stand_for,
    attention_over_bytes_whose_channels_are_no_power_of_two,
]


def weight(name, features=70, columns=328):
    torch.manual_seed(0)
    dense = torch.randn(features, columns) / columns**0.5
    order = torch.randperm(columns) if "actorder" in name else None
    return quantize(dense, name, permutation=order, input_scale=torch.tensor([0.03]) if "static" in name else None)


def near(got, want):
    allowed = 17 * torch.finfo(torch.float32).eps * want.abs().max()
    assert (got.double() - want).abs().max() <= allowed, ((got.double() - want).abs().max(), allowed)


if __name__ == "__main__":
    with ThreadPoolExecutor(1) as pool:  # every check is made, and each failure told
        errors = {check.__name__: pool.submit(check).exception() for check in CHECKS}
    print(json.dumps({name: error and repr(error) for name, error in errors.items()}))
