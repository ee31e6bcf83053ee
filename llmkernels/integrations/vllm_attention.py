"""Attention and the KV write for vLLM, over its paged cache; see vllm.py beside this file.

vLLM keeps a layer's keys and values as one array [pages kv_heads page_size dim + v_dim] with strides of its own: on its
CPU platform that is the order in memory, on CUDA a setting.  The contract takes strided views, so both caches are
slices of it and nothing is copied.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

import llmkernels
from llmkernels.integrations.vllm import VARIABLE, mode

FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


@dataclass
class Metadata:
    """What a step's layers share, in the words of the contract.

    tokens: how many rows of the query are real; padding of CUDA graphs follows.
    block_table [seqs max_pages], seq_lens [seqs], cu_seqlens_q [seqs + 1]: int32.
    longest_new: a bound on the new tokens of a sequence.
    """

    tokens: int
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    longest_new: int
    causal: bool


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER  # unverified on CUDA, so not claimed

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        given = common_attn_metadata
        if isinstance(given.causal, torch.Tensor):
            raise NotImplementedError(f"llmkernels takes no mask that differs by sequence; unset {VARIABLE}")
        if given.mm_req_doc_ranges is not None or given.rswa_prefix_lens is not None:
            raise NotImplementedError(f"llmkernels takes no prefix-LM and no reference window masks; unset {VARIABLE}")
        return Metadata(
            tokens=given.num_actual_tokens,
            block_table=given.block_table_tensor.to(torch.int32),
            seq_lens=given.seq_lens.to(torch.int32),
            cu_seqlens_q=given.query_start_loc.to(torch.int32),
            longest_new=_round_up(given.max_query_len),
            causal=given.causal,
        )


class Attention(AttentionImpl[Metadata]):
    """One layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"llmkernels takes decoder attention, not {attn_type}; unset {VARIABLE}")
        if kv_cache_dtype not in Backend.supported_kv_cache_dtypes:
            takes = ", ".join(Backend.supported_kv_cache_dtypes)
            raise NotImplementedError(f"kv_cache_dtype is {kv_cache_dtype!r}; llmkernels takes {takes}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_size, self.scale = head_size, float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.left = -1 if sliding_window is None else sliding_window - 1  # vLLM counts the token itself
        self.soft_cap = float(logits_soft_cap or 0)
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.sinks = sinks
        self.settings = _trusting if mode() != "checked" else _checking

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Sinks were not loaded before, and may be in the dtype of the model."""
        if self.sinks is not None:
            self.sinks = self.sinks.detach().float()

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [tokens heads dim] -> output [tokens heads v_dim]; the keys and values are in the cache already."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("llmkernels does not quantize the output of attention; leave that fusion off")
        if attn_metadata is None:
            return output  # vLLM measures memory: there is no cache yet
        step = attn_metadata
        if not step.causal and self.left >= 0:
            raise NotImplementedError(f"llmkernels takes no window around a token of both sides; unset {VARIABLE}")
        k_cache, v_cache, scales = self._caches(layer, kv_cache)
        with self.settings():
            output[: step.tokens] = llmkernels.paged_attention(
                query[: step.tokens],
                k_cache,
                v_cache,
                step.block_table,
                step.seq_lens,
                step.cu_seqlens_q,
                scale=self.scale,
                causal=step.causal,
                window=(self.left, -1),
                soft_cap=self.soft_cap,
                sinks=self.sinks,
                alibi_slopes=self.alibi_slopes,
                max_seqlen_q=step.longest_new,
                max_seqlen_k=step.block_table.shape[1] * k_cache.shape[1],
                **scales,
            )
        return output

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """key, value [tokens kv_heads dim] into their slots; -1 marks padding."""
        k_cache, v_cache, scales = self._caches(layer, kv_cache)
        tokens = slot_mapping.shape[0]
        with self.settings():
            llmkernels.write_kv(key[:tokens], value[:tokens], k_cache, v_cache, slot_mapping.long(), **scales)

    def _caches(self, layer: Any, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """[pages page_size kv_heads dim] views of the keys and the values, and the scales of FP8 caches."""
        scales = {}
        if self.kv_cache_dtype in FP8:
            kv_cache = kv_cache.view(FP8[self.kv_cache_dtype])
            scales = {"k_scale": layer._k_scale.reshape(1), "v_scale": layer._v_scale.reshape(1)}
        both = kv_cache.transpose(1, 2)
        return both[..., : self.head_size], both[..., self.head_size :], scales


class Backend(AttentionBackend):
    """What vLLM asks before it makes layers."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", *FP8]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Attention]:
        return Attention

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True


def _trusting() -> AbstractContextManager:
    """vLLM's scheduler made the page ids: they are not read again in each layer."""
    return llmkernels.use(checked=False)


_checking: Callable[[], AbstractContextManager] = nullcontext


def _round_up(count: int) -> int:
    """The next power of two, so that few kinds of call occur."""
    return 1 << max(count - 1, 0).bit_length()
