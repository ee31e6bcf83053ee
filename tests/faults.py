"""Implementations that are wrong in one way each.  tests/test_kit.py shows that the conformance kit catches them all.

Each is the reference with one mistake of a kind that real kernels have shipped with.
"""

import ctypes
import math
from dataclasses import replace

import torch

from llmkernels.registry import OPS, get

get("rms_norm")  # declares every op
REFERENCE = {name: op.contract.reference for name, op in OPS.items()}
FAULTS = {}


def fault(op):
    """Register a wrong implementation of `op`; its docstring says what is wrong."""

    def register(run):
        FAULTS[run.__name__] = (op, run)
        return run

    return register


@fault("rms_norm")
def dropped_weight(x, weight, **options):
    """The gain is not applied."""
    return REFERENCE["rms_norm"](x, torch.ones_like(weight), **options)


@fault("rms_norm")
def padded_width_in_the_mean(x, weight, **options):
    """The row is padded to a multiple of 128 and the mean is taken over the padded width."""
    width = -(-x.shape[-1] // 128) * 128
    return REFERENCE["rms_norm"](x, weight * math.sqrt(width / x.shape[-1]), **options)


@fault("rms_norm")
def off_by_a_percent(x, weight, **options):
    """1.2 % too large: passes a customary bfloat16 tolerance of 1.6e-2."""
    return REFERENCE["rms_norm"](x, (weight * 1.012).to(weight.dtype), **options)


@fault("rms_norm")
def eps_outside_the_root(x, weight, *, residual=None, eps=1e-6):
    """A row of zeros divides by zero."""
    s = x.float() if residual is None else x.float() + residual.float()
    y = (s / (s * s).mean(-1, keepdim=True).sqrt() * weight.float()).to(x.dtype)
    return y if residual is None else (y, s.to(x.dtype))


@fault("rms_norm")
def unwritten_last_row(x, weight, **options):
    """The grid is one row short."""
    good = REFERENCE["rms_norm"](x, weight, **options)
    first = good if isinstance(good, torch.Tensor) else good[0]
    y = torch.empty(first.shape, dtype=first.dtype)
    y[..., :-1, :] = first[..., :-1, :]
    return y if isinstance(good, torch.Tensor) else (y, good[1])


@fault("rms_norm")
def store_past_the_end(x, weight, **options):
    """The tail of the last vector store is not masked."""
    good = REFERENCE["rms_norm"](x, weight, **options)
    first = good if isinstance(good, torch.Tensor) else good[0]
    y = torch.empty(first.shape, dtype=first.dtype).copy_(first)
    ctypes.memset(y.data_ptr() + y.numel() * y.itemsize, 0, 16)
    return y if isinstance(good, torch.Tensor) else (y, good[1])


@fault("rms_norm")
def scratch_in_the_input(x, weight, **options):
    """The input is overwritten."""
    good = REFERENCE["rms_norm"](x, weight, **options)
    x.mul_(2)
    return good


@fault("rms_norm")
def other_bits_each_time(x, weight, **options):
    """Declared deterministic, and is not: atomics in a reduction."""
    good = REFERENCE["rms_norm"](x, weight, **options)
    first = good if isinstance(good, torch.Tensor) else good[0]
    y = (
        first * (1 + 2.0**-23 * torch.randint(0, 2, first.shape)).to(first.dtype)
        if first.dtype == torch.float32
        else first
    )
    return y if isinstance(good, torch.Tensor) else (y, good[1])


def attention(change=None, after=None):
    """The reference with changed options, or with a changed answer."""

    def run(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, **options):
        call = {"k_cache": k_cache, "block_table": block_table, "seq_lens": seq_lens, **options}
        call |= change(call) if change else {}
        arrays = (q, call.pop("k_cache"), v_cache, call.pop("block_table"), call.pop("seq_lens"), cu_seqlens_q)
        good = REFERENCE["paged_attention"](*arrays, **call)
        return after(good) if after else good

    return run


def _attention_fault(name, doc, **how):
    run = attention(**how)
    run.__name__, run.__doc__ = name, doc
    fault("paged_attention")(run)


_attention_fault(
    "off_by_one_window",
    "The window holds one key too many.",
    change=lambda c: {"window": (c["window"][0] + 1 if c["window"][0] >= 0 else -1, c["window"][1])},
)
_attention_fault(
    "wrong_lse_base",
    "lse is log2 of the denominator.",
    after=lambda good: (good[0], good[1] / math.log(2)) if isinstance(good, tuple) else good,
)
_attention_fault("not_causal", "The causal mask is missing.", change=lambda c: {"causal": c["tree_mask"] is not None})
_attention_fault("tree_as_causal", "The tree mask is ignored.", change=lambda c: {"tree_mask": None})
_attention_fault(
    "stale_page",
    "A page table from before the last page was added.",
    change=lambda c: {"block_table": _stale(c["block_table"], c["seq_lens"], c["k_cache"].shape[1])},
)
_attention_fault("missing_sink", "The sink takes no part in the softmax.", change=lambda c: {"sinks": None})
_attention_fault("missing_cap", "The soft cap is ignored.", change=lambda c: {"soft_cap": 0.0})
_attention_fault("missing_cache_scale", "k_scale is ignored.", change=lambda c: {"k_scale": None})
_attention_fault(
    "scale_of_the_first_head",
    "Every KV head uses the scale of the first.",
    change=lambda c: {"k_scale": None if c["k_scale"] is None else c["k_scale"].reshape(-1)[:1]},
)
_attention_fault(
    "int32_overflow",
    "The element offset of a page is kept in 32 bits.",
    change=lambda c: {"block_table": _wrapped(c["block_table"], c["k_cache"])},
)


def _stale(table, lengths, page_size):
    table = table.clone()
    for s, length in enumerate(lengths.tolist()):
        if (last := -(-length // page_size) - 1) > 0:
            table[s, last] = table[s, last - 1]
    return table


def _wrapped(table, cache):
    stride = cache.stride(0)
    live = (table >= 0) & (table < cache.shape[0])
    offset = (table.long() * stride + 2**31) % 2**32 - 2**31
    return torch.where(live, (offset // stride).clamp(min=0), table).int()


@fault("paged_attention")
def ignored_nan_of_unused_slots(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, **options):
    """Whole pages take part with weight zero, and 0 * NaN is NaN."""
    good = REFERENCE["paged_attention"](q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, **options)
    out = good[0] if isinstance(good, tuple) else good
    starts = cu_seqlens_q.tolist()
    for s, length in enumerate(seq_lens.tolist()):
        if length % k_cache.shape[1] and starts[s + 1] > starts[s]:
            last = v_cache[block_table[s, length // k_cache.shape[1]]].float()  # [page_size, kv_heads, v_dim]
            group = out.shape[1] // last.shape[1]
            out[starts[s] : starts[s + 1]] += (0 * last.sum(0)).repeat_interleave(group, 0).to(out.dtype)
    return good


@fault("write_kv")
def shifted_store(k, v, k_cache, v_cache, slots, **options):
    """Every slot is one too far."""
    room = k_cache.shape[0] * k_cache.shape[1]
    slots = torch.where((slots >= 0) & (slots + 1 < room), slots + 1, slots)
    REFERENCE["write_kv"](k, v, k_cache, v_cache, slots, **options)


@fault("write_kv")
def skipped_slot_wraps(k, v, k_cache, v_cache, slots, **options):
    """Slot -1 is the last slot of the last page."""
    room = k_cache.shape[0] * k_cache.shape[1]
    REFERENCE["write_kv"](k, v, k_cache, v_cache, slots % room if room else slots, **options)


@fault("write_kv")
def write_outside_a_page(k, v, k_cache, v_cache, slots, **options):
    """The store of a row runs on into the slot behind it."""
    REFERENCE["write_kv"](k, v, k_cache, v_cache, slots, **options)
    if len(slots) and (slot := int(slots.max())) + 1 < k_cache.shape[0] * k_cache.shape[1]:
        page, offset = divmod(slot + 1, k_cache.shape[1])
        k_cache[page, offset, 0, 0] = 1


@fault("write_kv")
def truncated_not_rounded(k, v, k_cache, v_cache, slots, *, k_scale=None, v_scale=None):
    """Quantization drops the fraction."""
    REFERENCE["write_kv"](k, v, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale)
    if k_cache.dtype == torch.int8:
        scale = torch.ones(()) if k_scale is None else k_scale.reshape(-1, 1)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                row = (k[token].float() / scale).clamp(-128, 127).trunc().to(torch.int8)
                k_cache[slot // k_cache.shape[1], slot % k_cache.shape[1]] = row


@fault("merge_attention")
def nan_of_two_empty_parts(out_a, lse_a, out_b, lse_b):
    """exp(-inf - -inf)."""
    lse = torch.logaddexp(lse_a, lse_b)
    a, b = (torch.exp(part - lse)[..., None] for part in (lse_a, lse_b))
    return (a * out_a.float() + b * out_b.float()).to(out_a.dtype), lse


def _quantized_fault(name, doc, change):
    def run(x, weight, **options):
        return REFERENCE["quantized_gemm"](x, change(weight), **options)

    run.__name__, run.__doc__ = name, doc
    fault("quantized_gemm")(run)


def _other(weight, field, value):
    return weight if value is None else replace(weight, **{field: value})


_quantized_fault(
    "missing_zero_point",
    "Zero points are taken for the symmetric one.",
    lambda w: _other(
        w, "zeros", w.zeros if w.zeros is None else torch.full_like(w.zeros, 8 if w.zeros.dtype == torch.uint8 else 0)
    ),
)
_quantized_fault(
    "wrong_group_index",
    "Each group uses the scale of the one before.",
    lambda w: _other(w, "scales", w.scales.roll(1, -1)),
)
_quantized_fault(
    "transposed_scales",
    "Scales are read [groups, out] instead of [out, groups].",
    lambda w: _other(w, "scales", w.scales.T.contiguous().reshape(w.scales.shape)),
)
_quantized_fault(
    "swapped_nibbles",
    "The high nibble comes first.",
    lambda w: _other(w, "values", (w.values >> 4 | w.values << 4) if w.values.dtype == torch.uint8 else None),
)
_quantized_fault(
    "ignored_permutation",
    "Act-order is forgotten.",
    lambda w: _other(w, "permutation", None if w.permutation is None else torch.arange(w.shape[1], dtype=torch.int32)),
)


@fault("quantized_gemm")
def dropped_bias(x, weight, *, bias=None):
    """The bias is not added."""
    return REFERENCE["quantized_gemm"](x, weight)


@fault("lora_gemm")
def unadapted_row_touched(y, x, a, b, adapters, scales):
    """Adapter -1 is read as the last adapter."""
    REFERENCE["lora_gemm"](y, x, a, b, adapters % len(scales) if len(scales) else adapters, scales)


@fault("rotary_embedding")
def other_pairing(q, k, cos, sin, positions, *, interleaved=False):
    """Halves where interleaved pairs are asked for, and the other way round."""
    return REFERENCE["rotary_embedding"](q, k, cos, sin, positions, interleaved=not interleaved)


@fault("silu_and_mul")
def gate_and_up_swapped(x):
    """silu of the wrong half."""
    a, b = x.chunk(2, -1)
    return REFERENCE["silu_and_mul"](torch.cat([b, a], -1))


@fault("norm_linear_activation")
def residual_not_returned(x, weight, **options):
    """The returned residual is x, without what was added."""
    good = REFERENCE["norm_linear_activation"](x, weight, **options)
    return (good[0], x.clone()) if isinstance(good, tuple) else good


@fault("quantize_activation")
def scale_of_the_whole_tensor(x, **options):
    """One scale for all rows."""
    values, scales = REFERENCE["quantize_activation"](x, **options)
    return values, scales.max().expand(scales.shape).clone() if scales.numel() else scales


@fault("sample")
def always_the_likeliest(logits, uniform, **options):
    """Greedy, whatever the temperature."""
    return logits.float().argmax(-1)


@fault("lora_gemm")
def writes_between_the_rows(y, x, a, b, adapters, scales):
    """The store of a row runs on into the gap behind it."""
    REFERENCE["lora_gemm"](y, x, a, b, adapters, scales)
    if y.numel() and y.stride(0) > y.shape[1]:
        y.as_strided((1,), (1,), y.storage_offset() + y.shape[1]).fill_(7)


@fault("quantized_gemm")
def repacks_in_place(x, weight, *, bias=None):
    """The weight is rearranged where it lies."""
    y = REFERENCE["quantized_gemm"](x, weight, bias=bias)
    weight.values.copy_(weight.values.flip(0))
    return y
