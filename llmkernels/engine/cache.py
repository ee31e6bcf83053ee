"""Where keys and values live: the memory of the pages that a PagePool hands out."""

from collections.abc import Sequence

import torch

from llmkernels.discovery import cache_axes
from llmkernels.models.config import ModelConfig
from llmkernels.settings import current


class KVCache:
    """The pages' memory: k[layer] and v[layer] are [pages page_size kv_heads dim], whatever their order in memory.

    The order is what the backend that was asked for states as its CACHE_AXES (discovery.cache_axes); else as the shape.
    k_scale[layer], v_scale[layer]: float32 [kv_heads], what int8 and FP8 caches are multiplied by; None for others.
    """

    def __init__(self, config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device):
        shape = (config.layers, pages, page_size, config.kv_heads, config.head_dim)
        axes = (0, *(1 + axis for axis in cache_axes(current().backend)))
        self.page_size = page_size
        self.k = torch.empty_permuted(shape, axes, dtype=dtype, device=device)
        self.v = torch.empty_permuted(shape, axes, dtype=dtype, device=device)
        self.k_scale: list[torch.Tensor | None] = [None] * config.layers
        self.v_scale: list[torch.Tensor | None] = [None] * config.layers

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Pages (source, destination), where no destination is the source of a pair behind it."""
        arrays = self.k.view(torch.uint8), self.v.view(torch.uint8)  # bytes: not every dtype can be indexed
        for source, destination in pairs:  # few; on a CPU half the time of indexing
            for held in arrays:
                held[:, destination].copy_(held[:, source])

    def move(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Slots (source, destination), a slot being page * page_size + offset: all are read before any is written."""
        places = [[divmod(slot, self.page_size) for slot in pair] for pair in pairs]
        (page, offset), (to_page, to_offset) = torch.tensor(places, device=self.k.device).permute(1, 2, 0)
        for held in (self.k.view(torch.uint8), self.v.view(torch.uint8)):
            held[:, to_page, to_offset] = held[:, page, offset]

    def scales_from(self, sample: "KVCache", pages: int) -> None:
        """Set the scales so that the largest key and value in the first `pages` pages of `sample` just fit."""
        kind = self.k.dtype
        limit = torch.finfo(kind).max if kind.is_floating_point else torch.iinfo(kind).max
        for layer in range(self.k.shape[0]):
            for held, scales in ((sample.k, self.k_scale), (sample.v, self.v_scale)):
                largest = held[layer, :pages].float().abs().amax((0, 1, 3))
                scales[layer] = largest.clamp(min=1e-6) / limit


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page: keys and values of all layers."""
    return 2 * config.layers * page_size * config.kv_heads * config.head_dim * dtype.itemsize
