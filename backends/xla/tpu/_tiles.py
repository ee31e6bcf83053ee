"""How ragged attention is cut into tiles of one sequence each: by XLA, on the device, in the program of the kernel.

    sequence      0: 1 token   1: 7 tokens        2: 3 tokens          tiles of 4 tokens
    tiles         [0]          [0 1 2 3] [4 5 6]  [0 1 2]              and as many empty ones as shapes leave possible

Shapes decide how many tiles there are: tokens // size + seqs, or tokens where that is less.  Empty tiles copy no page.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from ._numbers import LANES, SUBLANES, tile_rows

FIELDS = 10  # numbers of one tile in `scalars`
MOST_UNROLLED = 16  # rows
# From libtpu's schedules (docs/tpu.md): with more keys a block each costs fewer bundles, until registers spill.
SCORES = 384  # of an unrolled update, for each register of the chip: 3 of 8 registers
PREFILL_KEYS = 256
ROWS = 128  # of an update in a loop


@dataclass(frozen=True)
class Tiles:
    """Sizes of the kernel's work.

    Args:
        tokens: of a tile, at most.
        rows: of one KV head in a tile: tokens * group, rounded up to whole vector registers.
        pages: copied and multiplied at once.
        heads_at_once, rows_at_once, keys_at_once: of one update, whose scores and keys should stay in registers.
        unrolled: whether the updates of a block stand one after the other in the program, or in a loop.
        vmem: bytes that the kernel takes, as the cost model sees it.
        vmem_limit: bytes that the compiler may take.
    """

    tokens: int
    rows: int
    pages: int
    heads_at_once: int
    rows_at_once: int
    keys_at_once: int
    unrolled: bool
    vmem: int
    vmem_limit: int


@dataclass(frozen=True)
class Work:
    """Tiles of one call.

    Args:
        scalars: int32 [FIELDS * tiles + 1], field by field: what a grid step knows of its tile, then the first tile
            that has keys.
        token: [tiles, size], the token in each place of a tile; places of no token hold one that exists.
        place: [tokens], where each token lies: tile * size + index.
    """

    scalars: jax.Array
    token: jax.Array
    place: jax.Array
    size: int
    group: int
    rows: int

    def pack(self, x):
        """[tokens kv_heads group dim] -> [tiles kv_heads rows dim]; rows beyond size * group are zeros."""
        tiles, kv_heads, dim = self.token.shape[0], x.shape[1], x.shape[3]
        x = jnp.swapaxes(x[self.token], 1, 2).reshape(tiles, kv_heads, self.size * self.group, dim)
        return jnp.pad(x, ((0, 0), (0, 0), (0, self.rows - x.shape[2]), (0, 0)))

    def unpack(self, x):
        """[tiles kv_heads rows dim] -> [tokens heads dim]."""
        tiles, kv_heads, _, dim = x.shape
        x = x[:, :, : self.size * self.group].reshape(tiles, kv_heads, self.size, self.group, dim)
        x = jnp.swapaxes(x, 1, 2).reshape(tiles * self.size, kv_heads * self.group, dim)
        return x[self.place]

    def pack_words(self, words):
        """The tree mask [tokens words] -> [tiles rows words]."""
        x = jnp.repeat(words[self.token], self.group, axis=1)
        return jnp.pad(x, ((0, 0), (0, self.rows - x.shape[1]), (0, 0)))

    def spread(self, per_head):
        """[heads] -> [kv_heads rows 1]: the number of each row's head."""
        x = jnp.tile(per_head.reshape(-1, self.group), (1, self.size))
        return jnp.pad(x, ((0, 0), (0, self.rows - x.shape[1])))[..., None]


def count_tiles(tokens, seqs, size):
    """As many tiles as any lengths could need."""
    return max(1, min(tokens, tokens // size + seqs))


def cut(seq_lens, cu_seqlens_q, *, tokens, max_pages, page_size, group, tiles, causal, window):
    """The Work of a call; lengths are arrays, all sizes are static."""
    seqs, size = seq_lens.shape[0], tiles.tokens
    count = count_tiles(tokens, seqs, size)
    new = jnp.diff(cu_seqlens_q)
    tiles_before = jnp.cumsum(-(-new // size)) - -(-new // size)
    tile = jnp.arange(count, dtype=jnp.int32)
    seq = jnp.searchsorted(tiles_before, tile, side="right").astype(jnp.int32) - 1
    index = (tile - tiles_before[seq]) * size
    live = jnp.clip(new[seq] - index, 0, size)
    length = jnp.where(live > 0, seq_lens[seq], 0)
    base = length - new[seq]  # position of the sequence's first new token
    position = base + index
    left, right = window[0], 0 if causal else window[1]
    first_key = jnp.maximum(position - left, 0) if left >= 0 else jnp.zeros_like(length)
    end_key = length if right < 0 else jnp.minimum(length, position + live + right)
    end_key = jnp.where((length > 0) & (live > 0), jnp.maximum(end_key, 0), 0)
    first_key = jnp.minimum(first_key, end_key)
    first_page, end_page = first_key // page_size, -(-end_key // page_size)
    blocks = -(-(end_page - first_page) // tiles.pages)
    number = jnp.cumsum(blocks) - blocks
    with_keys = jnp.where(blocks > 0, tile, count)
    after = lax.cummin(jnp.append(with_keys, count)[::-1])[::-1]  # the first tile with keys, from each one on
    fields = [seq * max_pages, first_page, end_page, number, position, first_key, end_key, live, after[1:], base]
    scalars = jnp.concatenate([*(field.astype(jnp.int32) for field in fields), after[:1].astype(jnp.int32)])
    token = jnp.clip(cu_seqlens_q[seq] + index, 0, tokens - 1)[:, None] + jnp.arange(size, dtype=jnp.int32)
    of = jnp.searchsorted(cu_seqlens_q, jnp.arange(tokens, dtype=jnp.int32), side="right").astype(jnp.int32) - 1
    of = jnp.clip(of, 0, seqs - 1)
    inside = jnp.arange(tokens, dtype=jnp.int32) - cu_seqlens_q[of]
    place = (tiles_before[of] + inside // size) * size + inside % size
    return Work(scalars, jnp.minimum(token, tokens - 1), place, size, group, tiles.rows)


def choose(chip, *, tokens, seqs, kv_heads, group, dim, v_dim, page_size, dtype, stored, costly=False, longest=None):
    """Sizes for a call on this chip.

    Decode is bound by copies: a tile is one token, and a block as many pages as keep some copies of at least
    `chip.copy_bytes` in flight.  Prefill is bound by the matrix unit, which wants tiles of `chip.matrix` rows, and its
    keys to be read once for as many rows as VMEM has room for.

    Args:
        costly: whether scores go through a soft cap, slopes or a tree mask, which take registers of their own.
        longest: new tokens of a sequence at most, where the caller knows it.
    """
    mean = -(-tokens // max(seqs, 1))
    longest = min(tokens, longest or (1 if tokens <= seqs else tokens))
    size = 1 if longest <= 1 or mean <= 1 else min(power(longest), power(mean), max(1, chip.tile_rows // group))
    unit = SUBLANES if size * group <= SUBLANES else tile_rows(dtype)
    rows = -(-size * group // unit) * unit
    page_bytes = kv_heads * page_size * (lanes(dim) + lanes(v_dim)) * jnp.dtype(stored).itemsize
    bytes_to_float32 = jnp.dtype(stored).itemsize == 1 and not chip.int8
    narrow = costly or needs_float32(dtype, stored) or bytes_to_float32
    unrolled = rows <= MOST_UNROLLED and not narrow
    wanted = LANES if narrow else chip.decode_keys if unrolled else PREFILL_KEYS
    scores = SCORES * chip.registers
    if unrolled and jnp.dtype(stored).itemsize == 1:  # bytes take registers on their way to what is multiplied
        wanted //= 2
        scores //= 2 if chip.matrix == LANES else 1
    pages = max(1, min(wanted // page_size, chip.pages, chip.vmem_limit // 2 // (4 * page_bytes)))
    height = rows if unrolled else divisor(rows, max(unit, ROWS // 8 if narrow else ROWS), unit)
    at_once = divisor(kv_heads, max(1, scores // (rows * pages * page_size)), 1) if unrolled else 1
    keys = pages * page_size
    fewer = narrow and keys > chip.narrow_keys and page_size % chip.narrow_keys == 0
    row_bytes = (2 * LANES + lanes(v_dim)) * 4 + 2 * (lanes(dim) + lanes(v_dim)) * jnp.dtype(dtype).itemsize
    vmem = 2 * pages * page_bytes + kv_heads * rows * row_bytes
    return Tiles(
        size, rows, pages, at_once, height, chip.narrow_keys if fewer else keys, unrolled, vmem, chip.vmem_limit
    )


def needs_float32(dtype, stored):
    """Whether keys are float32 on their way: as such, or between 8 bits and bfloat16, or as bits of a float16."""
    return jnp.dtype(dtype) == jnp.float32 or jnp.dtype(stored) not in (jnp.bfloat16, jnp.int8)


def divisor(of, most, unit):
    """The largest multiple of `unit` up to `most` that divides `of`."""
    return max(n for n in range(unit, max(most, unit) + 1, unit) if of % n == 0)


def lanes(dim):
    return -(-dim // LANES) * LANES


def power(n):
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
