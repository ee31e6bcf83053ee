"""Where keys and values live: pages of fixed size, handed out and taken back by a pool."""

from collections.abc import Iterable

import torch

from llmkernels.engine.model import ModelConfig


class PagePool:
    """Which pages are free.  Plain integers; the arrays are KVCache's.

    pages: how many there are; their ids are 0 to pages - 1.
    """

    def __init__(self, pages: int):
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))  # a stack: the page freed last, maybe still in cache, goes first
        self._used: set[int] = set()

    @property
    def free(self) -> int:
        """How many pages are free."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` pages that now belong to the caller, or None (and nothing taken) where fewer are free."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        self._used.update(taken)
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        """The pages are free again.  A page that was not taken is a bug of the caller: ValueError."""
        for page in pages:
            if page not in self._used:
                raise ValueError(f"page {page} was given back but is not in use")
            self._used.remove(page)
            self._free.append(page)


class KVCache:
    """The pages' memory: k[layer] and v[layer] are [pages page_size kv_heads dim].

    k_scale[layer], v_scale[layer]: float32 [kv_heads], what int8 and FP8 caches are multiplied by; None for others.
    """

    def __init__(self, config: ModelConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device):
        shape = (config.layers, pages, page_size, config.kv_heads, config.head_dim)
        self.page_size = page_size
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.k_scale: list[torch.Tensor | None] = [None] * config.layers
        self.v_scale: list[torch.Tensor | None] = [None] * config.layers

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
