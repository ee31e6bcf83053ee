"""What an LLM was asked for, checked, and what its checkpoint says about answering."""

from dataclasses import replace
from typing import Any

import torch

from llmkernels.engine.cache import KVCache
from llmkernels.engine.forward import Forward
from llmkernels.engine.params import SamplingParams
from llmkernels.engine.speculative import Speculation, Speculator
from llmkernels.models.config import ModelConfig
from llmkernels.models.files import CheckpointError
from llmkernels.models.weights import DTYPES, Checkpoint, load, one_of

CACHE_DTYPES = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def read_draft(wish: Speculation | None, config: ModelConfig, length: int) -> Checkpoint | None:
    """The draft model's checkpoint, if one is wished for and fits."""
    if wish and wish.width > 1 and max(config.windows) >= 0:
        raise ValueError(
            f"speculation: width is {wish.width}, and this model has sliding windows, which a tree of guesses cannot "
            "have: use width=1"
        )
    if wish is None or wish.draft is None:
        return None
    draft = Checkpoint(wish.draft)
    one_of("dtype of the draft", draft.config.dtype, DTYPES)
    if draft.config.vocab != config.vocab:
        raise CheckpointError(
            f"{draft.path}: its vocabulary has {draft.config.vocab} tokens, and the model's {config.vocab}; a draft "
            "model needs the same one"
        )
    if draft.config.context < length:
        raise CheckpointError(
            f"{draft.path}: it reads {draft.config.context} tokens, and this LLM {length}; give max_length="
            f"{draft.config.context}"
        )
    return draft


def build_speculator(
    wish: Speculation | None, draft: Checkpoint | None, length: int, target: Forward
) -> Speculator | None:
    """Who guesses, if that is wished for; where there is a draft model, with its own memory for as many pages."""
    if wish is None:
        return None
    if draft is None:
        return Speculator(wish)
    kind, device = draft.config.dtype, target.model.device
    model = load(draft, kind, device, length)
    cache = KVCache(draft.config, target.cache.k.shape[1], target.cache.page_size, DTYPES[kind], device)
    recorded = target.graphs.most if target.graphs else 0
    return Speculator(wish, Forward(model, cache, target.table, recorded, target.compiled))


def default_params(generation: dict[str, Any]) -> SamplingParams:
    """What generation_config.json asks for: greedy, unless it says do_sample."""
    params = SamplingParams()
    if generation.get("do_sample"):
        wishes = {name: generation[name] for name in ("top_k", "top_p", "min_p") if generation.get(name) is not None}
        params = replace(params, temperature=generation.get("temperature") or 1.0, **wishes)
    return params


def as_list(prompts: Any) -> list[Any]:
    """One prompt, a text or token ids, or many: always a list of prompts."""
    many = isinstance(prompts, list | tuple) and not (prompts and isinstance(prompts[0], int))
    return list(prompts) if many else [prompts]
