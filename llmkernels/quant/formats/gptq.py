"""GPTQ, Frantar et al. 2022, https://arxiv.org/abs/2210.17323, as AutoGPTQ and GPTQModel write it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmkernels.quant.formats.words import Shapes, Tensors, fields, groups_of, in_groups, integers, scheme_of
from llmkernels.quant.scheme import Scheme
from llmkernels.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class Gptq:
    """qweight int32 [in/8, out], codes of a column from the lowest bits up; qzeros int32 [groups, out/8]; scales
    [groups, out]; g_idx int32 [in], the group of each feature.  With 8 bits a word holds four codes.

    https://github.com/ModelCloud/GPTQModel: format gptq stores a zero point less one, gptq_v2 as it is.
    """

    kind: Scheme
    bits: int
    group_size: int
    offset: int
    head: bool

    def scheme(self, layer: str) -> Scheme | None:
        return self.kind if self.head or not layer.endswith("lm_head") else None

    def tensors(self, layer: str, rows: int, columns: int) -> Shapes:
        per_word, groups = 32 // self.bits, groups_of(self.group_size, columns)
        shapes: Shapes = {"qweight": (-(-columns // per_word), rows), "qzeros": (groups, -(-rows // per_word))}
        return shapes | {"scales": (groups, rows), "g_idx": (columns,)}

    def weight(self, layer: str, stored: Tensors, columns: int) -> QuantizedWeight:
        codes = fields(stored["qweight"].T, self.bits)[:, :columns]
        rows, size = codes.shape[0], self.group_size if self.group_size > 0 else columns
        order = in_groups(layer, "g_idx", stored["g_idx"], size, ordered=not self.kind.act_order)
        permutation = order if self.kind.act_order else None
        if permutation is not None:
            codes = codes[:, permutation]
        zeros = ((fields(stored["qzeros"], self.bits)[:, :rows].int() + self.offset) & (2**self.bits - 1)).T
        if self.kind.symmetric and not bool((zeros == 2 ** (self.bits - 1)).all()):
            raise ValueError(
                f"{layer}.qzeros are not all in the middle, though quantization_config says sym; set sym to false"
            )
        return integers(codes, stored["scales"].T, zeros, self.kind, columns, permutation)


def gptq(config: Mapping[str, Any]) -> Gptq:
    bits, group = config.get("bits"), config.get("group_size", 128)
    written = config.get("checkpoint_format") or config.get("format") or "gptq"
    if written not in ("gptq", "gptq_v2"):
        raise ValueError(f"checkpoint_format of GPTQ is {written!r}; the readable ones are gptq and gptq_v2")
    if bits not in (4, 8):
        raise ValueError(f"GPTQ with bits={bits} cannot be read; QuantizedWeight holds 4 and 8")
    if config.get("dynamic"):
        raise ValueError("GPTQ with another quantization for some modules (dynamic) cannot be read; quantize all alike")
    kind = scheme_of(
        f"int{bits}", group, symmetric=bool(config.get("sym", True)), act_order=bool(config.get("desc_act"))
    )
    return Gptq(kind, bits, group, int(written == "gptq"), bool(config.get("lm_head")))
