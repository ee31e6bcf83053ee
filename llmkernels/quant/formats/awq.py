"""AWQ, Lin et al. 2023, https://arxiv.org/abs/2306.00978, as AutoAWQ writes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmkernels.quant.formats.words import Shapes, Tensors, fields, groups_of, integers, scheme_of
from llmkernels.quant.scheme import Scheme
from llmkernels.quant.weight import QuantizedWeight

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble k of a word holds column AWQ_ORDER[k] of its eight


@dataclass(frozen=True)
class Awq:
    """qweight int32 [in, out/8], qzeros int32 [groups, out/8], scales [groups, out]; nibbles in AWQ_ORDER.

    https://github.com/casper-hansen/AutoAWQ, version gemm.
    """

    kind: Scheme
    group_size: int
    dense: tuple[str, ...]

    def scheme(self, layer: str) -> Scheme | None:
        return None if any(name in layer for name in self.dense) else self.kind

    def tensors(self, layer: str, rows: int, columns: int) -> Shapes:
        groups = groups_of(self.group_size, columns)
        return {"qweight": (columns, -(-rows // 8)), "qzeros": (groups, -(-rows // 8)), "scales": (groups, rows)}

    def weight(self, layer: str, stored: Tensors, columns: int) -> QuantizedWeight:
        rows = stored["scales"].shape[1]
        codes, zeros = (awq_fields(stored[name])[:, :rows].T for name in ("qweight", "qzeros"))
        return integers(codes, stored["scales"].T, zeros, self.kind, columns)


def awq(config: Mapping[str, Any]) -> Awq:
    bits, group = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size", 128))
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    if bits != 4 or version != "gemm" or not config.get("zero_point", True):
        raise ValueError(
            f"AWQ with bits={bits}, version={version!r}, zero_point={config.get('zero_point', True)} cannot be read; "
            "the readable kind has 4 bits, version 'gemm' and zero points"
        )
    return Awq(
        scheme_of("int4", group, symmetric=False), group, (*(config.get("modules_to_not_convert") or ()), "lm_head")
    )


def awq_fields(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, words] -> uint8 [n, words * 8], in the order of columns."""
    nibbles = fields(words, 4).unflatten(1, (-1, 8))
    columns = torch.empty_like(nibbles)
    columns[..., list(AWQ_ORDER)] = nibbles
    return columns.flatten(1)
