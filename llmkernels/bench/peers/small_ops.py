"""The small ops as people write them in plain torch, in the dtype of the call; torch.compile gets them too."""

import torch
import torch.nn.functional as F

from llmkernels.bench.peers import eager
from llmkernels.contract import FLOATS
from llmkernels.shapes import dtype_name


@eager("rms_norm")
def rms_norm(x, weight, residual, eps):
    if residual is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


@eager("silu_and_mul")
def silu_and_mul(x):
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


@eager(
    "rotary_embedding", takes=lambda call: not call["interleaved"] and 2 * call["cos"].shape[1] == call["q"].shape[2]
)
def rotary_embedding(q, k, cos, sin, positions, interleaved):
    c, s = (table[positions].repeat(1, 2)[:, None].to(q.dtype) for table in (cos, sin))
    return tuple(x * c + _half_turned(x) * s for x in (q, k))


def _half_turned(x):
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


@eager(
    "write_kv",
    compiled=False,
    takes=lambda call: (
        call["v"] is not None and dtype_name(call["k_cache"]) in FLOATS and int(call["slots"].min()) >= 0
    ),
)
def write_kv(k, v, k_cache, v_cache, slots, k_scale, v_scale):
    page, offset = slots // k_cache.shape[1], slots % k_cache.shape[1]
    k_cache[page, offset] = k
    v_cache[page, offset] = v


@eager("merge_attention")
def merge_attention(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (torch.exp(part - lse)[..., None] for part in (lse_a, lse_b))
    return (weight_a * out_a + weight_b * out_b).to(out_a.dtype), lse


@eager(
    "quantize_activation", takes=lambda call: call["dtype"] == "int8" and not call["group"] and call["scale"] is None
)
def quantize_activation(x, dtype, group, scale):
    scales = x.abs().amax(-1, keepdim=True).float() / 127
    return (x / scales).round().to(torch.int8), scales


@eager("sample", compiled=False, takes=lambda call: call["top_k"] is None and call["min_p"] is None)
def sample(logits, uniform, temperature, top_k, top_p, min_p):
    greedy = logits.argmax(-1)
    if temperature is None:
        scores = logits.float()
    else:
        scores = logits.float() / torch.where(temperature == 0, 1, temperature)[:, None]
    shares = scores.softmax(-1)
    if top_p is not None:
        falling, order = shares.sort(-1, descending=True)
        falling[falling.cumsum(-1) - falling >= top_p[:, None]] = 0
        shares = torch.zeros_like(shares).scatter_(-1, order, falling)
    upto = shares.cumsum(-1)
    drawn = torch.searchsorted(upto, uniform[:, None] * upto[:, -1:], right=True).squeeze(-1)
    return drawn if temperature is None else torch.where(temperature == 0, greedy, drawn)
