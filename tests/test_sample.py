"""sample keeps the tokens that transformers keeps, draws them as often as it should, and its judge is no pushover."""

import pytest
import torch

import llmkernels
from llmkernels.inputs import inputs
from llmkernels.ops.sample import judge, weights
from llmkernels.registry import OPS

CONTRACT = OPS["sample"].contract
CHOICES = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.6},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.03},
    {"temperature": 0.4, "top_k": 200, "top_p": 0.97, "min_p": 0.001},
]


def per_row(rows, **options):
    kinds = {"top_k": torch.int32}
    return {name: torch.full((rows,), value, dtype=kinds.get(name, torch.float32)) for name, value in options.items()}


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_keeps_what_transformers_keeps(choice):
    from transformers.generation import logits_process as hf

    logits = 3 * torch.randn(20, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    warpers = {
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    warped = logits
    for name, warper in warpers.items():
        if name in choice:
            warped = warper(choice[name])(None, warped)
    want = warped.softmax(-1)
    ours = weights(logits, **{name: x.double() for name, x in per_row(20, **choice).items()})
    got = ours / ours.sum(-1, keepdim=True)
    assert torch.equal(got > 0, want > 0)
    # transformers never sees float32 options, which is what 0.7 is here
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("choice", [{}, {"temperature": 1.5, "top_k": 12}, {"top_p": 0.8}, {"min_p": 0.05}], ids=str)
def test_draws_each_token_as_often_as_its_probability(choice):
    draws, generator = 40_000, torch.Generator().manual_seed(7)
    logits = 1.5 * torch.randn(1, 60, generator=generator)
    uniform = torch.rand(draws, generator=generator)
    tokens = llmkernels.sample(logits.expand(draws, -1), uniform, **per_row(draws, **choice), backend="reference")
    share = weights(logits.double(), **per_row(1, **choice))[0]
    share = share / share.sum()
    counts = torch.bincount(tokens, minlength=60).double()
    assert bool((counts[share == 0] == 0).all())
    expected = draws * share[share > 0]
    rare = expected < 5  # too few for the test's approximation: counted as one
    expected, counts = (
        torch.cat([x[~rare], x[rare].sum()[None]]) if bool(rare.any()) else x for x in (expected, counts[share > 0])
    )
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    p_value = torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2)
    assert p_value > 0.001, f"chi-square {float(statistic):.1f} with {len(counts)} classes"


def by_sorting(logits, uniform, temperature, top_k, top_p, min_p):
    """Another correct sampler, in float32, with sums in another order."""
    logits = logits.float()
    tokens = []
    for row in range(len(logits)):
        t = 1.0 if temperature is None else float(temperature[row])
        if t == 0:
            tokens.append(int((logits[row] == logits[row].max()).nonzero()[0]))
            continue
        scores = (logits[row] - logits[row].max()) * (1 / torch.tensor(t))
        falling, order = scores.sort(descending=True)
        if top_k is not None and 0 < top_k[row] < len(order):
            falling = falling.masked_fill(falling < falling[int(top_k[row]) - 1], -torch.inf)
        p = falling.softmax(0)
        if top_p is not None and top_p[row] < 1:
            last = int((p.flip(0).cumsum(0).flip(0) > 1 - top_p[row]).sum()) or 1
            p = torch.where(falling >= falling[last - 1], p, 0)
        if min_p is not None:
            p = torch.where(p < min_p[row] * p.max(), 0, p)
        p = torch.zeros_like(p).scatter(0, order, p / p.sum())
        upto = p.unflatten(0, (-1, 8)).sum(1).cumsum(0) if len(p) % 8 == 0 else p.cumsum(0)
        step = 8 if len(p) % 8 == 0 else 1
        block = min(int((upto <= uniform[row]).sum()), len(upto) - 1)
        rest = uniform[row] - (upto[block - 1] if block else 0)
        inside = p[block * step : (block + 1) * step].cumsum(0)
        at = block * step + min(int((inside <= rest).sum()), step - 1)
        tokens.append(int(p[: at + 1].nonzero()[-1]))
    return torch.tensor(tokens, dtype=torch.int64)


@pytest.mark.parametrize("dtype", CONTRACT.dtypes)
@pytest.mark.parametrize("case", [c for c in CONTRACT.cases if not c.raises], ids=str)
def test_the_judge_accepts_another_float32_sampler(case, dtype):
    call = inputs(CONTRACT, case, dtype)
    assert judge(call, by_sorting(**call)) == []


def reference(call, **changed):
    return CONTRACT.reference(**(call | changed))


FAULTS = {
    "the next token": lambda call: reference(call) + 1,
    "the token before": lambda call: (reference(call) - 1).clamp(min=0),
    "always the likeliest": lambda call: call["logits"].argmax(-1),
    "another uniform number": lambda call: reference(call, uniform=call["uniform"].flip(0)),
    "no temperature": lambda call: reference(call, temperature=None),
    "temperature twice": lambda call: reference(call, temperature=call["temperature"] ** 2),
    "no top-k": lambda call: reference(call, top_k=None),
    "one too many by top-k": lambda call: reference(call, top_k=call["top_k"] + 1),
    "one too few by top-k": lambda call: reference(call, top_k=(call["top_k"] - 1).clamp(min=1)),
    "no top-p": lambda call: reference(call, top_p=None),
    "top-p a little larger": lambda call: reference(call, top_p=(call["top_p"] * 1.02).clamp(max=1)),
    "no min-p": lambda call: reference(call, min_p=None),
    "min-p a tenth larger": lambda call: reference(call, min_p=call["min_p"] * 1.1),
    "powers of two": lambda call: reference(call, temperature=call["temperature"] / 0.6931),
    "tokens backwards": lambda call: call["logits"].shape[1] - 1 - reference(call, logits=call["logits"].flip(1)),
    "int32": lambda call: reference(call).int(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_judge_catches(fault):
    generator, rows = torch.Generator().manual_seed(3), 400
    call = CONTRACT.bind(
        3 * torch.randn(rows, 200, generator=generator),
        torch.rand(rows, generator=generator),
        **per_row(rows, temperature=1.2, top_k=20, top_p=0.9, min_p=0.05),
    )
    assert judge(call, reference(call)) == []
    assert judge(call, FAULTS[fault](call))


def test_a_share_of_a_large_vocabulary_is_resolved():
    """128k equal tokens: each owns 7.6e-6 of [0, 1); the judge accepts neighbours only within float32's reach."""
    vocab, rows = 131072, 4
    uniform = torch.tensor([0.1, 0.4, 0.7, 0.99])
    call = CONTRACT.bind(torch.zeros(rows, vocab), uniform)
    tokens = reference(call)
    assert tokens.tolist() == [int(u * vocab) for u in uniform.tolist()]
    assert judge(call, tokens) == []
    assert len(judge(call, tokens - 40)) == rows
