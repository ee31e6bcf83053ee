"""compressed-tensors, as LLM Compressor writes it: https://github.com/vllm-project/compressed-tensors."""

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from llmkernels.quant.formats.words import Shapes, Tensors, fields, groups_of, in_groups, integers, scheme_of
from llmkernels.quant.scheme import BLOCK, Scheme
from llmkernels.quant.weight import QuantizedWeight


class CompressedTensors:
    """Which layers are quantized, and how, by groups of modules; the tensors of a layer are, by format,

    pack-quantized: weight_packed int32 [out, in/8] (4 bits; in/4 with 8), code less 2^(bits - 1) is the value;
        weight_scale [out, groups]; weight_zero_point int32 [out/8, groups], packed along out; weight_shape int64 [2].
    int-quantized: weight int8 [out, in], weight_scale [out, 1] or [1].
    float-quantized: weight e4m3 [out, in], weight_scale [1], [out, 1] or [out/128, in/128]; input_scale where static.
    mxfp4-pack-quantized: weight_packed uint8 [out, in/2], weight_scale uint8 [out, in/32], as here.
    """

    def __init__(self, config: Mapping[str, Any]):
        if config.get("quantization_status", "compressed") != "compressed":
            raise ValueError(
                f"quantization_status is {config['quantization_status']!r}; only compressed weights are read: save the "
                "checkpoint with save_compressed=True"
            )
        if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise ValueError("sparse weights (sparsity_config) cannot be read; save the checkpoint dense")
        if config.get("transform_config"):
            raise ValueError("transforms at run time (transform_config) cannot be read; quantize without them")
        self.ignored = tuple(config.get("ignore") or ())
        self.groups = [
            (tuple(group.get("targets") or ()), *_compressed_scheme(group, group.get("format") or config.get("format")))
            for group in (config.get("config_groups") or {}).values()
        ]

    def _of(self, layer: str) -> tuple[Scheme, str, int] | None:
        if any(_matches(layer, pattern) for pattern in self.ignored):
            return None
        found = [rest for targets, *rest in self.groups if any(t == "Linear" or _matches(layer, t) for t in targets)]
        return tuple(found[0]) if found else None  # type: ignore[return-value]

    def scheme(self, layer: str) -> Scheme | None:
        found = self._of(layer)
        return found and found[0]

    def tensors(self, layer: str, rows: int, columns: int) -> Shapes:
        kind, written, strategy_group = self._known(layer)
        if written == "mxfp4-pack-quantized":
            return {"weight_packed": (rows, -(-columns // 2)), "weight_scale": (rows, -(-columns // 32))}
        shapes: Shapes = {}
        if written == "pack-quantized":
            per_word, groups = 8 if kind.weight == "int4" else 4, groups_of(strategy_group, columns)
            shapes = {"weight_packed": (rows, -(-columns // per_word)), "weight_scale": (rows, groups)}
            if not kind.symmetric:
                shapes["weight_zero_point"] = (-(-rows // per_word), groups)
            if kind.act_order:
                shapes["weight_g_idx"] = (columns,)
            return shapes
        scale = {
            "tensor": (1,),
            "row": (rows, 1),
            "block": (-(-rows // BLOCK), -(-columns // BLOCK)),
        }[kind.granularity]
        shapes = {"weight": (rows, columns), "weight_scale": (1,) if strategy_group == 0 else scale}
        return shapes if kind.dynamic else shapes | {"input_scale": (1,)}

    def weight(self, layer: str, stored: Tensors, columns: int) -> QuantizedWeight:
        kind, written, _ = self._known(layer)
        scale = stored["weight_scale"]
        if written == "mxfp4-pack-quantized":
            return QuantizedWeight(stored["weight_packed"], scale, None, None, kind, in_features=columns)
        if written == "pack-quantized":
            bits = int(kind.weight[-1])
            codes, rows = fields(stored["weight_packed"], bits)[:, :columns], scale.shape[0]
            zeros = None
            if not kind.symmetric:
                zeros = fields(stored["weight_zero_point"].T, bits)[:, :rows].T
            permutation = None
            if kind.act_order:
                permutation = in_groups(layer, "weight_g_idx", stored["weight_g_idx"], kind.group, ordered=False)
                codes = codes[:, permutation]
            return integers(codes, scale, zeros, kind, columns, permutation)
        rows = stored["weight"].shape[0]
        if kind.granularity == "row":
            scale = scale.reshape(-1, 1).expand(rows, 1).contiguous()
        elif kind.granularity == "tensor":
            scale = scale.reshape(1, 1)
        scale = scale.float() if kind.weight == "fp8" else scale
        given = None if kind.dynamic else stored["input_scale"].float().reshape(1)
        return QuantizedWeight(stored["weight"], scale, None, None, kind, given, columns)

    def _known(self, layer: str) -> tuple[Scheme, str, int]:
        found = self._of(layer)
        if found is None:
            raise ValueError(f"{layer} is not quantized in this checkpoint; read its weight")
        return found


def _compressed_scheme(group: Mapping[str, Any], written: str | None) -> tuple[Scheme, str, int]:
    """(scheme, format, group size or -1 for one scale a row, 0 for one a tensor) of a group of compressed-tensors."""
    readable = ("pack-quantized", "int-quantized", "float-quantized", "mxfp4-pack-quantized")
    if written not in readable:
        raise ValueError(
            f"compressed-tensors format {written!r} cannot be read; the readable ones: {', '.join(readable)}"
        )
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), str(weights.get("strategy"))
    if group.get("output_activations"):
        raise ValueError("quantized outputs (output_activations) cannot be read; quantize weights and inputs only")
    if written == "mxfp4-pack-quantized":
        if inputs:
            raise ValueError("MXFP4 with quantized activations cannot be read; MXFP4A16 can")
        return Scheme("mxfp4", "group", 32), written, 32
    allowed = ("group", "channel") if written == "pack-quantized" else ("channel", "tensor", "block")
    wanted = {"pack-quantized": ("int", (4, 8)), "int-quantized": ("int", (8,)), "float-quantized": ("float", (8,))}
    if kind != wanted[written][0] or bits not in wanted[written][1] or strategy not in allowed:
        raise ValueError(
            f"{written} with num_bits={bits}, type={kind!r}, strategy={strategy!r} cannot be read; the readable kinds "
            f"have type {wanted[written][0]!r}, {' or '.join(map(str, wanted[written][1]))} bits, and a scale for a "
            f"{' or '.join(allowed)}"
        )
    activation = None
    if inputs:
        activation = "int8" if kind == "int" else "fp8"
        by = "group" if strategy == "block" else "token" if inputs.get("dynamic") else "tensor"
        if not inputs.get("symmetric", True) or inputs.get("num_bits") != 8 or inputs.get("strategy") != by:
            raise ValueError(
                f"activations with num_bits={inputs.get('num_bits')}, symmetric={inputs.get('symmetric')}, "
                f"strategy={inputs.get('strategy')!r} cannot be read beside weights with strategy {strategy!r}; the "
                f"readable kind has 8 bits, is symmetric, and has strategy {by!r}"
            )
    dynamic = not inputs or bool(inputs.get("dynamic"))
    if kind == "float":
        granularity = {"channel": "row"}.get(strategy, strategy)
        if strategy == "block" and list(weights.get("block_structure") or ()) != [BLOCK, BLOCK]:
            raise ValueError(
                f"block_structure is {weights.get('block_structure')}; blocks of {BLOCK} x {BLOCK} are read"
            )
        block = BLOCK if strategy == "block" else 0
        return Scheme("fp8", granularity, block, activation=activation, dynamic=dynamic), written, block or -1
    size = weights.get("group_size") if strategy == "group" else -1
    found = scheme_of(
        f"int{bits}",
        size or -1,
        symmetric=bool(weights.get("symmetric", True)),
        act_order=weights.get("actorder") == "group",
        activation=activation,
        dynamic=dynamic,
    )
    return found, written, 0 if strategy == "tensor" else size or -1


def _matches(layer: str, pattern: str) -> bool:
    """compressed-tensors' names: a whole module name, a regular expression behind "re:", or a class."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), layer) is not None
    return layer == pattern or layer.endswith(f".{pattern}") or fnmatch(layer, pattern)
