"""The sizes and switches of a model, and how config.json says them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkernels.models.files import CheckpointError

ROPE = {  # rope type -> what its parameters must hold beside rope_theta
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and switches of a model.

    windows: for each layer, how many keys before its own position a query sees; -1 is all of them.
    rope: rope_theta, rope_type and what that type needs, as in transformers' rope_parameters.
    context: the longest sequence the model is for, in tokens.
    dtype: what the checkpoint was saved in.
    """

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    eps: float
    windows: tuple[int, ...]
    rope: dict[str, Any]
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str


@dataclass(frozen=True)
class Family:
    """What a family's config.json does not say.

    qkv_bias, o_bias: None where `attention_bias` says it.
    window: 'always' where sliding_window holds for every layer, 'asked' where use_sliding_window must ask for it.
    """

    qkv_bias: bool | None = False
    o_bias: bool | None = False
    qk_norm: bool = False
    window: str | None = None


FAMILIES = {
    "LlamaForCausalLM": Family(qkv_bias=None, o_bias=None),
    "MistralForCausalLM": Family(window="always"),
    "Qwen2ForCausalLM": Family(qkv_bias=True, window="asked"),
    "Qwen3ForCausalLM": Family(qkv_bias=None, o_bias=None, qk_norm=True, window="asked"),
}


def read_config(raw: dict[str, Any], path: Path) -> ModelConfig:
    """The ModelConfig that a config.json describes, in the spelling of transformers 5 or of older ones."""
    names = raw.get("architectures") or []
    if not isinstance(names, list):
        raise CheckpointError(f"{path / 'config.json'}: architectures is {names!r}; it must be a list of names")
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        what = " or ".join(map(str, names)) or f"model_type {raw.get('model_type')!r} without architectures"
        raise CheckpointError(f"{path} is {what}, which is not supported; the architectures are {', '.join(FAMILIES)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path}: hidden_act is {raw['hidden_act']!r}; only 'silu' is supported")

    def size(key: str, default: int | None = None, largest: int = 2**31 - 1) -> int:
        value = default if raw.get(key) is None else raw[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
            raise CheckpointError(
                f"{path / 'config.json'}: {key} is {value!r}; it must be a positive integer, at most {largest}"
            )
        return value

    def switch(key: str) -> bool:
        value = raw.get(key) or False
        if not isinstance(value, bool):
            raise CheckpointError(f"{path / 'config.json'}: {key} is {value!r}; it must be true or false")
        return value

    heads, hidden, layers = size("num_attention_heads"), size("hidden_size"), size("num_hidden_layers", largest=10_000)
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"{path}: {heads} attention heads are not a multiple of {kv_heads} key-value heads")
    eps = 1e-6 if raw.get("rms_norm_eps") is None else raw["rms_norm_eps"]
    if not _positive(eps):
        raise CheckpointError(f"{path / 'config.json'}: rms_norm_eps is {eps!r}; it must be a positive number")
    attention_bias = switch("attention_bias")
    return ModelConfig(
        vocab=size("vocab_size"),
        hidden=hidden,
        intermediate=size("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size("head_dim", hidden // heads),
        context=size("max_position_embeddings", 2048),
        eps=float(eps),
        windows=_windows(raw, layers, family, path),
        rope=_rope(raw, path),
        tied=switch("tie_word_embeddings"),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=switch("mlp_bias"),
        qk_norm=family.qk_norm,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
    )


def _windows(raw: dict[str, Any], layers: int, family: Family, path: Path) -> tuple[int, ...]:
    """transformers' sliding_window counts the query's own position, paged_attention's does not."""
    width = raw.get("sliding_window", 4096)
    if width is not None and (isinstance(width, bool) or not isinstance(width, int) or width < 1):
        raise CheckpointError(f"{path}: sliding_window is {width!r}; it must be a positive integer, or null for none")
    if width is None or family.window is None or (family.window == "asked" and not raw.get("use_sliding_window")):
        return (-1,) * layers
    kinds = ["sliding_attention"] * layers
    if family.window == "asked":  # the first layers see everything
        full = raw.get("max_window_layers", 28)
        if isinstance(full, bool) or not isinstance(full, int) or full < 0:
            raise CheckpointError(f"{path}: max_window_layers is {full!r}; it must be a number of layers")
        kinds = raw.get("layer_types") or ["full_attention"] * min(full, layers) + kinds[full:]
    known = isinstance(kinds, list) and all(kind in ("full_attention", "sliding_attention") for kind in kinds)
    if not known or len(kinds) != layers:
        raise CheckpointError(f"{path}: layer_types must be full_ or sliding_attention, for each of {layers} layers")
    return tuple(width - 1 if kind == "sliding_attention" else -1 for kind in kinds)


def _rope(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """rope_parameters (transformers 5), or rope_theta with rope_scaling (older)."""
    rope = {"rope_theta": raw.get("rope_theta") or 10000.0}
    asked = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(asked, dict):
        raise CheckpointError(f"{path}: rope_parameters or rope_scaling is {asked!r}; it must be an object")
    rope |= asked
    rope["rope_type"] = kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE:
        raise CheckpointError(f"{path}: rope_type is {kind!r}; the supported ones are {', '.join(ROPE)}")
    for key in ("rope_theta", *ROPE[kind]):
        if not _positive(rope.get(key)):
            raise CheckpointError(f"{path}: rope type {kind} needs {key}, a positive number; it is {rope.get(key)!r}")
    return rope


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
