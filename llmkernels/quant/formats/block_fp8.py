"""FP8 weights with a scale for 128 x 128 of them, as DeepSeek-V3 is published: https://arxiv.org/abs/2412.19437."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkernels.quant.formats.words import Shapes, Tensors
from llmkernels.quant.scheme import BLOCK, Scheme
from llmkernels.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class BlockFp8:
    """weight e4m3 [out, in], weight_scale_inv float32 [out/128, in/128], by which it is multiplied.  DeepSeek-V3."""

    dense: tuple[str, ...]

    def scheme(self, layer: str) -> Scheme | None:
        if any(name in layer for name in self.dense):
            return None
        return Scheme("fp8", "block", BLOCK, activation="fp8")

    def tensors(self, layer: str, rows: int, columns: int) -> Shapes:
        return {"weight": (rows, columns), "weight_scale_inv": (-(-rows // BLOCK), -(-columns // BLOCK))}

    def weight(self, layer: str, stored: Tensors, columns: int) -> QuantizedWeight:
        scale = stored["weight_scale_inv"].float()
        return QuantizedWeight(stored["weight"], scale, None, None, Scheme("fp8", "block", BLOCK, activation="fp8"))


def block_fp8(config: Mapping[str, Any]) -> BlockFp8:
    block, how = config.get("weight_block_size"), config.get("activation_scheme", "dynamic")
    if list(block or ()) != [BLOCK, BLOCK] or how != "dynamic":
        raise ValueError(
            f"fp8 with weight_block_size={block}, activation_scheme={how!r} cannot be read; the readable kind has "
            f"blocks of [{BLOCK}, {BLOCK}] and activation_scheme 'dynamic'"
        )
    return BlockFp8((*(config.get("modules_to_not_convert") or ()), "lm_head"))
