"""A Hugging Face checkpoint on disk -> a Model in memory.

config.json, generation_config.json and *.safetensors, single or sharded; nothing else is read.  No pickle, and no code
that a checkpoint brings along (auto_map) is ever imported.  What is wrong with a checkpoint is said in one line.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llmkernels import quant
from llmkernels.models.config import read_config
from llmkernels.models.files import CheckpointError, open_tensors, read_json
from llmkernels.models.model import Layer, Linear, Model, rotary_tables
from llmkernels.quant import QuantizedWeight, formats

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    """The name of a dtype, which must be one of these; CheckpointError."""
    value = str(value).removeprefix("torch.")
    if value not in allowed:
        raise CheckpointError(f"{name} is {value!r}; use one of auto, {', '.join(allowed)}")
    return value


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

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text: generation_config.json says so, else config.json; one, several or none."""
        ids = self.generation["eos_token_id"]
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(isinstance(token, int) for token in ids):
            raise CheckpointError(f"{self.path}: eos_token_id is {ids!r}; it must be an integer or a list of them")
        return frozenset(ids)

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
