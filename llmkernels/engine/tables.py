"""The block table of the sequences that run, kept from step to step: only what has changed is written."""

from collections.abc import Sequence as Row

import torch

from llmkernels.engine.sequence import Chunk, Sequence


class BlockTable:
    """Their pages, int32, a row each: rows 0 to n - 1 for n sequences.  A row says nothing behind a sequence's pages.

    A new sequence takes the next row; where one has left, the last row moves into its place.  So a step costs what its
    sequences have gained, and one row for each that left, however long they are.

    static: the array stays where it is, and has room for everything that comes.
    """

    def __init__(self, sequences: int = 1, pages: int = 1, static: bool = False, pinned: bool = False):
        self.static = static
        self.array = torch.full((sequences, pages), -1, dtype=torch.int32, pin_memory=pinned)
        self._view = self.array.numpy()
        self._rows: list[Sequence] = []
        self.written = 0  # page ids, since the start

    def update(self, chunks: Row[Chunk]) -> None:
        """Make the table that of the sequences of these chunks, which are all that run; each knows its row then."""
        rows, sequences = self._rows, [chunk.sequence for chunk in chunks]
        new = [s for s in sequences if not (0 <= s.row < len(rows) and rows[s.row] is s)]
        if len(rows) + len(new) > len(chunks):
            alive = {*map(id, sequences)}
            for row in range(len(rows) - 1, -1, -1):
                if id(rows[row]) not in alive:
                    self._leave(row)
        for sequence in new:
            sequence.row, sequence.written = len(rows), 0
            rows.append(sequence)
        widest = max(len(sequence.pages) for sequence in rows)
        if len(rows) > len(self._view) or widest > self._view.shape[1]:
            self._grow(len(rows), widest)
        for sequence in rows:
            written, pages = sequence.written, sequence.pages
            if written < len(pages):
                self._view[sequence.row, written : len(pages)] = pages[written:]
                self.written += len(pages) - written
                sequence.written = len(pages)

    def _leave(self, row: int) -> None:
        last = self._rows.pop()
        if row < len(self._rows):
            self._view[row, : last.written] = self._view[last.row, : last.written]
            self.written += last.written
            self._rows[row], last.row = last, row

    def _grow(self, sequences: int, pages: int) -> None:
        assert not self.static, "more sequences, or longer ones, than the table was made for"
        old = self.array
        height, width = max(2 * sequences, len(old)), max(2 * pages, old.shape[1])
        self.array = torch.full((height, width), -1, dtype=torch.int32)
        self.array[: len(old), : old.shape[1]] = old
        self._view = self.array.numpy()
