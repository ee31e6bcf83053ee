"""LLM as its user sees it: seeds, streams, limits, and what is said when something is wrong."""

import pytest
import torch

import llmkernels
from llmkernels.engine import LLM, SamplingParams
from llmkernels.engine.sampling import uniform
from llmkernels.models.tokenizer import Detokenizer

PROMPTS = ["The read() system call", "A package", "import os", "DESCRIPTION\n", "The following example shows how to"]


@pytest.fixture(autouse=True)
def quiet():
    with llmkernels.use(policy="silent"):
        yield


@pytest.fixture(scope="module")
def llm():
    with llmkernels.use(policy="silent"):
        return LLM(dtype="float32")


def sampled(seed=1, **more):
    return SamplingParams(
        **{"max_tokens": 20, "temperature": 0.9, "top_p": 0.95, "seed": seed, "ignore_eos": True} | more
    )


def test_a_seed_gives_its_text_whatever_the_batch(llm):
    together = llm.generate(PROMPTS, [sampled(seed) for seed in range(len(PROMPTS))])
    for seed, (prompt, output) in enumerate(zip(PROMPTS, together, strict=True)):
        assert llm.generate(prompt, sampled(seed))[0].tokens == output.tokens
    other = llm.generate(PROMPTS[0], sampled(99))[0]
    assert other.tokens != together[0].tokens
    drawn = llm.generate(PROMPTS[0], sampled(None))[0]
    assert llm.generate(PROMPTS[0], sampled(drawn.seed))[0].tokens == drawn.tokens


@pytest.mark.parametrize(("kind", "step"), [("int8", 1.0), ("float8_e4m3fn", 1 / 8)])
def test_a_batch_moves_a_quantized_key_to_a_neighbouring_code_at_most(kind, step):
    """Where a last bit, which another batch rounds otherwise, decides between two codes; so a seed's text may differ.

    Held value by value in the first layer, and by how many there are in those behind, which read what it changed.
    """
    llm = LLM(dtype="float32", kv_cache_dtype=kind, prefix_reuse=False)
    cache, prompts = llm.forwards[0].cache, [(prompt * 9)[: 70 * i] for i, prompt in enumerate(PROMPTS, 1)]

    def held(group):
        outputs = [llm.add(prompt, sampled())[0] for prompt in group]
        llm.step()
        kept = []
        for output in outputs:
            pages, count = output._sequence.pages, output._sequence.settled
            assert count == len(output.prompt_tokens)
            kept += [array.float()[:, pages].flatten(1, 2)[:, :count] for array in (cache.k, cache.v)]
            llm.abort(output)
        return kept

    together = held(prompts)
    alone = [array for prompt in prompts for array in held([prompt])]
    for one, both in zip(alone, together, strict=True):
        most = step if kind == "int8" else step * one[0].abs() + 2**-9
        assert ((one[0] - both[0]).abs() <= most).all()
    moved = sum(int((one != both).sum()) for one, both in zip(alone, together, strict=True))
    assert moved < sum(map(torch.numel, alone)) / 100


def test_preemption_changes_no_text(llm):
    tight = LLM(dtype="float32", kv_cache_pages=8, page_size=4, max_batch_tokens=8)
    wish = sampled(max_tokens=18)
    assert [o.text for o in tight.generate(PROMPTS, wish)] == [o.text for o in llm.generate(PROMPTS, wish)]
    assert tight._scheduler.preemptions
    assert tight._scheduler.pool.free == 8


def test_every_wish_reaches_the_sample_op(llm, monkeypatch):
    """Row by row, with a new number for each token; what no row asks for is left out."""
    calls, sample = [], llmkernels.sample

    def noted(logits, numbers, **options):
        calls.append({"uniform": numbers} | options)
        return sample(logits, numbers, **options)

    monkeypatch.setattr(llmkernels, "sample", noted)
    wishes = [sampled(5, top_k=9), sampled(6, top_p=0.5, temperature=0.3), SamplingParams(seed=7, ignore_eos=True)]
    outputs = llm.generate([[5], [6], [7]], wishes)
    llm.generate([8], SamplingParams(max_tokens=1))
    first = {name: values.tolist() for name, values in calls[0].items()}
    assert first["temperature"] == pytest.approx([0.9, 0.3, 0])
    assert first["top_p"] == pytest.approx([0.95, 0.5, 1])
    assert first["top_k"] == [9, 0, 0]
    assert "min_p" not in first
    assert set(calls[-1]) == {"uniform", "temperature"}
    for row, output in enumerate(outputs[:2]):
        numbers = [call["uniform"][row].item() for call in calls[: len(output.tokens)]]
        assert numbers == [uniform(output.seed, counter) for counter in range(len(output.tokens))]


def test_uniform_numbers_are_uniform_and_repeatable():
    numbers = torch.tensor([uniform(seed, counter) for seed in range(100) for counter in range(100)])
    assert uniform(5, 7) == uniform(5, 7)
    assert len(numbers.unique()) > 9980  # 24 bits: about 3 of 10,000 coincide
    counts = numbers.histc(20, 0, 1)
    assert ((counts - 500) ** 2 / 500).sum() < 45  # chi-square with 19 degrees of freedom: 0.07 %
    assert abs(torch.corrcoef(numbers.view(100, 100)[:, :2].T)[0, 1]) < 0.4


def test_a_stream_joined_is_the_text(llm):
    wish = sampled(max_tokens=60)
    deltas = [*llm.stream(PROMPTS[0], wish)]
    assert "".join(d.text for d in deltas) == llm.generate(PROMPTS[0], wish)[0].text == deltas[-1].output.text
    assert deltas[-1].output.finish_reason == "length"
    assert len(deltas) > 30


def test_streams_advance_together(llm):
    wishes = [sampled(seed, max_tokens=12) for seed in range(3)]
    streams = [llm.stream(prompt, wish) for prompt, wish in zip(PROMPTS, wishes, strict=False)]
    texts = ["", "", ""]
    open_ = set(range(3))
    while open_:
        for i in [*open_]:
            delta = next(streams[i], None)
            texts[i] += delta.text if delta else ""
            open_ -= set() if delta else {i}
    assert texts == [o.text for o in llm.generate(PROMPTS[:3], wishes)]


def test_a_closed_stream_frees_its_pages(llm):
    stream = llm.stream(PROMPTS[0], sampled())
    delta = next(stream)
    assert llm._scheduler.pool.free < llm._scheduler.pool.pages
    stream.close()
    assert delta.output.finish_reason == "abort"
    assert llm._scheduler.pool.free == llm._scheduler.pool.pages


def test_nothing_stays_behind_when_a_step_fails(llm, monkeypatch):
    monkeypatch.setattr(llm._runner, "run", lambda chunks: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm.generate(PROMPTS, sampled())
    assert llm._scheduler.pool.free == llm._scheduler.pool.pages
    assert not llm.step()


@pytest.mark.parametrize("text", ["naïve café, façade", "日本語のテキスト 🎉🎉 done", "a\tb\n\n  c", "x \ufffd y"])
def test_pieces_are_whole_characters(llm, text):
    ids = llm.encode(text)[1:]
    for split in range(0, len(ids) + 1, 3):  # also with the prompt ending in the middle of a character
        detokenizer = Detokenizer(llm.tokenizer, ids[:split])
        pieces = [detokenizer.push(token) for token in ids[split:]]
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
        start = llm.tokenizer.decode(ids[:split]).rstrip("\ufffd")
        assert start + "".join(pieces) == text


def test_stop_tokens_and_limits(llm):
    free = llm.generate(PROMPTS[0], sampled())[0]
    assert (free.finish_reason, len(free.tokens)) == ("length", 20)
    stop = free.tokens[8]
    stopped = llm.generate(PROMPTS[0], sampled(stop_token_ids=[stop]))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert stopped.text == llm.tokenizer.decode(stopped.tokens[:-1])
    short = LLM(dtype="float32", max_length=16)
    full = short.generate(PROMPTS[0], sampled())[0]
    assert len(full.prompt_tokens) + len(full.tokens) == 16
    assert full.finish_reason == "length"


def test_eos_ends_a_text_unless_ignored(llm, monkeypatch):
    free = llm.generate(PROMPTS[0], sampled())[0]
    monkeypatch.setattr(llm._intake, "stop", frozenset([free.tokens[5]]))
    assert llm.generate(PROMPTS[0], sampled(ignore_eos=False))[0].finish_reason == "stop"
    assert llm.generate(PROMPTS[0], sampled())[0].tokens == free.tokens


def test_logprobs_are_of_the_models_own_distribution(llm):
    output = llm.generate(PROMPTS[0], sampled(logprobs=True, max_tokens=6))[0]
    again = llm.generate(
        output.prompt_tokens + output.tokens[:-1], sampled(logprobs=True, max_tokens=1, temperature=0.0)
    )[0]
    assert len(output.logprobs) == 6
    assert all(p <= 0 for p in output.logprobs)
    assert again.logprobs[0] >= output.logprobs[-1] - 1e-5  # the greedy token is the likeliest
    assert llm.generate(PROMPTS[0], sampled())[0].logprobs == []


def test_defaults_come_from_the_checkpoint(llm):
    assert llm.default_params == SamplingParams(temperature=0.7, top_p=0.95)
    assert llm._intake.stop == {1}


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt is empty"),
        ([[]], "prompt is empty"),
        ([[4096]], "4096 is not a token id; this model's are 0 to 4095"),
        ([[-1]], "-1 is not a token id"),
        ([[True]], "True is not a token id"),
        ([[1.5]], "1.5 is not a token id"),
        ([[5] * 2048], "the prompt has 2048 tokens; at most 2047"),
        ([None], "the prompt is None; give a text"),
        ([PROMPTS[0], []], "prompt is empty"),
    ],
)
def test_a_bad_prompt_runs_nothing(llm, prompt, words):
    with pytest.raises(ValueError, match=words):
        llm.generate(prompt)
    assert not llm.step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"min_p": 2}, "min_p is 2"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"stop_token_ids": [-1]}, "stop_token_ids is -1"),
    ],
)
def test_bad_wishes(options, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'; use one of auto, float32, bfloat16, float16"),
        (
            {"dtype": "float32", "kv_cache_dtype": "bfloat16"},
            "kv_cache_dtype is 'bfloat16'; use one of auto, float32, int8",
        ),
        ({"device": "warp"}, "device is 'warp'"),
        ({"quantize": "w5a16"}, "w5a16"),
        ({"quantize_head": "w5a16"}, "w5a16"),
        ({"page_size": 0}, "page_size is 0"),
        ({"kv_cache_bytes": 100}, "kv_cache_bytes is 100; a page of 16 tokens takes 49152"),
        ({"max_sequences": 0}, "max_sequences is 0"),
        ({"max_length": "long"}, "max_length is 'long'; give an integer"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json is missing"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        LLM(**options)


def test_a_request_larger_than_the_cache():
    llm = LLM(kv_cache_pages=4)
    with pytest.raises(ValueError, match="5 pages of 16; the cache has 4"):
        llm.generate([PROMPTS[1], [5] * 60], SamplingParams(max_tokens=10))
    assert not llm.step()


def test_lists_of_prompts(llm):
    assert llm.generate([]) == []
    with pytest.raises(ValueError, match="params has 1 entries for 2 prompts"):
        llm.generate(PROMPTS[:2], [SamplingParams()])
    mixed = llm.generate([PROMPTS[0], llm.encode(PROMPTS[0])], SamplingParams(max_tokens=5))
    assert mixed[0].tokens == mixed[1].tokens
    with pytest.raises(ValueError, match="tokenizer=False"):
        LLM(tokenizer=False).generate("text")
