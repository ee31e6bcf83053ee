"""Checkpoints of other tools mean in llmkernels.quant.formats what their makers say they mean."""

import pytest
import torch
from stored_layers import FORMATS, GROUP, layer, of_compressed, of_gptq

from llmkernels.quant import QuantizedWeight, formats, quantize

ROWS, COLUMNS = 64, 256


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [ROWS, 136])
def test_the_dense_weight_is_exact(name, rows):
    scheme, config, _ = FORMATS[name]
    stored, dense = layer(name, rows, COLUMNS)
    read = formats.read(config)
    assert str(read.scheme("model.layers.0.mlp.up_proj")) == scheme
    shapes = read.tensors("model.layers.0.mlp.up_proj", rows, COLUMNS)
    assert shapes == {part: tuple(stored[part].shape) for part in shapes}
    weight = read.weight("model.layers.0.mlp.up_proj", {part: stored[part] for part in shapes}, COLUMNS)
    weight.check_values()
    assert str(weight.scheme) == scheme
    assert weight.shape == (rows, COLUMNS)
    torch.testing.assert_close(weight.dequantize(), dense, rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_dense_layers_stay_dense(name):
    read = formats.read(FORMATS[name][1])
    assert read.scheme("lm_head") is None
    if FORMATS[name][1]["quant_method"] == "compressed-tensors":
        assert read.scheme("model.layers.1.skipped.q_proj") is None


def test_modules_not_to_convert():
    read = formats.read(FORMATS["AWQ"][1] | {"modules_to_not_convert": ["layers.0.mlp"]})
    assert read.scheme("model.layers.0.mlp.up_proj") is None
    assert read.scheme("model.layers.1.mlp.up_proj") is not None


def test_groups_of_modules_with_schemes_of_their_own():
    config = of_compressed("pack-quantized", FORMATS["packed"][1]["config_groups"]["group_0"]["weights"])
    eight = FORMATS["W8A8"][1]["config_groups"]["group_0"]
    down = eight | {"targets": ["re:.*down_proj"], "format": "int-quantized"}
    config["config_groups"] = {"group_0": down, "group_1": config["config_groups"]["group_0"]}
    read = formats.read(config)
    assert str(read.scheme("model.layers.0.mlp.down_proj")) == "w8a8"
    assert str(read.scheme("model.layers.0.mlp.up_proj")) == "w4a16_g32"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "exl2"}, "quant_method is 'exl2'; the readable ones are gptq, awq, compressed-tensors, fp8"),
        ({}, "quant_method is None"),
        (of_gptq(bits=3), "GPTQ with bits=3 cannot be read; QuantizedWeight holds 4 and 8"),
        (of_gptq(group_size=48), "group is 48; int4 weights with a scale a group take 32 or 64 or 128"),
        (of_gptq(checkpoint_format="marlin"), "checkpoint_format of GPTQ is 'marlin'"),
        (of_gptq(dynamic={"+:.*": {"bits": 8}}), "another quantization for some modules"),
        (FORMATS["AWQ"][1] | {"version": "gemv"}, "version='gemv'.*the readable kind has 4 bits, version 'gemm'"),
        (FORMATS["AWQ"][1] | {"zero_point": False}, "zero_point=False"),
        (FORMATS["DeepSeek FP8"][1] | {"weight_block_size": None}, "weight_block_size=None"),
        (FORMATS["packed"][1] | {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' cannot be read"),
        (FORMATS["packed"][1] | {"format": "dense"}, "format 'dense' cannot be read"),
        (FORMATS["packed"][1] | {"quantization_status": "frozen"}, "save_compressed=True"),
        (FORMATS["packed"][1] | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        (of_compressed("int-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}), "num_bits=4"),
        (
            of_compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"},
                          {"num_bits": 8, "symmetric": False, "dynamic": True, "strategy": "token"}),
            "symmetric=False.*is symmetric, and has strategy 'token'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        formats.read(config)


def test_tensors_that_contradict_the_config():
    stored, _ = layer("GPTQ act-order", ROWS, COLUMNS)
    with pytest.raises(ValueError, match=rf"up_proj\.g_idx does not give {GROUP} features to each group in order"):
        formats.read(of_gptq()).weight("up_proj", stored, COLUMNS)
    stored["g_idx"] = torch.zeros_like(stored["g_idx"])
    with pytest.raises(ValueError, match=rf"g_idx does not give {GROUP} features to each group; set act-order"):
        formats.read(of_gptq(desc_act=True)).weight("up_proj", stored, COLUMNS)
    stored, _ = layer("GPTQ with zero points", ROWS, COLUMNS)
    with pytest.raises(ValueError, match=r"up_proj\.qzeros are not all in the middle.*set sym to false"):
        formats.read(of_gptq()).weight("up_proj", stored, COLUMNS)


@pytest.mark.parametrize(
    "name", ["w4a16_g32", "w4a16_g32_zp", "w8a16", "w8a8", "fp8_row", "fp8_tensor", "fp8_block", "mxfp4"]
)
def test_concatenate(name):
    draw = torch.Generator().manual_seed(0)
    parts = [quantize(torch.randn(rows, 96, generator=draw) * rows, name) for rows in (128, 256, 40)]
    together = QuantizedWeight.concatenate(parts)
    together.check_values()
    assert torch.equal(together.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert str(together.scheme) == {"fp8_tensor": "fp8_row"}.get(name, name)
    assert together.scheme.activation == parts[0].scheme.activation


def test_concatenate_with_a_permutation_and_a_scale():
    order, draw = torch.randperm(96), torch.Generator().manual_seed(0)
    dense = [torch.randn(rows, 96, generator=draw) for rows in (8, 16)]
    for options in ({"to": "w4a16_g32_actorder", "permutation": order}, {"to": "w8a8_static", "input_scale": 0.5}):
        parts = [quantize(weight, **options) for weight in dense]
        together = QuantizedWeight.concatenate(parts)
        assert torch.equal(together.dequantize(), torch.cat([part.dequantize() for part in parts]))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (lambda w: [], "weights is empty"),
        (lambda w: [quantize(w, "w4a16_g32"), quantize(w, "w8a16")], r"weights\[1\] is w8a16 with 96 columns"),
        (lambda w: [quantize(w, "w8a16"), quantize(w[:, :64], "w8a16")], r"weights\[1\] is w8a16 with 64 columns"),
        (lambda w: [quantize(w, "fp8_block")] * 2, "the weights have 8, 8 rows; a block of 128 rows"),
        (
            lambda w: [quantize(w, "w8a8_static", input_scale=s) for s in (1.0, 2.0)],
            r"input_scale of weights\[1\] is not that of weights\[0\]",
        ),
    ],
)
def test_weights_that_cannot_become_one(weights, words):
    with pytest.raises(ValueError, match=words):
        QuantizedWeight.concatenate(weights(torch.randn(8, 96)))
