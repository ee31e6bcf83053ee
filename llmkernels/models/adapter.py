"""Adapters in PEFT's format on disk: LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685.

An adapter adds scale * B A to some projections.  Read are adapter_config.json and adapter_model.safetensors; what would
mean other arithmetic than that (DoRA, biases, trained embeddings, changed base weights) is refused by its name.
https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmkernels.models.files import CheckpointError, open_tensors, read_json
from llmkernels.models.model import Linear, Model

MOST_RANK = 512
FILES = ("adapter_config.json", "adapter_model.safetensors")
TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_([AB])\.weight")
REFUSED = (  # keys of the config that change the arithmetic, unless they are empty
    *("use_dora", "modules_to_save", "fan_in_fan_out", "layer_replication"),
    *("lora_bias", "use_qalora", "use_bdlora", "trainable_token_indices", "target_parameters", "arrow_config"),
    *("alora_invocation_tokens", "megatron_config"),
)
PATTERN = re.compile(r"[\w.^$|\[\]\\-]*([*+?][\w.^$|\[\]\\-]*){0,3}")  # no groups: nothing repeats what repeats
BASE_CHANGED = ("pissa", "olora", "corda", "loftq")  # ways to begin that leave a remainder in the base weights


class Pair(NamedTuple):
    """lora_A [rank in] and lora_B [out rank] of a module, and what their product is multiplied by."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def modules(model: Model) -> Iterator[tuple[str, Linear, int, int, int]]:
    """What adapters may change: its name, the product it is a part of, its first row there, its rows and columns."""
    config = model.config
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden, inner = config.hidden, config.intermediate
    for index, layer in enumerate(model.layers):
        for linear, block, width, parts in (
            (layer.qkv, "self_attn", hidden, {"q_proj": queries, "k_proj": keys, "v_proj": keys}),
            (layer.o, "self_attn", queries, {"o_proj": hidden}),
            (layer.gate_up, "mlp", hidden, {"gate_proj": inner, "up_proj": inner}),
            (layer.down, "mlp", inner, {"down_proj": hidden}),
        ):
            start = 0
            for part, rows in parts.items():
                yield f"{index}.{block}.{part}", linear, start, rows, width
                start += rows


def read(path: Path, model: Model) -> dict[str, Pair]:
    """By module what an adapter adds to it."""
    if not path.is_dir():
        raise CheckpointError(f"{path.name} is not a directory; give that of an adapter, where {FILES[0]} is")
    sizes = _read_config(path / FILES[0])
    tensors = open_tensors(path / FILES[1])
    found: dict[str, dict[str, str]] = {}
    for name in tensors.keys():  # noqa: SIM118 (not a dict)
        match = TENSOR.fullmatch(name)
        if not match:
            raise CheckpointError(
                f"{path.name}: {name} is not supported; adapters may change the projections of layers"
            )
        index, block, part, side = match.groups()
        found.setdefault(f"{int(index)}.{block}.{part}", {})[side] = name
    pairs = {}
    for key, _, _, rows, width in modules(model):
        if sides := found.pop(key, None):
            rank, scale = sizes(f"model.layers.{key}")
            shapes = {"A": (rank, width), "B": (rows, rank)}
            for side, shape in shapes.items():
                have = tuple(tensors.get_slice(sides[side]).get_shape()) if side in sides else None
                if have != shape:
                    what = "missing" if have is None else f"of shape {have}"
                    raise CheckpointError(f"{path.name}: lora_{side} of {key} is {what}; this model needs {shape}")
            pairs[key] = Pair(tensors.get_tensor(sides["A"]), tensors.get_tensor(sides["B"]), scale)
    if found:
        raise CheckpointError(f"{path.name}: it changes {', '.join(sorted(found)[:3])}, which this model does not have")
    if not pairs:
        raise CheckpointError(f"{path.name}: {FILES[1]} holds nothing; save the adapter again")
    return pairs


def _read_config(file: Path) -> Callable[[str], tuple[int, float]]:
    """Rank and scale of a module by its name; CheckpointError where the adapter is none of the kind that is read here.

    The first pattern of rank_pattern, and of alpha_pattern, that the end of a module's name matches says them.
    """
    raw = read_json(file)
    name = file.parent.name
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{name}: peft_type is {raw.get('peft_type')!r}; only LORA is supported")
    for key in REFUSED:
        if raw.get(key):
            raise CheckpointError(f"{name}: {key} is {raw[key]!r:.60}, which is not supported; train it without")
    if raw.get("bias", "none") != "none":
        raise CheckpointError(f"{name}: bias is {raw['bias']!r}; only adapters with bias='none' are supported")
    begun = raw.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(BASE_CHANGED):
        raise CheckpointError(f"{name}: init_lora_weights is {begun!r}, which changes the base weights; convert it")
    ranks, alphas = (_patterns(name, key, raw) for key in ("rank_pattern", "alpha_pattern"))
    for rank in (raw.get("r"), *ranks.values()):
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MOST_RANK:
            raise CheckpointError(f"{name}: r is {rank!r}; it must be an integer from 1 to {MOST_RANK}")
    for alpha in (raw.get("lora_alpha"), *alphas.values()):
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise CheckpointError(f"{name}: lora_alpha is {alpha!r}; it must be a number")

    def sizes(module: str) -> tuple[int, float]:
        rank, alpha = (
            next((value for pattern, value in patterns.items() if pattern.match(module)), raw[default])
            for patterns, default in ((ranks, "r"), (alphas, "lora_alpha"))
        )
        return rank, alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)

    return sizes


def _patterns(name: str, key: str, raw: dict[str, Any]) -> dict[re.Pattern[str], Any]:
    """A pattern -> its rank or alpha.  Patterns are regular expressions: those that could take for ever are refused."""
    given = raw.get(key) or {}
    if not isinstance(given, dict) or not all(PATTERN.fullmatch(pattern) for pattern in given):
        raise CheckpointError(f"{name}: {key} is {given!r:.80}; names of modules with up to 3 of * + ? are supported")
    try:
        return {re.compile(rf"(.*\.)?({pattern})$"): value for pattern, value in given.items()}
    except re.error as error:
        raise CheckpointError(f"{name}: {key} holds no regular expression: {error}") from None
