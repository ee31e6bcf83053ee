"""The two ops of a decode step in one kernel: attention writes each new key and value before it reads them."""

from . import paged_attention, write_kv


def takes(q, k, v, k_cache, v_cache, slots, block_table, seq_lens, cu_seqlens_q, **options):
    """Yield (code, reason, fix) for what the kernel does not take."""
    scales = {name: options[name] for name in ("k_scale", "v_scale")}
    yield from write_kv.takes(k, v, k_cache, v_cache, slots, **scales)
    yield from paged_attention.takes(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, **options)


def run(q, k, v, k_cache, v_cache, slots, block_table, seq_lens, cu_seqlens_q, **options):
    """(out, lse where asked for, k_cache, v_cache).  Slots are those that the block table gives: not looked at here."""
    return paged_attention.run(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, **options, new=(k, v))
