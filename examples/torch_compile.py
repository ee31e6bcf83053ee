"""The ops in a user's model under torch.compile(fullgraph=True): one graph for every number of tokens.

    python examples/torch_compile.py

Nothing is registered or wrapped: inside torch.compile the functions of llmkernels become nodes of the graph, and what
surrounds them is fused as usual.  Which backend answers is decided when the graph runs, not when it is compiled.
"""

import torch

import llmkernels
from llmkernels import ledger

HIDDEN, HEADS, KV_HEADS, DIM, PAGE, MAX_PAGES = 128, 4, 2, 32, 16, 8


class Attention(torch.nn.Module):
    """A layer of a decoder over a paged cache."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.Parameter(torch.ones(HIDDEN))
        self.qkv = torch.nn.Parameter(torch.randn((HEADS + 2 * KV_HEADS) * DIM, HIDDEN) / HIDDEN**0.5)
        self.out = torch.nn.Parameter(torch.randn(HIDDEN, HEADS * DIM) / HIDDEN**0.5)

    def forward(self, x, k_cache, v_cache, slots, block_table, seq_lens, cu_seqlens_q):
        qkv = llmkernels.norm_linear_activation(x, self.qkv, norm_weight=self.norm).unflatten(1, (-1, DIM))
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)
        llmkernels.write_kv(k, v, k_cache, v_cache, slots)  # in place, inside the graph
        a = llmkernels.paged_attention(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q)
        return x + torch.tanh(llmkernels.norm_linear_activation(a.flatten(1), self.out, norm="none"))


def batch(*new: int) -> tuple[torch.Tensor, ...]:
    """Fresh sequences of these lengths, one page after the other."""
    pages = [-(-n // PAGE) for n in new]
    table = torch.full((len(new), MAX_PAGES), -1, dtype=torch.int32)  # of one width, as engines keep it
    slots = []
    for s, count in enumerate(pages):
        first = sum(pages[:s])
        table[s, :count] = torch.arange(first, first + count)
        slots += range(first * PAGE, first * PAGE + new[s])
    caches = (torch.zeros(64, PAGE, KV_HEADS, DIM) for _ in "kv")
    starts = torch.tensor([0, *new]).cumsum(0)
    lengths = torch.tensor(new)
    return torch.randn(sum(new), HIDDEN), *caches, torch.tensor(slots), table, lengths.int(), starts.int()


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    layer = Attention()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    compiled(*batch(3, 20))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for new in ((5, 40), (17, 2), (64, 100)):
            given = batch(*new)
            eager = layer(*(x.clone() for x in given))
            ledger.reset()
            difference = (compiled(*given) - eager).abs().max()
            answered = {op: list(backends) for op, backends in ledger.read().items()}
            print(f"{sum(new):4} tokens: differs by {difference:.1e}; {answered}")
            assert difference < 1e-5


if __name__ == "__main__":
    main()
