"""Attention for SGLang over its pool of tokens; see sglang.py beside this file for where it ran.

SGLang keeps a layer's keys as [slots kv_heads dim], and for each request the slots of its tokens in order, req_to_token
[requests context].  That is a paged cache with pages of one token.  With page_size > 1 the slots of a page lie side by
side, so the same memory is a cache of such pages and every page_size-th slot names one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

import llmkernels

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class Step:
    """What the layers of a forward pass share, in the words of the contract."""

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor


class Backend(AttentionBackend):
    """Made once a model runner; forward is called once a layer."""

    def __init__(self, model_runner: Any):
        super().__init__()
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.pool = model_runner.token_to_kv_pool
        self.page_size = model_runner.page_size
        self.step: Step | None = None
        if isinstance(self.pool, SWAKVPool) and self.pool.swa_layer_nums > 0:
            raise NotImplementedError(
                "llmkernels takes no hybrid sliding-window pool; serve with --disable-hybrid-swa-memory"
            )

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Once a forward pass, before its first layer."""
        batch, mode = forward_batch, forward_batch.forward_mode
        if mode.is_idle():
            self.step = None
            return
        if not mode.is_decode() and (not mode.is_extend() or mode.is_target_verify() or mode.is_dllm_extend()):
            raise NotImplementedError(f"llmkernels takes decode and extend, not {mode.name}; choose another backend")
        if mode.is_decode():
            starts = torch.arange(batch.batch_size + 1, device=batch.seq_lens.device)
        else:
            starts = torch.nn.functional.pad(batch.extend_seq_lens.cumsum(0), (1, 0))
        lengths = batch.seq_lens if batch.seq_lens_cpu is None else batch.seq_lens_cpu  # a look that costs nothing
        longest = int(lengths.max()) if len(lengths) else 0
        slots = self.req_to_token[batch.req_pool_indices.long(), : max(longest, 1) : self.page_size]
        self.step = Step(
            block_table=(slots // self.page_size).int(),
            seq_lens=batch.seq_lens.int(),
            cu_seqlens_q=starts.int(),
        )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        raise NotImplementedError("llmkernels was never captured in SGLang's graphs; serve with --disable-cuda-graph")

    def forward_decode(self, *args: Any, **options: Any) -> torch.Tensor:
        return self._forward(*args, **options)

    def forward_extend(self, *args: Any, **options: Any) -> torch.Tensor:
        return self._forward(*args, **options)

    def support_triton(self) -> bool:
        return False

    def _forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        *,
        sinks: torch.Tensor | None = None,
        **unknown: Any,
    ) -> torch.Tensor:
        """q [tokens, heads * dim] -> [tokens, heads * v_dim]."""
        if unknown:
            raise NotImplementedError(f"llmkernels takes no {', '.join(unknown)}; choose another attention backend")
        if layer.is_cross_attention or layer.attn_type != AttentionType.DECODER:
            raise NotImplementedError("llmkernels takes decoder self-attention; choose another attention backend")
        if layer.logit_cap and layer.logit_capping_method != "tanh":
            raise NotImplementedError(f"llmkernels caps logits by tanh, not {layer.logit_capping_method}")
        if self.step is None:
            raise RuntimeError("init_forward_metadata was not called for this batch")
        if save_kv_cache and k is not None:
            loc = KVWriteLoc.for_batch(forward_batch)
            self.pool.set_kv_buffer(layer, loc, k, v, layer.k_scale_float, layer.v_scale_float)
        k_cache = self._paged(self.pool.get_key_buffer(layer.layer_id))
        v_cache = self._paged(self.pool.get_value_buffer(layer.layer_id))
        scales = {}
        if k_cache.dtype in FP8:
            scales = {
                name: torch.full((1,), given, dtype=torch.float32, device=q.device)
                for name, given in (("k_scale", layer.k_scale_float), ("v_scale", layer.v_scale_float))
                if given is not None
            }
        with llmkernels.use(checked=False):  # the slots are the allocator's
            out = llmkernels.paged_attention(
                q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
                k_cache,
                v_cache,
                self.step.block_table,
                self.step.seq_lens,
                self.step.cu_seqlens_q,
                scale=layer.scaling,
                window=(layer.sliding_window_size, -1),  # keys before the token itself; -1 is all of them in both
                soft_cap=float(layer.logit_cap or 0),
                sinks=None if sinks is None else sinks.float(),
                **scales,
            )
        return out.flatten(1)

    def _paged(self, buffer: torch.Tensor) -> torch.Tensor:
        """[slots kv_heads dim] as [pages page_size kv_heads dim]."""
        if buffer.dim() != 3 or buffer.dtype == torch.uint8:
            raise NotImplementedError(
                f"llmkernels takes pools of [slots kv_heads dim] in 16, 32 or FP8 bits, not {tuple(buffer.shape)} of "
                f"{buffer.dtype}; choose another --kv-cache-dtype"
            )
        return buffer.unflatten(0, (-1, self.page_size))
