"""The two ops of a decode step as one program: write_kv, then paged_attention (llmkernels.jax_api.write_and_attend)."""

from . import paged_attention, write_kv
from ._program import Program


def plain(q, k, v, k_cache, v_cache, slots, block_table, seq_lens, cu_seqlens_q, **options):
    scales = {name: options[name] for name in ("k_scale", "v_scale")}
    k_cache, v_cache = write_kv.plain(k, v, k_cache, v_cache, slots, **scales)
    answer = paged_attention.plain(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, **options)
    return *(answer if isinstance(answer, tuple) else (answer,)), k_cache, v_cache


program = Program(plain)
