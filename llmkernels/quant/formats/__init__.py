"""Checkpoint formats: what a quantized layer looks like on disk, and how it becomes a QuantizedWeight.

    stored = formats.read(config["quantization_config"])
    if stored.scheme("model.layers.0.self_attn.q_proj"):                # None: this layer is dense
        shapes = stored.tensors(layer, out_features, in_features)       # the tensors that lie behind layer + "."
        weight = stored.weight(layer, {name: file[f"{layer}.{name}"] for name in shapes}, in_features)

Read are GPTQ (checkpoint formats gptq and gptq_v2, as AutoGPTQ and GPTQModel write them), AWQ (version gemm, AutoAWQ),
compressed-tensors (pack-, int-, float- and mxfp4-pack-quantized, LLM Compressor) and fp8 with blocks (DeepSeek-V3).
Values are kept, never rounded again.  Scales of KV caches in a checkpoint (k_scale, v_scale) are not read here: how a
cache is stored is the engine's choice.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from llmkernels.quant.formats.awq import awq
from llmkernels.quant.formats.block_fp8 import block_fp8
from llmkernels.quant.formats.compressed_tensors import CompressedTensors
from llmkernels.quant.formats.gptq import gptq
from llmkernels.quant.formats.words import Shapes, Tensors
from llmkernels.quant.scheme import Scheme
from llmkernels.quant.weight import QuantizedWeight


class Format(Protocol):
    """A checkpoint's way of writing quantized layers; `layer` is a module's name without ".weight"."""

    def scheme(self, layer: str) -> Scheme | None:
        """How the layer is quantized; None where it is dense."""

    def tensors(self, layer: str, rows: int, columns: int) -> Shapes:
        """Name behind the layer's -> shape of every tensor that `weight` needs of a layer [rows, columns]."""

    def weight(self, layer: str, stored: Tensors, columns: int) -> QuantizedWeight:
        """The weight of a layer with `columns` input features."""


READERS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": CompressedTensors,
    "fp8": block_fp8,
}


def read(config: Mapping[str, Any]) -> Format:
    """The format that a checkpoint's quantization_config describes.

    Raises:
        ValueError: a format, or an option of one, that cannot be read.
    """
    method = config.get("quant_method")
    if method not in READERS:
        raise ValueError(f"quant_method is {method!r}; the readable ones are {', '.join(READERS)}")
    return READERS[method](config)
