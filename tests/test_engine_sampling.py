"""Penalties, biases and stop strings: what a request may change about its next token, and where its text ends."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

import llmkernels
from llmkernels.engine import LLM, SamplingParams
from llmkernels.engine.sampling import adjusted
from llmkernels.models.tokenizer import StopStrings


@pytest.fixture(scope="module")
def llm():
    with llmkernels.use(policy="silent"):
        yield LLM(dtype="float32")


def answer(prompt, tokens, **wishes):
    return SimpleNamespace(prompt_tokens=prompt, tokens=tokens, params=SamplingParams(**wishes))


def test_logits_nobody_changes_are_the_same_tensor():
    logits = torch.randn(2, 9)
    assert adjusted(logits, [answer([1], [2]), answer([3], [])]) is logits


def test_repetition_is_that_of_transformers():
    logits = torch.randn(1, 50)
    prompt, tokens = [3, 4, 4], [9, 10]
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + tokens]), logits.clone())
    torch.testing.assert_close(adjusted(logits, [answer(prompt, tokens, repetition_penalty=1.3)]), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rest_is_added_row_by_row(dtype):
    logits = torch.randn(3, 20).to(dtype)
    before = logits.clone()
    rows = [
        answer([1, 2], [5, 5, 6], presence_penalty=0.5, frequency_penalty=0.25),
        answer([1], [2]),
        answer([1], [2], logit_bias={7: -100.0, 2: 1.0}, presence_penalty=2.0),
    ]
    expected = logits.float().clone()
    expected[0, 5] -= 0.5 + 2 * 0.25
    expected[0, 6] -= 0.5 + 0.25
    expected[2, 7] -= 100
    expected[2, 2] += 1 - 2
    torch.testing.assert_close(adjusted(logits, rows), expected)
    assert torch.equal(logits, before)  # the model's own logits, of which logprobs are told


def test_a_bias_decides_and_logprobs_stay_the_models_own(llm):
    plain = llm.generate([5, 6, 7], SamplingParams(max_tokens=1, logprobs=True))[0]
    biased = llm.generate([5, 6, 7], SamplingParams(max_tokens=4, logit_bias={99: 100}, logprobs=True))[0]
    assert biased.tokens == [99] * 4
    assert biased.logprobs[0] < plain.logprobs[0] < 0


def test_a_frequency_penalty_ends_repetition(llm):
    """A greedy text of this small model goes in circles."""
    calm, varied = (
        llm.generate("The the the", SamplingParams(max_tokens=60, ignore_eos=True, frequency_penalty=penalty))[0]
        for penalty in (0.0, 1.5)
    )
    assert len(set(varied.tokens)) > len(set(calm.tokens))


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 5), max_size=12),
)
def test_a_stop_string_is_found_wherever_the_pieces_end(text, strings, sizes):
    """Nothing is shown that turns out to belong to a stop string, and nothing else is kept back."""
    stops, shown, ended, at = StopStrings(strings), "", False, 0
    first = min([text.find(string) for string in strings if string in text], default=None)
    for size in (*sizes, len(text)):
        if ended or at >= len(text):
            break
        piece, ended = stops.push(text[at : at + size])
        at, shown = at + size, shown + piece
        held = text[len(shown) : at]
        assert ended or not held or any(string.startswith(held) for string in strings)
    if first is None:
        assert not ended
        assert shown + stops.flush() == text
    else:
        assert ended
        assert text.startswith(shown)
        assert any(text.startswith(string, len(shown)) for string in strings)


def test_a_text_ends_before_its_stop_string(llm):
    wish = {"max_tokens": 40, "temperature": 0.7, "seed": 5, "ignore_eos": True}
    plain = llm.generate("The read() system call", SamplingParams(**wish))[0]
    middle = plain.text[len(plain.text) // 2 :][:7]
    params = SamplingParams(**wish, stop=middle)
    stopped = llm.generate("The read() system call", params)[0]
    assert stopped.text == plain.text[: plain.text.index(middle)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.tokens) < len(plain.tokens)
    deltas = [*llm.stream("The read() system call", params)]
    assert "".join(delta.text for delta in deltas) == stopped.text
    assert llm._scheduler.pool.free == llm._scheduler.pool.pages


def test_a_stop_string_across_pieces_of_a_character(llm):
    """Its bytes come token by token; the string is found when its last character is whole."""
    text = "ä€𝄞ä€ß"
    ids = llm.encode(text)
    assert len(ids) > len(text)
    from llmkernels.models.tokenizer import Detokenizer

    detokenizer, stops, shown = Detokenizer(llm.tokenizer, []), StopStrings(["𝄞ä€ß"]), ""
    for position, token in enumerate(ids):
        piece, ended = stops.push(detokenizer.push(token))
        shown += piece
        assert ended == (position == len(ids) - 1)
    assert shown == "ä€"


def test_what_was_held_back_comes_with_the_last_token(llm):
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    plain = llm.generate("import", params)[0]
    held = llm.generate("import", SamplingParams(max_tokens=3, ignore_eos=True, stop=(plain.text[-2:] + "\0",)))[0]
    assert held.text == plain.text
    assert held.finish_reason == "length"


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"repetition_penalty": 0}, "repetition_penalty is 0; give a number from 0.01"),
        ({"presence_penalty": 1000}, "presence_penalty is 1000"),
        ({"logit_bias": [1]}, r"logit_bias is \[1\]; give a mapping"),
        ({"logit_bias": {-1: 2.0}}, "a token of logit_bias is -1"),
        ({"logit_bias": {3: float("nan")}}, r"logit_bias\[3\] is nan"),
        ({"stop": ("",)}, "stop holds ''; give strings"),
        ({"stop": 2.5}, r"stop is 2\.5; give a list"),
        ({"stop_token_ids": True}, "stop_token_ids is True; give a list"),
        ({"logprobs": 5}, "logprobs is 5; give True or False; top_logprobs says how many"),
    ],
)
def test_wrong_wishes_are_named(wishes, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**wishes)


def test_one_none_or_several_to_stop_at():
    assert SamplingParams(stop=None, stop_token_ids=7) == SamplingParams(stop=[], stop_token_ids=[7])


def test_prompts_that_are_none(llm):
    for prompt, words in (
        (None, "the prompt is None; give a text"),
        (torch.tensor([1, 2]), r"the prompt is tensor\(\[1, 2\]\); give a text, or a list"),
        ("a\ud800b", r"half a surrogate pair, U\+D800 at 1"),
    ):
        with pytest.raises(ValueError, match=words):
            llm.generate(prompt)


def test_wishes_that_this_model_cannot_fulfil(llm):
    with pytest.raises(ValueError, match="is not a token id"):
        llm.generate([1], SamplingParams(logit_bias={10**6: 1.0}))
    with llmkernels.use(policy="silent"), pytest.raises(ValueError, match="stop is given and this LLM has tokenizer"):
        LLM(tokenizer=False).generate([1], SamplingParams(stop="x"))


def test_the_likeliest_tokens_are_told(llm):
    """Rows that ask for different numbers of them, in one batch."""
    plain, three, five = (SamplingParams(max_tokens=4, top_logprobs=k, logprobs=k == 5) for k in (0, 3, 5))
    outputs = llm.generate(["The ls command lists"] * 3, [plain, three, five])
    assert outputs[0].top_logprobs == outputs[0].logprobs == outputs[1].logprobs == []
    assert [len(top) for top in outputs[1].top_logprobs] == [3] * 4
    assert [len(top) for top in outputs[2].top_logprobs] == [5] * 4
    for token, logprob, top, fewer in zip(
        outputs[2].tokens, outputs[2].logprobs, outputs[2].top_logprobs, outputs[1].top_logprobs, strict=True
    ):
        assert next(iter(top)) == token  # greedy
        assert top[token] == pytest.approx(logprob)
        assert [*top.values()] == sorted(top.values(), reverse=True)
        assert list(fewer) == list(top)[:3]


def test_best_of_returns_the_likeliest_answers(llm):
    """By the mean of ln p, which nobody asked to see; the others are sampled all the same."""
    wish = {"max_tokens": 8, "temperature": 1.2, "seed": 4}
    every = llm.generate("A package", SamplingParams(n=6, logprobs=True, **wish))
    ranked = sorted(every, key=lambda output: -sum(output.logprobs) / len(output.logprobs))
    best = llm.generate("A package", SamplingParams(n=2, best_of=6, **wish))
    assert [output.tokens for output in best] == [output.tokens for output in ranked[:2]]
    assert best[0].tokens != every[0].tokens
    assert not best[0].logprobs
    with pytest.raises(ValueError, match="best_of is 1; give an integer from 2 to 128"):
        SamplingParams(n=2, best_of=1)
