"""Draws the next token of each row from its logits: temperature, top-k, top-p, min-p, and one uniform number.

top-p: Holtzman et al. 2019, https://arxiv.org/abs/1904.09751; min-p: Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.
"""

from typing import Any

import numpy as np
import torch

from llmkernels.contract import FLOATS, Case, Cost
from llmkernels.ops.numerics import itemsize, wide
from llmkernels.registry import op

ROUNDOFF = 2.0**-24  # of float32, which kernels compute in


def inputs(rng, rows, vocab, levels=None, masked=0.0, size=3.0, spoil=None, **options):
    """`levels` rounds logits so that they tie; `masked` of them are -inf, as a grammar leaves them."""
    logits = size * rng.standard_normal((rows, vocab))
    if levels:
        logits = np.rint(logits * levels) / levels
    keep = rng.random((rows, vocab)) >= masked
    if vocab:
        keep[np.arange(rows), rng.integers(vocab, size=rows)] = True
    arrays = {"logits": np.where(keep, logits, -np.inf), "uniform": rng.random(rows).astype(np.float32)}
    for name, value in options.items():
        arrays[name] = np.resize(np.asarray(value), rows)
    if spoil:
        name, index, value = spoil
        arrays[name][index] = value
    return arrays


def check(call, sizes):
    if sizes["rows"] and not sizes["vocab"]:
        raise ValueError("sample: logits has vocab=0; there is no token to draw")


RULES = {
    "uniform": (lambda x: (x >= 0) & (x < 1), "it must be at least 0 and below 1"),
    "temperature": (lambda x: (x >= 0) & (x < torch.inf), "it must be finite, 0 for greedy or above"),
    "top_k": (lambda x: x >= 0, "it must be a number of tokens, or 0 for all"),
    "top_p": (lambda x: (x >= 0) & (x <= 1), "it must be from 0 to 1"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "it must be from 0 to 1"),
}


def check_values(call):
    """Every number, read on the host."""
    logits = call["logits"]
    if logits.numel():
        top = logits.amax(-1)  # NaN where a row holds one
        if not bool(torch.isfinite(top).all()):
            row = int((~torch.isfinite(top)).nonzero()[0])
            what = "is -inf everywhere" if top[row] == -torch.inf else f"holds {float(top[row])}"
            raise ValueError(
                f"sample: logits[{row}] {what}; a row needs a finite logit, and no other may be NaN or +inf"
            )
    for name, (fine, words) in RULES.items():
        if (given := call[name]) is not None and not bool(fine(given).all()):
            row = int((~fine(given)).nonzero()[0])
            raise ValueError(f"sample: {name}[{row}] is {given[row].item()}; {words}")


def cost(call, sizes):
    options = sum(call[name] is not None for name in ("temperature", "top_k", "top_p", "min_p"))
    moved = sizes["rows"] * (sizes["vocab"] * itemsize(call["logits"]) + 12 + 4 * options)
    return Cost(moved, 4 * sizes["rows"] * sizes["vocab"])  # subtract, divide, exponential, sum


def weights(logits, temperature=None, top_k=None, top_p=None, min_p=None):
    """exp((logit - largest) / temperature) of the tokens that are kept, 0 of the others: [rows vocab]."""
    scores = _scores(logits, temperature)
    kept = torch.ones_like(scores, dtype=torch.bool)
    if top_k is not None or top_p is not None:
        falling = scores.sort(-1, descending=True).values
        if top_k is not None:
            count = torch.where(top_k > 0, top_k, scores.shape[-1]).long().clamp(max=scores.shape[-1])
            lowest = falling.gather(-1, count[:, None] - 1)
            kept &= scores >= lowest
            falling = falling.masked_fill(falling < lowest, -torch.inf)
        if top_p is not None:
            mass = falling.exp()
            above = mass.cumsum(-1) - mass
            inside = above < top_p.to(mass.dtype)[:, None] * mass.sum(-1, keepdim=True)
            count = torch.where(top_p < 1, inside.sum(-1), scores.shape[-1]).clamp(min=1)
            kept &= scores >= falling.gather(-1, count[:, None] - 1)
    mass = torch.where(kept, scores.exp(), 0)
    return mass if min_p is None else torch.where(mass >= min_p.to(mass.dtype)[:, None], mass, 0)


def _scores(logits, temperature):
    """(logit - largest) / temperature, in this order: exact where logits are close.  Greedy rows are divided by 1."""
    scores = wide(logits) - wide(logits).amax(-1, keepdim=True)
    if temperature is None:
        return scores
    return scores / torch.where(temperature == 0, 1, temperature).to(scores.dtype)[:, None]


def judge(call, tokens):
    """Complaints about drawn tokens: each must be one whose share of [0, 1) holds the uniform number, up to roundoff.

    A kernel in float32 makes these errors.  Score s: subtract, divide or multiply by a reciprocal, scale by log2 e:
    6 roundings of |s|; its exponential: that, and 8 units more.  A sum of n weights in which none goes through more
    than 2 sqrt(n) additions (blocked, in lanes or a tree): 2 sqrt(n) roundings.  A share is a ratio of two such sums.
    A token whose place at a boundary of top-k, top-p or min-p is closer than that may be kept or not.
    """
    rows, vocab = call["logits"].shape
    if tokens.dtype != torch.int64 or tuple(tokens.shape) != (rows,):
        return [f"tokens is {tokens.dtype} {tuple(tokens.shape)}; the contract says int64 ({rows},)"]
    complaints = []
    for row in range(rows):
        one: dict[str, Any] = {name: None if x is None else x[row].double() for name, x in call.items()}
        token = int(tokens[row])
        if not 0 <= token < vocab:
            complaints.append(f"row {row}: token {token} is not in the vocabulary of {vocab}")
        elif one["temperature"] is not None and one["temperature"] == 0:
            if token != (greedy := int((one["logits"] == one["logits"].max()).int().argmax())):
                complaints.append(f"row {row}: token {token}; the lowest id of the largest logit is {greedy}")
        else:
            complaints += [f"row {row}: token {token} {why}" for why in _misdrawn(one, token)]
    return complaints


def _misdrawn(row, token):
    """Why `token` may not be drawn from this row of float64 values: [] or one reason."""
    temperature = 1.0 if row["temperature"] is None else row["temperature"]
    scores = (row["logits"] - row["logits"].max()) / temperature
    near = torch.where(scores.isinf(), 0, 6 * ROUNDOFF * scores.abs())  # what a float32 score may be off by
    mass = scores.exp()
    error = float((mass * (near + 8 * ROUNDOFF)).sum() / mass.sum()) + 2 * ROUNDOFF * len(scores) ** 0.5
    error = 2 * error + 4 * ROUNDOFF
    surely, maybe = mass > 0, mass > 0
    if row["top_k"] is not None and 0 < row["top_k"] < len(scores):
        lowest = scores.sort(descending=True).values[int(row["top_k"]) - 1]
        surely, maybe = surely & (scores >= lowest), maybe & (scores + near >= lowest - 6 * ROUNDOFF * lowest.abs())
    if row["top_p"] is not None and row["top_p"] < 1:
        above = _mass_above(torch.where(surely, mass, 0), scores, scores)
        at_least = _mass_above(torch.where(surely, mass, 0), scores, scores + 2 * near) / mass[maybe].sum()
        above, best = above / mass[surely].sum(), scores == 0
        surely = surely & ((above < row["top_p"] - error) | best)
        maybe = maybe & ((at_least < row["top_p"] + error) | best)
    if row["min_p"] is not None:
        slack = near + 8 * ROUNDOFF
        surely, maybe = surely & (mass * (1 - slack) >= row["min_p"]), maybe & (mass * (1 + slack) >= row["min_p"])
        surely = surely | (scores == 0)
    if not maybe[token]:
        return ["was removed, or has no probability"]
    least, most = torch.where(surely, mass, 0).cumsum(0), torch.where(maybe, mass, 0).cumsum(0)
    before = float(least[token - 1]) if token else 0.0
    from_here = float(most[-1] - most[token - 1]) if token else float(most[-1])
    begin = before / (before + from_here)
    end = float(most[token] / (most[token] + least[-1] - least[token]))
    if begin - error <= row["uniform"] <= end + error:
        return []
    return [f"has the share [{begin:.7f}, {end:.7f}) of [0, 1), and uniform is {float(row['uniform']):.7f}"]


def _mass_above(mass, scores, limits):
    """The mass of all tokens whose score is greater than each limit."""
    rising, order = scores.sort()
    total = torch.cat([torch.zeros(1, dtype=mass.dtype), mass[order].cumsum(0)])
    return total[-1] - total[torch.searchsorted(rising, limits.contiguous(), right=True)]


def _case(name, rows=5, vocab=1000, hostile=False, raises=None, **args):
    return Case(name, {"rows": rows, "vocab": vocab} | args, hostile, raises)


@op(
    """logits[rows vocab]:T uniform[rows]:float32 temperature?[rows]:float32 top_k?[rows]:int32
    top_p?[rows]:float32 min_p?[rows]:float32 -> tokens[rows]:int64""",
    dtypes={"T": FLOATS},
    cases=[
        _case("plain"),
        _case("temperature", temperature=(0.5, 1, 2.5)),
        _case("greedy", temperature=0),
        _case("greedy beside others", temperature=(0, 0.7, 0, 1.3)),
        _case("top-k", top_k=(1, 7, 50, 0)),
        _case("top-p", top_p=(0.1, 0.5, 0.9, 0.99)),
        _case("min-p", min_p=(0.0, 0.02, 0.3)),
        _case("all", rows=16, temperature=(0.8, 1.5, 0), top_k=(40, 0, 300), top_p=(0.9, 1, 0.6), min_p=(0.01, 0, 0.1)),
        _case("vocab of 128k", rows=2, vocab=131072, temperature=(1, 0.7), top_k=(0, 50), top_p=(0.95, 1)),
        _case("ties", hostile=True, levels=1, top_k=(3, 10), top_p=(0.3, 0.9)),
        _case("greedy ties", hostile=True, levels=1, temperature=0),
        _case("all logits equal", hostile=True, size=0, top_k=3, top_p=0.1, min_p=1),
        _case("top-k beyond the vocabulary", hostile=True, vocab=7, top_k=(8, 2**31 - 1)),
        _case("top-p 0 and 1", hostile=True, top_p=(0, 1)),
        _case("min-p 1", hostile=True, min_p=1),
        _case("grammar mask", hostile=True, masked=0.99, temperature=(1, 0, 0.5), top_k=(5, 0), top_p=(0.9, 0.2)),
        _case("one token left", hostile=True, masked=1.0, top_p=0.5, top_k=4),
        _case("one-token vocabulary", hostile=True, vocab=1, temperature=(0, 1), top_k=1, top_p=0.5, min_p=0.5),
        _case("tiny temperature", hostile=True, temperature=(1e-30, 1e-8)),
        _case("huge temperature", hostile=True, temperature=3e38, top_p=0.5),
        _case("large logits", hostile=True, size=1e4, temperature=(1, 2)),
        _case("uniform 0", hostile=True, masked=0.5, spoil=("uniform", slice(None), 0)),
        _case("uniform just below 1", hostile=True, masked=0.5, spoil=("uniform", slice(None), 1 - 2**-24), top_p=0.9),
        *(_case(f"vocab {n}", hostile=True, vocab=n, top_p=0.9) for n in (2, 31, 32003)),
        _case("no rows", hostile=True, rows=0),
        _case("no rows, no vocabulary", hostile=True, rows=0, vocab=0),
        _case("no vocabulary", vocab=0, hostile=True, raises="vocab=0; there is no token"),
        *(_case(name, hostile=True, raises=words, spoil=spoil, temperature=1, top_k=3, top_p=0.5, min_p=0.1)
          for name, words, spoil in (
              ("all masked", r"logits\[1\] is -inf everywhere", ("logits", 1, -np.inf)),
              ("NaN logit", r"logits\[2\] holds nan", ("logits", (2, 9), np.nan)),
              ("infinite logit", r"logits\[0\] holds inf", ("logits", (0, 9), np.inf)),
              ("uniform of 1", r"uniform\[3\] is 1\.0; it must be at least 0 and below 1", ("uniform", 3, 1)),
              ("negative uniform", r"uniform\[0\] is -0\.25", ("uniform", 0, -0.25)),
              ("uniform NaN", r"uniform\[0\] is nan", ("uniform", 0, np.nan)),
              ("negative temperature", r"temperature\[0\] is -1", ("temperature", 0, -1)),
              ("negative top-k", r"top_k\[1\] is -1", ("top_k", 1, -1)),
              ("top-p above 1", r"top_p\[4\] is 1\.5", ("top_p", 4, 1.5)),
              ("min-p below 0", r"min_p\[2\] is -0\.5", ("min_p", 2, -0.5)),
          )),
    ],
    inputs=inputs,
    cost=cost,
    check=check,
    check_values=check_values,
    judge=judge,
)  # fmt: skip
def sample(logits, uniform, *, temperature=None, top_k=None, top_p=None, min_p=None):
    """The token at which the cumulative probability, in the order of token ids, first exceeds `uniform`.

        s[i] = (logits[i] - max logits) / temperature,  then tokens are removed, in this order:
        top_k    keeps i if s[i] is at least the top_k-th largest
        top_p    keeps i if the kept tokens with a larger s have together less than top_p of the kept probability
        min_p    keeps i if exp(s[i]) is at least min_p
        token  = the smallest i with sum over kept j <= i of exp(s[j]) > uniform * sum over kept j of exp(s[j])

    Args:
        logits: one row a sequence; -inf forbids a token.
        uniform: one number in [0, 1) a row; the same number and logits give the same token.
        temperature: per row; 0 is greedy: the largest logit, the lowest id where several tie.  None is 1.
        top_k: per row; 0 and everything above vocab keep all.  None keeps all.
        top_p: per row, 0 to 1; the likeliest token always stays.  None and 1 keep all.
        min_p: per row, 0 to 1.  None and 0 keep all.

    Returns:
        tokens.  Tokens that tie at a boundary of top_k or top_p are kept together.
    """
    if not logits.numel():
        return torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    mass = weights(logits, temperature, top_k, top_p, min_p)
    upto, ids = mass.cumsum(-1), torch.arange(logits.shape[-1], device=logits.device)
    drawn = (upto <= uniform.to(mass.dtype)[:, None] * upto[:, -1:]).sum(-1)
    tokens = torch.minimum(drawn, torch.where(mass > 0, ids, 0).amax(-1))  # rounding may reach past the last one
    if temperature is None:
        return tokens
    greedy = torch.where(logits == logits.amax(-1, keepdim=True), ids, len(ids)).amin(-1)
    return torch.where(temperature == 0, greedy, tokens)
