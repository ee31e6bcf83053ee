"""The arrays of recorded steps, which stay where they are, and the sizes that steps are filled up to on a GPU."""

from dataclasses import replace

import torch

from llmkernels.engine.layout import Arrays, Layout, round_up
from llmkernels.engine.tables import BlockTable
from llmkernels.models.model import Model

MOST_TOKENS = 64  # of a step with several for a sequence; beyond, on a CPU, the work outweighs Python
MOST_ON_A_GPU = 256
PARTS = "tokens", "positions", "slots", "adapters", "sees", "lengths", "starts"  # of a layout, as its arrays stand
MOST_EXACT = 6  # tokens for each sequence on average that are not filled up to the next 8


class Inputs:
    """The static arrays of steps: as a step sees them, and as Python fills them.

    most: tokens of a step with several for a sequence.  arrays: of steps.  x: [tokens hidden], where a replay finds
    their embeddings.  ends: x and residual of the rows whose logits are asked for, where they are not all.
    """

    def __init__(self, table: BlockTable, model: Model, most: int):
        place = model.device
        pin = place.type == "cuda"
        sequences = len(table.array)
        count = max(sequences, most)
        long = torch.zeros(3, count, dtype=torch.int64, pin_memory=pin)  # tokens, positions, slots
        adapters = torch.zeros(count, dtype=torch.int32, pin_memory=pin)
        sees = torch.zeros(count, 1, dtype=torch.uint32, pin_memory=pin)
        lengths, starts = (torch.zeros(sequences + 1, dtype=torch.int32, pin_memory=pin) for _ in range(2))
        self._staged = Arrays(long, adapters, sees, lengths, starts, table.array)
        self.arrays = self._staged if place.type == "cpu" else Arrays(*(array.to(place) for array in self._staged))
        self._views = [array.numpy() for array in (*long, adapters, sees[:, 0], lengths, starts)]
        self.x, *self.ends = torch.empty(3, count, model.config.hidden, dtype=model.dtype, device=place)

    def set(self, layout: Layout) -> None:
        """Fill in a layout."""
        for view, name in zip(self._views, PARTS, strict=True):
            if values := getattr(layout, name):
                view[: len(values)] = values
        if self.arrays is not self._staged:
            for there, staged in zip(self.arrays, self._staged, strict=True):
                there.copy_(staged, non_blocking=True)  # done before these are set again: a step ends with its tokens


def filled(layout: Layout) -> Layout:
    """This layout with rows of nobody behind it, so that few sizes occur; the logits of all rows are asked for.

    one token each     sequence 0 | sequence 1 | ... | of no sequence, a token each
    several            sequence 0: its tokens | sequence 1: fewer | ... | one that has no keys and the tokens left over

    More than MOST_TOKENS hold a chunk of a prompt: of its logits hardly any are wanted, so only those are asked for.
    """
    tokens, own = len(layout.tokens), len(layout.lengths)
    sequences, each = rounded(own), -(-tokens // own)
    each = each if each <= MOST_EXACT else -(-each // 8) * 8
    more = sequences * each - tokens
    if large := layout.most > 1 and tokens + more > MOST_TOKENS:
        sequences, more = round_up(own), rounded(tokens) - tokens
    if layout.most > 1:
        starts = [*layout.starts, *[tokens] * (sequences - own), tokens + more]
    else:
        starts = [*range(sequences + 1)]
    return replace(
        layout,
        tokens=layout.tokens + [0] * more,
        positions=layout.positions + [0] * more,
        slots=layout.slots + [-1] * more,
        adapters=layout.adapters and layout.adapters + [-1] * more,
        sees=layout.sees and layout.sees + [1] * more,
        starts=starts,
        lengths=layout.lengths + [0] * (len(starts) - 1 - own),
        most=round_up(max(layout.most, more)) if layout.most > 1 else 1,
        rows=layout.rows if large else [*range(tokens + more)],
    )


def rounded(count: int) -> int:
    """The number of rows of a step for so many sequences: at most an eighth more, so that few sizes occur."""
    step = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // step) * step
