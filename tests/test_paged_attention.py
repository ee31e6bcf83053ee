"""The reference of paged_attention against other people's attention, and what holds however a sequence is cut up."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import llmkernels

PAGE = 4


def paged(k, v, generator, extra=3):
    """Caches [pages, PAGE, kv_heads, dim] that hold k, v [keys, kv_heads, dim] in scattered pages, and their table."""
    count = -(-k.shape[0] // PAGE)
    order = torch.randperm(count + extra, generator=generator)[:count]
    caches = []
    for rows in (k, v):
        cache = torch.full((count + extra, PAGE, *rows.shape[1:]), torch.nan, dtype=rows.dtype)
        for j, row in enumerate(rows):
            cache[order[j // PAGE], j % PAGE] = row
        caches.append(cache)
    return *caches, order.int()[None]


def attend(q, k, v, generator=None, **options):
    """One sequence: the last rows of k, v are the new tokens of q."""
    generator = generator or torch.Generator().manual_seed(0)
    caches = paged(k, v, generator)
    lengths, starts = torch.tensor([len(k)], dtype=torch.int32), torch.tensor([0, len(q)], dtype=torch.int32)
    return llmkernels.paged_attention(q, *caches, lengths, starts, backend="reference", **options)


def draw(new=5, keys=11, heads=4, kv_heads=2, dim=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, h, dim, generator=g) for n, h in ((new, heads), (keys, kv_heads), (keys, kv_heads))]


def sdpa(q, k, v, mask, scale=None):
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True).transpose(0, 1)


def causal_mask(new, keys, left=None):
    i, j = torch.arange(keys - new, keys)[:, None], torch.arange(keys)[None]
    return (j <= i) & (j >= i - left if left is not None else True)


@pytest.mark.parametrize("left", [None, 0, 3, 100])
def test_causal_and_window_as_torch_does_it(left):
    q, k, v = draw()
    got = attend(q, k, v, window=(-1 if left is None else left, 0))
    torch.testing.assert_close(got, sdpa(q, k, v, causal_mask(5, 11, left)))


def test_alibi_as_a_bias_of_torch():
    q, k, v = draw()
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    i, j = torch.arange(6, 11)[:, None], torch.arange(11)[None]
    bias = (slopes[:, None, None] * (j - i)).masked_fill(~causal_mask(5, 11), -torch.inf)
    torch.testing.assert_close(attend(q, k, v, alibi_slopes=slopes), sdpa(q, k, v, bias))


def test_soft_cap_as_transformers_gemma2():
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    module = torch.nn.Module().eval()
    module.num_key_value_groups = 2
    q, k, v = draw()
    mask = torch.zeros(5, 11).masked_fill(~causal_mask(5, 11), -torch.inf)[None, None]
    batched = [x.transpose(0, 1)[None] for x in (3 * q, k, v)]
    want, _ = eager_attention_forward(module, *batched, mask, scaling=0.25, softcap=1.5)
    torch.testing.assert_close(attend(3 * q, k, v, soft_cap=1.5, scale=0.25), want[0])


def test_sinks_as_transformers_gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    module = torch.nn.Module().eval()
    module.num_key_value_groups, module.sinks = 2, torch.tensor([0.3, -1.0, 2.0, 0.0])
    q, k, v = draw()
    mask = torch.zeros(5, 11).masked_fill(~causal_mask(5, 11), -torch.inf)[None, None]
    batched = [x.transpose(0, 1)[None] for x in (q, k, v)]
    want, _ = eager_attention_forward(module, *batched, mask, scaling=0.25)
    torch.testing.assert_close(attend(q, k, v, sinks=module.sinks, scale=0.25), want[0])


def test_lse_is_torchs_logsumexp():
    q, k, v = draw(heads=2)
    _, lse = attend(q, k, v, return_lse=True)
    scores = torch.einsum("nhd,lhd->nhl", q, k) / 4
    want = scores.masked_fill(~causal_mask(5, 11)[:, None], -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, want)


def test_tree_mask_as_a_mask_of_torch():
    q, k, v = draw(new=4, keys=9)
    seen = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
    words = torch.tensor([[0b1], [0b11], [0b101], [0b1101]], dtype=torch.uint32)
    mask = torch.cat([torch.ones(4, 5, dtype=torch.bool), seen], 1)
    torch.testing.assert_close(attend(q, k, v, tree_mask=words), sdpa(q, k, v, mask))


@settings(max_examples=40, deadline=None)
@given(keys=st.integers(1, 30), cut=st.integers(0, 30), seed=st.integers(0, 9), left=st.sampled_from([-1, 0, 2, 9]))
def test_prefill_in_two_chunks_is_one_prefill(keys, cut, seed, left):
    """Chunk boundaries, page boundaries, windows: none may show."""
    cut = min(cut, keys)
    q, k, v = draw(new=keys, keys=keys, seed=seed)
    whole = attend(q, k, v, window=(left, 0))
    parts = [attend(q[:cut], k[:cut], v[:cut], window=(left, 0))] if cut else []
    parts += [attend(q[cut:], k, v, window=(left, 0))] if cut < keys else []
    torch.testing.assert_close(torch.cat(parts), whole)


@settings(max_examples=20, deadline=None)
@given(a=st.integers(0, 99), b=st.integers(0, 99))
def test_which_pages_hold_the_keys_does_not_matter(a, b):
    q, k, v = draw(new=3, keys=14)
    one, two = (attend(q, k, v, torch.Generator().manual_seed(seed)) for seed in (a, b))
    assert torch.equal(one, two)


@settings(max_examples=25, deadline=None)
@given(keys=st.integers(2, 30), cut=st.integers(1, 29), seed=st.integers(0, 9))
def test_two_parts_of_the_keys_merge_into_the_whole(keys, cut, seed):
    cut = min(cut, keys - 1)
    q, k, v = draw(new=1, keys=keys, seed=seed)
    whole = attend(q, k, v, return_lse=True)
    parts = [attend(q, k[s], v[s], return_lse=True) for s in (slice(0, cut), slice(cut, None))]
    merged = llmkernels.merge_attention(*parts[0], *parts[1], backend="reference")
    for got, want in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, want)


def test_a_batch_is_its_sequences():
    """Mixed decode and prefill in one call equals one call a sequence."""
    drawn = [draw(new=n, keys=length, seed=n) for n, length in ((1, 9), (5, 5), (3, 12))]
    alone = torch.cat([attend(*one) for one in drawn])
    g = torch.Generator().manual_seed(3)
    pools = [paged(k, v, g) for _, k, v in drawn]
    table = torch.full((3, 4), -1, dtype=torch.int32)
    first = 0
    for s, (k_cache, _, pages) in enumerate(pools):
        table[s, : pages.shape[1]] = pages[0] + first
        first += k_cache.shape[0]
    q = torch.cat([one[0] for one in drawn])
    caches = [torch.cat([pool[i] for pool in pools]) for i in (0, 1)]
    lengths, starts = torch.tensor([9, 5, 12], dtype=torch.int32), torch.tensor([0, 1, 6, 9], dtype=torch.int32)
    together = llmkernels.paged_attention(q, *caches, table, lengths, starts, backend="reference")
    torch.testing.assert_close(together, alone)
