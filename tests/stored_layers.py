"""Quantized layers exactly as other tools write them: every format that llmkernels.quant.formats reads.

Nothing here is shared with the readers: values are drawn, laid out as the format's makers document it, and the dense
weight that they stand for follows from the format's own formula.
"""

import json

import torch
from safetensors.torch import save_file

GROUP = 32
INPUT_SCALE = 0.03  # of static activations


def words(codes, bits, dim):
    """Unsigned codes packed along `dim` into int32, the first in the lowest bits."""
    rows = codes.long().movedim(dim, -1).unflatten(-1, (-1, 32 // bits))
    packed = (rows << (bits * torch.arange(32 // bits))).sum(-1)
    return (packed - (packed >= 2**31) * 2**32).int().movedim(-1, dim).contiguous()


def gptq(draw, rows, columns, order, *, bits=4, group=GROUP, act_order=False, symmetric=True, less=1):
    size, middle = group if group > 0 else columns, 2 ** (bits - 1)
    groups = -(-columns // size)
    codes = torch.randint(0, 2**bits, (columns, rows), generator=draw)
    zeros = torch.randint(0, 2**bits, (groups, rows), generator=draw)
    zeros = torch.full_like(zeros, middle) if symmetric else zeros
    scales = scale(draw, (groups, rows), bits).half()
    g_idx = torch.arange(columns) // size
    g_idx = g_idx[order] if act_order else g_idx
    dense = scales.float()[g_idx] * (codes - zeros[g_idx])
    stored = {
        "qweight": words(codes, bits, 0),
        "qzeros": words((zeros - less) % 2**bits, bits, 1),
        "scales": scales,
        "g_idx": g_idx.int(),
    }
    return stored, dense.T


def awq(draw, rows, columns, order):
    groups, position = columns // GROUP, [0, 2, 4, 6, 1, 3, 5, 7]
    codes = torch.randint(0, 16, (columns, rows), generator=draw)
    zeros = torch.randint(0, 16, (groups, rows), generator=draw)
    scales = scale(draw, (groups, rows), 4).half()
    dense = (scales.float().repeat_interleave(GROUP, 0) * (codes - zeros.repeat_interleave(GROUP, 0))).T

    def packed(values):
        return words(values.unflatten(1, (-1, 8))[..., position].flatten(1), 4, 1)

    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, dense


def packed(draw, rows, columns, order, *, bits=4, group=GROUP, symmetric=True, act_order=False):
    size, middle = group if group > 0 else columns, 2 ** (bits - 1)
    groups = columns // size
    values = torch.randint(-middle, middle, (rows, columns), generator=draw)
    zeros = torch.zeros(rows, groups, dtype=torch.long)
    stored = {"weight_packed": words(values + middle, bits, 1), "weight_shape": torch.tensor([rows, columns])}
    stored["weight_scale"] = scale(draw, (rows, groups), bits).bfloat16()
    if not symmetric:
        zeros = torch.randint(-middle, middle, (rows, groups), generator=draw)
        stored["weight_zero_point"] = words(zeros + middle, bits, 0)
    g_idx = torch.arange(columns) // size
    if act_order:
        g_idx = g_idx[order]
        stored["weight_g_idx"] = g_idx.int()
    return stored, stored["weight_scale"].float()[:, g_idx] * (values - zeros[:, g_idx])


def eight(draw, rows, columns, order, *, kind="int", by="channel", static=False):
    shape = {"channel": (rows, 1), "tensor": (1,), "block": (-(-rows // 128), -(-columns // 128))}[by]
    if kind == "int":
        values = torch.randint(-128, 128, (rows, columns), generator=draw).to(torch.int8)
    else:
        values = (100 * torch.randn(rows, columns, generator=draw)).to(torch.float8_e4m3fn)
    scales = scale(draw, shape, 8)
    spread = scales.expand(rows, 1) if by == "channel" else scales
    if by == "block":
        spread = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    stored = {"weight": values, "weight_scale": scales} | (
        {"input_scale": torch.tensor([INPUT_SCALE])} if static else {}
    )
    return stored, values.float() * spread


def mxfp4(draw, rows, columns, order):
    codes = torch.randint(0, 16, (rows, columns), generator=draw)
    exponents = torch.randint(118, 124, (rows, columns // 32), generator=draw)
    number = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).byte()
    dense = number[codes] * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    return {"weight_packed": packed, "weight_scale": exponents.byte()}, dense


def block_fp8(draw, rows, columns, order):
    stored, dense = eight(draw, rows, columns, order, kind="float", by="block")
    return {"weight": stored["weight"], "weight_scale_inv": stored["weight_scale"]}, dense


def scale(draw, shape, bits):
    return (0.5 + torch.rand(shape, generator=draw)) * 0.1 / 2 ** (bits - 1)


def of_gptq(**more):
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True} | more


def of_compressed(form, weights, inputs=None):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*skipped.*"],
    }


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
BLOCKS = {"strategy": "block", "block_structure": [128, 128]}


def token(kind):
    return {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True, "strategy": "token"}


def per(how, kind, dynamic):
    return {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": dynamic, "strategy": how}


# name -> (scheme, quantization_config, how to draw a layer)
FORMATS = {
    "GPTQ": ("w4a16_g32", of_gptq(), gptq),
    "GPTQ act-order": (
        "w4a16_g32_actorder",
        of_gptq(desc_act=True, checkpoint_format="gptq"),
        lambda *a: gptq(*a, act_order=True),
    ),
    "GPTQ v2 with zero points": (
        "w4a16_g32_zp",
        of_gptq(sym=False, checkpoint_format="gptq_v2"),
        lambda *a: gptq(*a, symmetric=False, less=0),
    ),
    "GPTQ with zero points": ("w4a16_g32_zp", of_gptq(sym=False), lambda *a: gptq(*a, symmetric=False)),
    "GPTQ 8 bits": ("w8a16_g32", of_gptq(bits=8), lambda *a: gptq(*a, bits=8)),
    "GPTQ 8 bits with zero points": (
        "w8a16_g32_zp",
        of_gptq(bits=8, sym=False),
        lambda *a: gptq(*a, bits=8, symmetric=False),
    ),
    "GPTQ a scale a row": ("w4a16", of_gptq(group_size=-1), lambda *a: gptq(*a, group=-1)),
    "AWQ": (
        "w4a16_g32_zp",
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        awq,
    ),
    "packed": ("w4a16_g32", of_compressed("pack-quantized", INT4), packed),
    "packed with zero points": (
        "w4a16_g32_zp",
        of_compressed("pack-quantized", INT4 | {"symmetric": False}),
        lambda *a: packed(*a, symmetric=False),
    ),
    "packed act-order": (
        "w4a16_g32_actorder",
        of_compressed("pack-quantized", INT4 | {"actorder": "group"}),
        lambda *a: packed(*a, act_order=True),
    ),
    "packed 8 bits": (
        "w8a16",
        of_compressed("pack-quantized", INT8),
        lambda *a: packed(*a, bits=8, group=-1),
    ),
    "packed 4 bits, int8 activations": ("w4a8_g32", of_compressed("pack-quantized", INT4, token("int")), packed),
    "W8A8": ("w8a8", of_compressed("int-quantized", INT8, token("int")), eight),
    "W8A8 static": (
        "w8a8_static",
        of_compressed("int-quantized", INT8 | {"strategy": "tensor"}, per("tensor", "int", False)),
        lambda *a: eight(*a, by="tensor", static=True),
    ),
    "FP8 dynamic": (
        "fp8_row",
        of_compressed("float-quantized", FP8, token("float")),
        lambda *a: eight(*a, kind="float"),
    ),
    "FP8 static": (
        "fp8_tensor_static",
        of_compressed("float-quantized", FP8 | {"strategy": "tensor"}, per("tensor", "float", False)),
        lambda *a: eight(*a, kind="float", by="tensor", static=True),
    ),
    "FP8 weights only": (
        "fp8_row_a16",
        of_compressed("float-quantized", FP8),
        lambda *a: eight(*a, kind="float"),
    ),
    "FP8 blocks": (
        "fp8_block",
        of_compressed("float-quantized", FP8 | BLOCKS, per("group", "float", True)),
        lambda *a: eight(*a, kind="float", by="block"),
    ),
    "MXFP4": (
        "mxfp4",
        of_compressed("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
        mxfp4,
    ),
    "DeepSeek FP8": (
        "fp8_block",
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        block_fp8,
    ),
}


def layer(name, rows, columns, seed=0):
    """(tensors as stored, dense weight [rows, columns]); act-order is the same for all layers of one input size."""
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    stored, dense = FORMATS[name][2](torch.Generator().manual_seed(seed), rows, columns, order)
    return stored, dense.float().contiguous()


def checkpoint(folder, name, model):
    """Save a transformers model with its layers' projections in format `name`, and put into it what they stand for."""
    tensors = {}
    for at, (path, module) in enumerate(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            stored, dense = layer(name, *module.weight.shape, seed=at)
            with torch.no_grad():
                module.weight.copy_(dense)
            tensors |= {f"{path}.{part}": tensor for part, tensor in stored.items()}
            if module.bias is not None:
                tensors[f"{path}.bias"] = module.bias.detach()
    dense = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    tensors |= {key: t for key, t in model.state_dict().items() if key not in dense and key not in tensors}
    tensors["lm_head.weight"] = model.lm_head.weight.detach()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    raw = (folder / "config.json").read_text().rstrip()
    config = json.dumps(FORMATS[name][1])
    (folder / "config.json").write_text(f'{raw[:-1].rstrip()}, "quantization_config": {config}}}')
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
