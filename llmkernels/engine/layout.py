"""What a forward pass reads of each token, as plain lists: the arrays made of them."""

from collections.abc import Mapping
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from llmkernels.engine.sequence import Chunk
from llmkernels.models.model import Batch

LEAST_PAGES = 8  # of a block table: short sequences share one kind of step


@dataclass
class Layout:
    """Sequences one after the other, each with some tokens, in the order of their rows in the block table.

    tokens, positions, slots: of each token; a slot is page * page_size + offset, -1 where nothing is to be kept.
    starts: where each sequence's tokens begin, and how many there are in all.
    lengths: each sequence's keys, its new tokens among them; 0: its tokens see nothing, and stand for nobody.
    most: the tokens of the sequence that has the most of them.
    pages: those of the longest sequence.
    rows: the tokens whose logits are wanted, in the order in which the chunks stand.
    sees: for each token the word of the tree's mask, where guesses are more than chains; else empty.
    adapters: for each token its adapter, -1 for none; empty where none has one.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    lengths: list[int] = field(default_factory=list)
    most: int = 1
    pages: int = 1
    rows: list[int] = field(default_factory=list)
    sees: list[int] = field(default_factory=list)
    adapters: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, chunks: Row[Chunk], page_size: int) -> "Layout":
        """Of each chunk its tokens, and behind them its guesses."""
        ordered = sorted(chunks, key=lambda chunk: chunk.sequence.row)
        layout = cls(pages=max(len(chunk.sequence.pages) for chunk in chunks))
        tokens, positions, slots = layout.tokens, layout.positions, layout.slots
        adapted = any(chunk.sequence.adapter >= 0 for chunk in chunks)
        branching = any(chunk.branches() for chunk in chunks if chunk.guesses)
        firsts: dict[int, int] = {}  # row of a chunk that samples -> its last token
        for chunk in ordered:
            sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.count
            pages = sequence.pages
            if chunk.count == 1:  # nearly always
                tokens.append(sequence.tokens[start])
                positions.append(start)
                slots.append(pages[start // page_size] * page_size + start % page_size)
            else:
                tokens += sequence.tokens[start:end]
                positions += range(start, end)
                slots += [slot(pages, p, page_size) for p in range(start, end)]
            firsts[sequence.row] = len(tokens) - 1
            for node, token in enumerate(chunk.guesses):
                tokens.append(token)
                positions.append(end - 1 + len(chunk.path(node)))
                slots.append(slot(pages, end + node, page_size))
            count = chunk.count + len(chunk.guesses)
            layout.starts.append(len(tokens))
            layout.lengths.append(start + count)
            layout.most = max(layout.most, count)
            if branching:
                layout.sees += _sight(chunk)
            if adapted:
                layout.adapters += [sequence.adapter] * count
        for chunk in chunks:
            if chunk.samples:
                first = firsts[chunk.sequence.row]
                layout.rows += range(first, first + 1 + len(chunk.guesses))
        return layout

    @classmethod
    def one_each(cls, sequences: int, pages: int, placed: Mapping[int, tuple[int, int, int]]) -> "Layout":
        """A token for each of so many sequences: row -> token, position and slot; of no meaning for the other rows.

        The logits of all those placed are wanted, in their order.
        """
        values = [placed.get(row, (0, 0, -1)) for row in range(sequences)]
        tokens, positions, slots = map(list, zip(*values, strict=True))
        lengths = [position + 1 if row in placed else 0 for row, position in enumerate(positions)]
        return cls(tokens, positions, slots, [*range(sequences + 1)], lengths, pages=pages, rows=[*placed])

    def arrays(self, table: torch.Tensor, device: torch.device) -> "Arrays":
        """New ones.  table: [sequences max_pages], of which as much is used as is filled."""
        array = partial(torch.tensor, dtype=torch.int32, device=device)
        long = array([self.tokens, self.positions, self.slots], dtype=torch.int64)
        sees = array(self.sees, dtype=torch.uint32)[:, None]
        filled = table[: len(self.lengths), : table_width(self.pages)].to(device)
        return Arrays(long, array(self.adapters), sees, array(self.lengths), array(self.starts), filled)

    def batch(self, arrays: "Arrays", page_size: int) -> Batch:
        """What the model reads, of arrays that begin with this layout; the logits of all tokens are wanted."""
        count, new = len(self.lengths), len(self.tokens)
        tokens, positions, slots = arrays.long[:, :new]
        table = arrays.table[:count, : table_width(self.pages)]
        return Batch(
            tokens=tokens,
            positions=positions,
            slots=slots,
            block_table=table,
            seq_lens=arrays.lengths[:count],
            cu_seqlens_q=arrays.starts[: count + 1],
            rows=None,
            max_seqlen_q=round_up(self.most),
            max_seqlen_k=table.shape[1] * page_size,
            tree_mask=arrays.sees[:new] if self.sees else None,
            adapters=arrays.adapters[:new] if self.adapters else None,
        )


class Arrays(NamedTuple):
    """The lists of a layout as arrays.  long: int64 [3 tokens]: tokens, positions, slots.  sees: uint32 [tokens 1].

    int32: adapters [tokens], lengths [sequences], starts [sequences+1], table [sequences pages].
    """

    long: torch.Tensor
    adapters: torch.Tensor
    sees: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    table: torch.Tensor


def slot(pages: list[int], position: int, page_size: int) -> int:
    """Where the keys of a token lie whose sequence has these pages."""
    return pages[position // page_size] * page_size + position % page_size


def round_up(count: int) -> int:
    """The next power of two, so that few kinds of call occur."""
    return 1 << (count - 1).bit_length()


def table_width(pages: int) -> int:
    """The columns of a block table for sequences of so many pages: a power of two, so that few widths occur."""
    return max(LEAST_PAGES, round_up(pages))


def _sight(chunk: Chunk) -> list[int]:
    """The word of each token whose bits say which new tokens of its sequence it sees; there are at most 32."""
    words = [(2 << i) - 1 for i in range(chunk.count)]
    for node in range(len(chunk.guesses)):
        words.append(words[chunk.count - 1] | sum(1 << chunk.count + i for i in chunk.path(node)))
    return words
