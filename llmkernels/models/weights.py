"""A Hugging Face checkpoint on disk -> a Model in memory.

config.json, generation_config.json and *.safetensors, single or sharded; nothing else is read.  No pickle, and no code
that a checkpoint brings along (auto_map) is ever imported.  What is wrong with a checkpoint is said in one line.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmkernels import quant
from llmkernels.engine.model import Layer, Linear, Model, ModelConfig, rotary_tables
from llmkernels.quant import QuantizedWeight, formats

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROPE = {  # rope type -> what its parameters must hold beside rope_theta
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says what is wrong with it, and what to do."""


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


class Checkpoint:
    """The files of one checkpoint, opened and checked; tensors are read when asked for."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a directory; give that of a checkpoint, where config.json is")
        raw = read_json(self.path / "config.json")
        self.config = read_config(raw, self.path)
        self.stored = _stored(raw, self.path)
        generation = self.path / "generation_config.json"
        self.generation = {"eos_token_id": raw.get("eos_token_id")}
        self.generation |= read_json(generation) if generation.is_file() else {}
        self._files = {name: open_tensors(self.path / name) for name in self._file_names()}
        self._place = {tensor: file for file in self._files.values() for tensor in file.keys()}  # noqa: SIM118 (not a dict)

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor `name`, which must have this shape."""
        if name not in self._place:
            raise CheckpointError(f"{self.path} has no tensor {name}; download it again, or check its config.json")
        have = tuple(self._place[name].get_slice(name).get_shape())
        if have != shape:
            raise CheckpointError(f"{name} has shape {have}; config.json asks for {shape}: use the one made for it")
        return self._place[name].get_tensor(name)

    def projection(self, name: str, rows: int, columns: int) -> QuantizedWeight | None:
        """The weight [rows columns] of the layer `name`; None where it is not quantized, but a plain tensor."""
        if self.stored is None or self.stored.scheme(name) is None:
            return None
        shapes = self.stored.tensors(name, rows, columns)
        try:
            parts = {part: self.tensor(f"{name}.{part}", *shape) for part, shape in shapes.items()}
            return self.stored.weight(name, parts, columns)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from None

    def _file_names(self) -> list[str]:
        index = self.path / "model.safetensors.index.json"
        if (self.path / "model.safetensors").is_file():
            return ["model.safetensors"]
        if not index.is_file():
            raise CheckpointError(
                f"{self.path} has no model.safetensors and no index of shards; convert it to safetensors"
            )
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise CheckpointError(f"{index}: weight_map must give a file beside it for each tensor; download it again")
        return sorted(set(names.values()))


def read_config(raw: dict[str, Any], path: Path) -> ModelConfig:
    """The ModelConfig that a config.json describes, in the spelling of transformers 5 or of older ones."""
    names = raw.get("architectures") or []
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        what = " or ".join(map(str, names)) or f"model_type {raw.get('model_type')!r} without architectures"
        raise CheckpointError(f"{path} is {what}, which is not supported; the architectures are {', '.join(FAMILIES)}")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path}: hidden_act is {raw['hidden_act']!r}; only 'silu' is supported")

    def size(key: str, default: int | None = None) -> int:
        value = default if raw.get(key) is None else raw[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{path / 'config.json'}: {key} is {value!r}; it must be a positive integer")
        return value

    heads, hidden, layers = size("num_attention_heads"), size("hidden_size"), size("num_hidden_layers")
    kv_heads = size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"{path}: {heads} attention heads are not a multiple of {kv_heads} key-value heads")
    attention_bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        vocab=size("vocab_size"),
        hidden=hidden,
        intermediate=size("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=size("head_dim", hidden // heads),
        context=size("max_position_embeddings", 2048),
        eps=float(raw.get("rms_norm_eps", 1e-6)),
        windows=_windows(raw, layers, family, path),
        rope=_rope(raw, path),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
    )


def load(
    checkpoint: Checkpoint,
    dtype: str,
    device: torch.device,
    length: int,
    quantize: str | None = None,
    quantize_head: str | None = None,
) -> Model:
    """The model, with rotary tables for `length` positions.

    `quantize` rounds every projection of the layers to that scheme, `quantize_head` the one to the vocabulary; scales
    are in the dtype of the model.
    """
    config = checkpoint.config
    if quantize and checkpoint.stored:
        raise CheckpointError(f"{checkpoint.path} is quantized already; leave quantize={quantize!r} out")

    def tensor(name: str, *shape: int) -> torch.Tensor:
        return checkpoint.tensor(name, *shape).to(device, DTYPES[dtype])

    def rounded(weight: torch.Tensor, scheme: str | None) -> Any:
        return quant.quantize(weight, scheme, scale_dtype=weight.dtype) if scheme else weight

    def linear(prefix: str, parts: dict[str, int], width: int, bias: bool) -> Linear:
        stored = [checkpoint.projection(prefix + part, rows, width) for part, rows in parts.items()]
        quantized = [weight for weight in stored if weight is not None]
        weight: Any
        if not quantized:
            weight = torch.cat([tensor(f"{prefix}{part}.weight", rows, width) for part, rows in parts.items()])
            weight = rounded(weight, quantize)
        elif len(quantized) < len(stored):
            raise CheckpointError(
                f"{prefix}: of {', '.join(parts)} only some are quantized, but they are one product here"
            )
        else:
            weight = _joined(prefix, quantized).to(device)
        added = torch.cat([tensor(f"{prefix}{part}.bias", rows) for part, rows in parts.items()]) if bias else None
        return Linear(weight, added)

    def layer(index: int) -> Layer:
        at, hidden, head_dim = f"model.layers.{index}.", config.hidden, config.head_dim
        queries, keys = config.heads * head_dim, config.kv_heads * head_dim
        attention = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        gate_up = {"gate_proj": config.intermediate, "up_proj": config.intermediate}
        return Layer(
            input_norm=tensor(at + "input_layernorm.weight", hidden),
            qkv=linear(at + "self_attn.", attention, hidden, config.qkv_bias),
            q_norm=tensor(at + "self_attn.q_norm.weight", head_dim) if config.qk_norm else None,
            k_norm=tensor(at + "self_attn.k_norm.weight", head_dim) if config.qk_norm else None,
            o=linear(at + "self_attn.", {"o_proj": hidden}, queries, config.o_bias),
            post_norm=tensor(at + "post_attention_layernorm.weight", hidden),
            gate_up=linear(at + "mlp.", gate_up, hidden, config.mlp_bias),
            down=linear(at + "mlp.", {"down_proj": hidden}, config.intermediate, config.mlp_bias),
            window=config.windows[index],
        )

    embedding = tensor("model.embed_tokens.weight", config.vocab, config.hidden)
    head = embedding if config.tied else tensor("lm_head.weight", config.vocab, config.hidden)
    return Model(
        config,
        embedding,
        [layer(index) for index in range(config.layers)],
        tensor("model.norm.weight", config.hidden),
        Linear(rounded(head, quantize_head)),
        *rotary_tables(config, length, device),
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; a checkpoint needs it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}; download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}; it must be a JSON object")
    return value


def _windows(raw: dict[str, Any], layers: int, family: Family, path: Path) -> tuple[int, ...]:
    """transformers' sliding_window counts the query's own position, paged_attention's does not."""
    width = raw.get("sliding_window", 4096)
    if width is None or family.window is None or (family.window == "asked" and not raw.get("use_sliding_window")):
        return (-1,) * layers
    kinds = ["sliding_attention"] * layers
    if family.window == "asked":  # the first layers see everything
        full = raw.get("max_window_layers", 28)
        kinds = raw.get("layer_types") or ["full_attention"] * min(full, layers) + kinds[full:]
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise CheckpointError(f"{path}: layer_types must be full_ or sliding_attention, for each of {layers} layers")
    return tuple(width - 1 if kind == "sliding_attention" else -1 for kind in kinds)


def _rope(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """rope_parameters (transformers 5), or rope_theta with rope_scaling (older)."""
    rope = {"rope_theta": raw.get("rope_theta") or 10000.0}
    rope |= raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope["rope_type"] = kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE:
        raise CheckpointError(f"{path}: rope_type is {kind!r}; the supported ones are {', '.join(ROPE)}")
    for key in ("rope_theta", *ROPE[kind]):
        if isinstance(rope.get(key), bool) or not isinstance(rope.get(key), (int, float)) or rope[key] <= 0:
            raise CheckpointError(f"{path}: rope type {kind} needs {key}, a positive number; it is {rope.get(key)!r}")
    return rope


def _stored(raw: dict[str, Any], path: Path) -> formats.Format | None:
    """How the checkpoint's quantized layers are stored; None where it has none."""
    config = raw.get("quantization_config")
    if not config:
        return None
    try:
        return formats.read(config)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: quantization_config cannot be used: {error}") from None


def _joined(prefix: str, weights: list[QuantizedWeight]) -> QuantizedWeight:
    try:
        return QuantizedWeight.concatenate(weights) if len(weights) > 1 else weights[0]
    except ValueError as error:
        raise CheckpointError(f"{prefix}: its projections cannot be one product: {error}") from None


def open_tensors(file: Path) -> Any:
    """A safetensors file whose header is sound, or CheckpointError."""
    try:
        tensors = safe_open(file, framework="pt")  # checks that sizes, offsets and the file's length agree
        with file.open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; the index names it: download the checkpoint again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}; download it again") from None
    names = [name for name, _ in json.loads(header, object_pairs_hook=list)]
    if len(set(names)) < len(names):
        raise CheckpointError(f"{file} is not a whole safetensors file: a name is there twice; download it again")
    return tensors
