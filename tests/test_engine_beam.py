"""Beam search finds what transformers' does, and its beams share their pages."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmkernels
from llmkernels.engine import LLM, BeamParams, SamplingParams, shipped_model

PROMPTS = ["The read() system call", "A package is", "NAME\n"]


@pytest.fixture(scope="module")
def llm():
    with llmkernels.use(policy="silent"):
        yield LLM(dtype="float32", page_size=4, max_length=128)


@pytest.fixture(scope="module")
def theirs():
    return AutoModelForCausalLM.from_pretrained(shipped_model(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("width", "length_penalty", "early_stopping", "eos"),
    [(1, 1.0, False, 1), (4, 1.0, False, 1), (4, 0.0, "never", 16), (3, -1.0, True, 16), (5, 2.0, "never", 12)],
)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_beams_are_those_of_transformers(
    llm, theirs, prompt, width, length_penalty, early_stopping, eos, monkeypatch
):
    """eos: a frequent token (a comma, a newline) taken for the end of text, so that beams end early as well."""
    monkeypatch.setattr(llm._intake, "stop", frozenset({eos}))
    params = BeamParams(width, 20, length_penalty, early_stopping)
    found = llm.beam_search(prompt, params)
    ids = torch.tensor([llm.encode(prompt)])
    wanted = theirs.generate(
        ids,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=20,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=2,
        output_scores=True,
        return_dict_in_generate=True,
    )
    texts = [[token for token in row if token != 2] for row in wanted.sequences[:, ids.shape[1] :].tolist()]
    assert [beam.tokens for beam in found] == texts
    if width > 1:
        assert [beam.score for beam in found] == pytest.approx(wanted.sequences_scores.tolist(), rel=1e-5)
    assert llm.stats()["pages_used"] == 0


def test_beams_among_others_in_small_memory_find_the_same(llm):
    """One token of budget to spare, and so few pages that beams and requests preempt one another."""
    with llmkernels.use(policy="silent"):
        small = LLM(dtype="float32", page_size=4, max_length=64, max_batch_tokens=7, max_sequences=6, kv_cache_pages=34)
    alone, text = (
        llm.beam_search(PROMPTS[0], BeamParams(4, 16)),
        llm.generate(PROMPTS[1], SamplingParams(max_tokens=40)),
    )
    others = [small.add(PROMPTS[1], SamplingParams(max_tokens=40))[0] for _ in range(5)]
    assert [beam.tokens for beam in small.beam_search(PROMPTS[0], BeamParams(4, 16))] == [b.tokens for b in alone]
    while small.step():
        pass
    assert {other.text for other in others} == {text[0].text}
    assert small.stats()["preemptions"] > 0
    assert small.stats()["pages_used"] == 0


def test_two_searches_and_a_request_at_once(llm):
    """One is given up, and leaves nothing behind."""
    params = BeamParams(3, 12)
    alone = [[beam.tokens for beam in llm.beam_search(prompt, params)] for prompt in PROMPTS[:2]]
    text = llm.generate(PROMPTS[2], SamplingParams(max_tokens=30))[0].text
    given_up, *searches = [llm.add_beams(PROMPTS[0], BeamParams(3, 90))] + [
        llm.add_beams(p, params) for p in PROMPTS[:2]
    ]
    (output,) = llm.add(PROMPTS[2], SamplingParams(max_tokens=30))
    while output.finish_reason is None or any(search.beams is None for search in searches):
        llm.step()
    llm.abort_beams(given_up)
    assert [[beam.tokens for beam in search.beams] for search in searches] == alone
    assert output.text == text
    assert llm.stats()["pages_used"] == 0
    llm.check()
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.add_beams("")


def test_beams_share_the_pages_of_what_they_have_in_common(llm, monkeypatch):
    """Of a prompt of p pages, four beams use p and a few more; copies of it would be four times p."""
    prompt, most = [5 + i % 900 for i in range(80)], 0
    step = llm.step

    def watched():
        nonlocal most
        ran = step()
        most = max(most, llm.stats()["pages_used"])
        return ran

    monkeypatch.setattr(llm, "step", watched)
    llm.beam_search(prompt, BeamParams(4, 8))
    assert 20 <= most <= 20 + 4 * 3
    assert llm.stats()["pages_used"] == 0


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"width": 0}, "width is 0"),
        ({"width": 20}, "give an integer from 1 to 19"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"early_stopping": "always"}, "give True, False or 'never'"),
        ({"max_tokens": True}, "max_tokens is True"),
    ],
)
def test_wrong_beams(wishes, words):
    with pytest.raises(ValueError, match=words):
        BeamParams(**wishes)


def test_more_beams_than_there_is_room_for():
    with llmkernels.use(policy="silent"):
        tiny = LLM(dtype="float32", max_length=64, kv_cache_pages=6)
    with pytest.raises(ValueError, match="width is 8: 24 pages and as many sequences at once; this LLM has 6"):
        tiny.beam_search("x", BeamParams(8, 40))
    assert tiny.stats()["waiting"] == 0
