"""What a forward pass reads of each token, as plain lists: tables.py and graphs.py make arrays of them."""

from collections.abc import Mapping
from collections.abc import Sequence as Row
from dataclasses import dataclass, field

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

    def batch(self, table: torch.Tensor, page_size: int, device: torch.device) -> Batch:
        """New arrays.  table: [sequences max_pages], of which as much is used as is filled."""

        def array(values: list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        width = min(table_width(self.pages), table.shape[1])
        return Batch(
            tokens=array(self.tokens, torch.int64),
            positions=array(self.positions, torch.int64),
            slots=array(self.slots, torch.int64),
            block_table=table[: len(self.lengths), :width].to(device),
            seq_lens=array(self.lengths, torch.int32),
            cu_seqlens_q=array(self.starts, torch.int32),
            rows=None if self.rows == [*range(len(self.tokens))] else array(self.rows, torch.int64),
            max_seqlen_q=round_up(self.most),
            max_seqlen_k=width * page_size,
            tree_mask=array(self.sees, torch.uint32)[:, None] if self.sees else None,
            adapters=array(self.adapters, torch.int32) if self.adapters else None,
        )


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
