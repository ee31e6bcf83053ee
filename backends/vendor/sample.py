"""sample through torch's topk, cumsum and searchsorted, in float32."""

import torch

from . import _common
from ._common import refuse_device

TRAITS = {"graph_safe": True, "accumulate": "float32"}  # not deterministic: torch's cumsum on CUDA is not

HEAD = 256  # how many of the largest scores top-p looks at before all are sorted


def refuse(logits, uniform, **options):
    yield from refuse_device(logits)


def run(logits, uniform, *, temperature=None, top_k=None, top_p=None, min_p=None):
    if not logits.numel():
        return torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    greedy = None
    if temperature is not None:
        greedy = logits.argmax(-1)  # the first of several
        if _common.on_host(logits) and not bool(temperature.any()):
            return greedy
    scores = logits.float()
    scores = scores - scores.amax(-1, keepdim=True)
    if temperature is not None:
        scores /= torch.where(temperature == 0, 1, temperature)[:, None]
    mass = scores.exp()
    if top_k is not None or top_p is not None:
        mass = mass.masked_fill(scores < _lowest(scores, mass, top_k, top_p), 0)
    if min_p is not None:
        mass.masked_fill_(mass < min_p[:, None], 0)
    upto = mass.cumsum(-1)
    total = upto[:, -1:]
    point = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(upto, point, right=True).squeeze(1)
    return tokens if greedy is None else torch.where(temperature == 0, greedy, tokens)


def _lowest(scores, mass, top_k, top_p):
    """The smallest score of a row that top-k and top-p keep: [rows, 1], -inf where they keep all."""
    falling, lowest = _falling(scores, mass, top_k, top_p), scores.new_full((len(scores), 1), -torch.inf)
    if top_k is not None:
        at = top_k.long().clamp(1, falling.shape[1])[:, None] - 1
        all_stay = ((top_k == 0) | (top_k >= scores.shape[1]))[:, None]
        lowest = torch.where(all_stay, lowest, falling.gather(1, at))
        falling = falling.masked_fill(falling < lowest, -torch.inf)
        mass = mass.masked_fill(scores < lowest, 0)
    if top_p is None:
        return lowest
    heavy = falling.exp()
    inside = heavy.cumsum(-1) - heavy < top_p[:, None] * mass.sum(-1, keepdim=True)
    at = inside.sum(-1, keepdim=True).clamp_(min=1) - 1
    return torch.where(top_p[:, None] < 1, falling.gather(1, at), lowest)


def _falling(scores, mass, top_k, top_p):
    """The scores in falling order, or as many of them as every row's top_k and top_p need."""
    if not _common.on_host(scores):
        return scores.sort(-1, descending=True).values
    size = HEAD if top_k is None else max(HEAD, int(top_k.max()))
    if 4 * size < scores.shape[1]:
        falling = scores.topk(size, -1).values
        enough = torch.ones(len(scores), dtype=torch.bool)
        if top_p is not None:  # the margin is far beyond the error of the two sums
            enough = (falling.exp().sum(-1) >= top_p * mass.sum(-1) * (1 + 1e-4)) | (top_p >= 1)
            enough = enough if top_k is None else enough | (top_k > 0)
        if bool(enough.all()):
            return falling
    return scores.sort(-1, descending=True).values
