"""The SGLang backend against FAKES of what it touches in SGLang 0.5.23: not SGLang itself, which has no wheel for CPUs.

The fakes have the names, signatures and layouts of sglang/srt; a change there would not be noticed here.
"""

import importlib
import sys
from enum import IntEnum
from types import ModuleType, SimpleNamespace

import pytest
import torch

import llmkernels
from llmkernels import ledger
from llmkernels.integrations import sglang as adapter

HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 32, 128


class Mode(IntEnum):
    """ForwardMode, as far as it is asked."""

    EXTEND, DECODE, MIXED, IDLE, TARGET_VERIFY = range(5)

    def is_extend(self):
        return self in (Mode.EXTEND, Mode.MIXED, Mode.TARGET_VERIFY)

    def is_decode(self):
        return self == Mode.DECODE

    def is_idle(self):
        return self == Mode.IDLE

    def is_target_verify(self):
        return self == Mode.TARGET_VERIFY

    def is_dllm_extend(self):
        return False


class Pool:
    """MHATokenToKVPool: [slots kv_heads dim], one layer."""

    def __init__(self):
        self.k, self.v = (torch.zeros(SLOTS, KV_HEADS, DIM) for _ in "kv")

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, k_scale=None, v_scale=None):
        self.k[loc_info.loc], self.v[loc_info.loc] = cache_k, cache_v

    def get_key_buffer(self, layer_id):
        return self.k

    def get_value_buffer(self, layer_id):
        return self.v


class WriteLoc(SimpleNamespace):
    @classmethod
    def for_batch(cls, batch):
        return cls(loc=batch.out_cache_loc)


class AttentionBackend:
    """The base class: forward sends a batch on by its mode."""

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        run = self.forward_decode if forward_batch.forward_mode.is_decode() else self.forward_extend
        return run(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)


@pytest.fixture
def backends(monkeypatch):
    """Fake modules under their real names; what the plug-in registered."""
    known, choices = {}, ["triton"]
    decoder = SimpleNamespace(DECODER="decoder", ENCODER_ONLY="encoder_only")
    fakes = {
        "arg_groups.choices": {
            "ATTENTION_BACKEND_CHOICES": choices,
            "add_attention_backend_choices": choices.extend,
        },
        "layers.attention.attention_registry": {
            "register_attention_backend": lambda name: lambda create: known.__setitem__(name, create) or create
        },
        "layers.attention.base_attn_backend": {"AttentionBackend": AttentionBackend},
        "layers.radix_attention": {"AttentionType": decoder},
        "mem_cache.memory_pool": {"KVWriteLoc": WriteLoc},
        "mem_cache.swa_memory_pool": {"SWAKVPool": type("SWAKVPool", (), {"swa_layer_nums": 1})},
    }
    for name, members in fakes.items():
        parts = f"sglang.srt.{name}".split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
        module = ModuleType(parts[-1])
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, ".".join(parts), module)
    monkeypatch.delitem(sys.modules, "llmkernels.integrations.sglang_attention", raising=False)
    adapter.register()
    adapter.register()  # once in each process at least
    assert choices == ["triton", "llmkernels"]
    yield known
    sys.modules.pop("llmkernels.integrations.sglang_attention", None)


def runner(page_size):
    table = torch.zeros(8, 64, dtype=torch.int32)  # of each request the slots of its tokens
    pages = torch.randperm(SLOTS // page_size, generator=torch.Generator().manual_seed(1)).view(2, -1)
    for request, mine in ((5, pages[0]), (2, pages[1])):
        table[request] = (mine[:, None] * page_size + torch.arange(page_size)).flatten()[:64]
    pools = {"req_to_token_pool": SimpleNamespace(req_to_token=table), "token_to_kv_pool": Pool()}
    return SimpleNamespace(page_size=page_size, **pools)


def layer(**change):
    sizes = {"tp_q_head_num": HEADS, "tp_k_head_num": KV_HEADS, "qk_head_dim": DIM, "v_head_dim": DIM}
    plain = {"layer_id": 0, "scaling": DIM**-0.5, "sliding_window_size": -1, "logit_cap": 0.0, "attn_type": "decoder"}
    more = {"logit_capping_method": "tanh", "is_cross_attention": False, "k_scale_float": None, "v_scale_float": None}
    return SimpleNamespace(**sizes | plain | more | change)


def batch(mode, table, have, new):
    """Requests 5 and 2 with so many tokens in the pool, and so many new ones."""
    slots = [table[r, h : h + n] for r, h, n in zip((5, 2), have, new, strict=True)]
    lengths = torch.tensor(have) + torch.tensor(new)
    return SimpleNamespace(
        forward_mode=mode,
        batch_size=2,
        req_pool_indices=torch.tensor([5, 2]),
        seq_lens=lengths,
        seq_lens_cpu=lengths,
        out_cache_loc=torch.cat(slots).long(),
        extend_seq_lens=None if mode == Mode.DECODE else torch.tensor(new),
    )


def dense(q, k, v, left=-1):
    """Causal attention of the last rows of one sequence: q [new heads dim], k and v [length kv_heads dim]."""
    new, length = len(q), len(k)
    position = torch.arange(length - new, length)[:, None]
    seen = torch.arange(length) <= position
    if left >= 0:
        seen &= torch.arange(length) >= position - left
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, seen).transpose(0, 1)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("window", [-1, 3])
def test_a_prefill_a_chunk_and_two_decodes(backends, page_size, window):
    torch.manual_seed(0)
    model = runner(page_size)
    backend, attention = backends["llmkernels"](model), layer(sliding_window_size=window)
    table, have = model.req_to_token_pool.req_to_token, [0, 0]
    keys = [torch.zeros(0, KV_HEADS, DIM), torch.zeros(0, KV_HEADS, DIM)]
    values = list(keys)
    ledger.reset()
    for mode, new in ((Mode.EXTEND, [20, 7]), (Mode.MIXED, [1, 9]), (Mode.DECODE, [1, 1]), (Mode.DECODE, [1, 1])):
        tokens = sum(new)
        q, k, v = (
            torch.randn(tokens, HEADS * DIM),
            torch.randn(tokens, KV_HEADS, DIM),
            torch.randn(tokens, KV_HEADS, DIM),
        )
        now = batch(mode, table, have, new)
        backend.init_forward_metadata(now)
        out = backend.forward(q, k, v, attention, now)
        assert out.shape == (tokens, HEADS * DIM)
        keys = [torch.cat(pair) for pair in zip(keys, k.split(new), strict=True)]
        values = [torch.cat(pair) for pair in zip(values, v.split(new), strict=True)]
        rows = zip(q.view(-1, HEADS, DIM).split(new), keys, values, strict=True)
        want = torch.cat([dense(*row, left=window) for row in rows])
        torch.testing.assert_close(out.view(-1, HEADS, DIM), want)
        have = [h + n for h, n in zip(have, new, strict=True)]
    assert sum(row["calls"] for row in ledger.read()["paged_attention"].values()) == 4


def test_what_it_does_not_take_is_said(backends):
    model = runner(1)
    backend = backends["llmkernels"](model)
    table = model.req_to_token_pool.req_to_token
    with pytest.raises(NotImplementedError, match="not TARGET_VERIFY; choose another backend"):
        backend.init_forward_metadata(batch(Mode.TARGET_VERIFY, table, [4, 4], [2, 2]))
    with pytest.raises(NotImplementedError, match="--disable-cuda-graph"):
        backend.init_cuda_graph_state(8, 8)
    now = batch(Mode.DECODE, table, [4, 4], [1, 1])
    backend.init_forward_metadata(now)
    q, k = torch.randn(2, HEADS * DIM), torch.randn(2, KV_HEADS, DIM)
    for wrong, words in (({"is_cross_attention": True}, "self-attention"), ({"attn_type": "encoder_only"}, "decoder")):
        with pytest.raises(NotImplementedError, match=words):
            backend.forward(q, k, k, layer(**wrong), now)
    with pytest.raises(NotImplementedError, match="takes no q_rope"):
        backend.forward(q, k, k, layer(), now, q_rope=q)
    model.token_to_kv_pool = sys.modules["sglang.srt.mem_cache.swa_memory_pool"].SWAKVPool()
    with pytest.raises(NotImplementedError, match="hybrid sliding-window pool"):
        backends["llmkernels"](model)


def test_nothing_of_sglang_is_needed_to_import_the_entry_point():
    assert importlib.import_module("llmkernels.integrations.sglang").NAME == "llmkernels"
    assert "sglang" not in sys.modules
    assert llmkernels.__version__
