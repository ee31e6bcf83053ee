"""Decoder-only transformers as a sequence of llmkernels ops: Llama, Mistral, Qwen2, Qwen3.

A layer is eight calls, and no arithmetic happens outside them:

    qkv, residual = norm_linear_activation(x, ..., residual)             the norm and its residual ride on the product
    q, k          = rms_norm(q), rms_norm(k)                             Qwen3 only
    q, k          = rotary_embedding(q, k, cos, sin, positions)
                    write_kv(k, v, k_cache, v_cache, slots)
    a             = paged_attention(q, k_cache, v_cache, ...)
    x             = norm_linear_activation(a, norm="none")
    h, residual   = norm_linear_activation(x, ..., residual, activation="swiglu")
    x             = norm_linear_activation(h, norm="none")
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

import llmkernels
from llmkernels.models.config import ModelConfig


class Cache(Protocol):
    """Where keys and values are kept: k[layer], v[layer] [pages page_size kv_heads dim], and their scales or None."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: list[torch.Tensor | None]
    v_scale: list[torch.Tensor | None]


@dataclass
class Delta:
    """What adapters add to the columns `start` to `stop` of a product: a [count rank in], b [count out rank], scales
    [count], as `lora_gemm` takes them."""

    start: int
    stop: int
    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor


@dataclass
class Linear:
    """weight [out in], dense or a QuantizedWeight, and its bias [out] or None; deltas: by name, see engine/lora.py."""

    weight: Any
    bias: torch.Tensor | None = None
    deltas: dict[str, Delta] = field(default_factory=dict)


@dataclass
class Layer:
    """The weights of one layer.

    qkv packs the rows of the query, key and value projections; gate_up those of gate and up.
    window: see ModelConfig.windows.
    """

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    window: int


@dataclass
class Batch:
    """What one forward pass runs on, sequences one after the other.

    tokens, positions, slots: int64 [tokens]; a slot is page * page_size + offset.
    block_table: int32 [seqs max_pages].  seq_lens: int32 [seqs], keys with the new ones.  cu_seqlens_q: int32 [seqs+1].
    rows: int64 [samples], the tokens whose logits are wanted; None: all of them.
    max_seqlen_q, max_seqlen_k: upper bounds, rounded up so that few different ones occur.
    tree_mask: uint32 [tokens 1], where a sequence's new tokens are a tree of guesses: those that each of them sees.
    adapters: int32 [tokens], -1 for none; None where no token has an adapter.
    hidden: is given the hidden states behind the last norm, [tokens hidden]; None: nobody wants them.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    rows: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    tree_mask: torch.Tensor | None = None
    adapters: torch.Tensor | None = None
    hidden: Callable[[torch.Tensor], None] | None = None


States = Callable[[torch.Tensor, Batch, Cache], tuple[torch.Tensor, torch.Tensor]]  # of Model.states


@dataclass
class Model:
    """A model in memory.  cos, sin: float32 [length, head_dim/2].  adapted: changes whenever the Deltas do."""

    config: ModelConfig
    embedding: torch.Tensor
    layers: list[Layer]
    norm: torch.Tensor
    head: Linear
    cos: torch.Tensor
    sin: torch.Tensor
    adapted: int = 0

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def forward(self, batch: Batch, cache: Cache, states: States | None = None) -> torch.Tensor:
        """Logits [samples vocab] of the rows asked for; keys and values of all tokens are written to the cache.

        states: `states`, or what torch.compile makes of it.
        """
        x, residual = (states or self.states)(self.embedding[batch.tokens], batch, cache)
        if batch.hidden:
            batch.hidden(llmkernels.rms_norm(x, self.norm, residual=residual, eps=self.config.eps)[0])
        if batch.rows is not None:
            x, residual = x[batch.rows], residual[batch.rows]
        return self.logits(x, residual)

    def states(self, x: torch.Tensor, batch: Batch, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
        """What the last layer gives for embeddings x [tokens hidden], and the residual beside it: nothing but ops."""
        residual: Any = None
        adapters = batch.adapters
        for index, layer in enumerate(self.layers):
            qkv, residual = self._normed(x, residual, layer.input_norm, layer.qkv, adapters)
            x = _product(self._attention(index, layer, qkv, batch, cache), layer.o, adapters)
            h, residual = self._normed(x, residual, layer.post_norm, layer.gate_up, adapters, "swiglu")
            x = _product(h, layer.down, adapters)
        return x, residual

    def logits(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[rows vocab] of `states`."""
        return self._normed(x, residual, self.norm, self.head)[0]

    def _normed(
        self,
        x: torch.Tensor,
        residual: Any,
        norm: torch.Tensor,
        linear: Linear,
        adapters: torch.Tensor | None = None,
        activation: str = "none",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """activation(linear(norm(s))), and s = x + residual; the first layer has no residual yet, its s is x."""
        if adapters is not None and linear.deltas:  # between the product and the activation, adapters come in
            if residual is None:
                h, total = llmkernels.rms_norm(x, norm, eps=self.config.eps), x
            else:
                h, total = llmkernels.rms_norm(x, norm, residual=residual, eps=self.config.eps)
            y = _product(h, linear, adapters)
            return (llmkernels.silu_and_mul(y) if activation == "swiglu" else y), total
        given = {} if residual is None else {"residual": residual, "return_residual": True}
        results = llmkernels.norm_linear_activation(
            x, linear.weight, norm_weight=norm, bias=linear.bias, activation=activation, eps=self.config.eps, **given
        )
        return results if given else (results, x)

    def _attention(self, index: int, layer: Layer, qkv: torch.Tensor, batch: Batch, cache: Cache) -> torch.Tensor:
        """[tokens, heads * head_dim], of qkv [tokens, (heads + 2 * kv_heads) * head_dim]."""
        config = self.config
        rows = qkv.unflatten(-1, (-1, config.head_dim))
        q, k, v = rows.split((config.heads, config.kv_heads, config.kv_heads), 1)
        if layer.q_norm is not None:
            q = llmkernels.rms_norm(q, layer.q_norm, eps=config.eps)
            k = llmkernels.rms_norm(k, layer.k_norm, eps=config.eps)
        q, k = llmkernels.rotary_embedding(q, k, self.cos, self.sin, batch.positions)
        scales = {"k_scale": cache.k_scale[index], "v_scale": cache.v_scale[index]}
        llmkernels.write_kv(k, v, cache.k[index], cache.v[index], batch.slots, **scales)
        attended = llmkernels.paged_attention(
            q,
            cache.k[index],
            cache.v[index],
            batch.block_table,
            batch.seq_lens,
            batch.cu_seqlens_q,
            window=(layer.window, -1),
            max_seqlen_q=batch.max_seqlen_q,
            max_seqlen_k=batch.max_seqlen_k,
            tree_mask=batch.tree_mask,
            **scales,
        )
        return attended.flatten(1)


def _product(x: torch.Tensor, linear: Linear, adapters: torch.Tensor | None = None) -> torch.Tensor:
    y: torch.Tensor = llmkernels.norm_linear_activation(x, linear.weight, norm="none", bias=linear.bias)
    if adapters is not None:
        for delta in linear.deltas.values():
            llmkernels.lora_gemm(y[:, delta.start : delta.stop], x, delta.a, delta.b, adapters, delta.scales)
    return y


def rotary_tables(config: ModelConfig, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * frequency, float32 [length, head_dim/2]: RoFormer, https://arxiv.org/abs/2104.09864.

    Computed in float32 as transformers does: models are trained with exactly these angles.
    """
    rope = config.rope
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequency = 1.0 / rope["rope_theta"] ** exponent
    if rope["rope_type"] == "linear":
        frequency = frequency / rope["factor"]
    elif rope["rope_type"] == "llama3":
        frequency = _llama3(frequency, rope)
    angle = torch.arange(length).float()[:, None] * frequency
    return angle.cos().to(device), angle.sin().to(device)


def _llama3(frequency: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1's stretch: long waves are slowed by `factor`, short ones stay, those between blend smoothly."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # of a wave over the trained context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequency / factor + smooth * frequency
