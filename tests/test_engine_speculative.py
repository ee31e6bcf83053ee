"""Speculation changes how many tokens a step brings, and nothing else: same seed, same text, whatever guesses."""

import json
from collections import Counter

import pytest
import torch

import llmkernels
from llmkernels.engine import LLM, CheckpointError, SamplingParams, Speculation, Structure, shipped_model
from llmkernels.engine.guesses import NGrams
from llmkernels.engine.sampling import Chosen
from llmkernels.engine.sequence import Chunk, Sequence
from llmkernels.engine.speculative import accept

transformers = pytest.importorskip("transformers")

DRAFT = shipped_model("manual-5m-draft")
PROMPTS = ["The read() system call", "The ls command lists", "import os", "DESCRIPTION\n"]
WAYS = {
    "n-grams": Speculation(ngram=3),
    "draft": Speculation(draft=DRAFT),
    "tree": Speculation(draft=DRAFT, width=2),
    "both": Speculation(draft=DRAFT, ngram=3),
    "tree of both": Speculation(draft=DRAFT, ngram=3, depth=3, width=3),
}


@pytest.fixture(autouse=True)
def quiet():
    with llmkernels.use(policy="silent"):
        yield


@pytest.fixture(scope="module")
def plain():
    with llmkernels.use(policy="silent"):
        return LLM(dtype="float32")


@pytest.fixture(scope="module")
def made():
    """The LLM that speculates in one of the WAYS."""
    llms = {}

    def llm(way):
        if way not in llms:
            llms[way] = LLM(dtype="float32", speculation=WAYS[way], page_size=4)
        return llms[way]

    return llm


def wish(**more):
    return SamplingParams(**{"max_tokens": 32, "temperature": 0.0, "seed": 3, "ignore_eos": True} | more)


SAMPLED = {"temperature": 0.8, "top_p": 0.95}
WISHES = {
    "greedy": wish(),
    "sampled": wish(**SAMPLED),
    "answers": wish(**SAMPLED, n=3),
    "penalties": wish(**SAMPLED, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2),
    "biases": wish(logit_bias={13: 4.0, 16: -100.0}),
    "logprobs": wish(logprobs=True, top_logprobs=3),
}


def tokens(outputs):
    return [output.tokens for output in outputs]


@pytest.mark.parametrize("wishes", WISHES)
@pytest.mark.parametrize("way", WAYS)
def test_the_texts_are_those_without(way, wishes, plain, made):
    llm = made(way)
    before = llm.stats()["accepted_tokens"]
    want, got = (engine.generate(PROMPTS, WISHES[wishes]) for engine in (plain, llm))
    assert tokens(got) == tokens(want)
    assert [o.text for o in got] == [o.text for o in want]
    for output, other in zip(got, want, strict=True):
        assert output.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert [[*top] for top in output.top_logprobs] == [[*top] for top in other.top_logprobs]
    assert llm.stats()["accepted_tokens"] > before
    llm.check()
    assert llm.stats()["pages_used"] == 0


@pytest.mark.parametrize("way", ["draft", "tree of both"])
def test_chunks_preemption_and_reuse(way, plain):
    """Pages and budget run short, prompts come in chunks beside those that decode, prefixes are found again."""
    llm = LLM(dtype="float32", speculation=WAYS[way], page_size=4, kv_cache_pages=30, max_batch_tokens=21)
    prompts = [f"{PROMPTS[i % 2]} {text}" for i in range(2) for text in ("", *PROMPTS)]
    for wishes in (WISHES["greedy"], WISHES["sampled"]):
        want = tokens(plain.generate(prompts, wishes))
        for _ in range(2):
            assert tokens(llm.generate(prompts, wishes)) == want
            llm.check()
    stats = llm.stats()
    assert stats["preemptions"]
    assert stats["prefix_found_tokens"]
    assert stats["accepted_tokens"] > 50


def test_what_speculation_wrote_is_reused_by_speculation(plain, made):
    """The draft model's keys are found with the model's: the second run guesses as well as the first."""
    llm = LLM(dtype="float32", speculation=WAYS["draft"], page_size=4)
    prompt = llm.encode("The read() system call attempts to read up to count bytes from file descriptor")
    runs = []
    for _ in range(2):
        before = llm.stats()
        (output,) = llm.generate(prompt, wish())
        after = llm.stats()
        runs.append([after[name] - before[name] for name in ("guessed_tokens", "accepted_tokens")])
        assert output.tokens == plain.generate(prompt, wish())[0].tokens
    assert output.cached_tokens >= (len(prompt) - 1) // 4 * 4
    assert runs[1][1] >= runs[0][1]  # of four guesses more: a prompt that is known decodes at once


@pytest.mark.parametrize(
    "options", [{"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "float8_e4m3fn"}, {"quantize": "w8a16"}]
)
def test_quantized_caches_and_weights(options):
    """Greedy up to a tie: with rounded keys the order of a sum may decide between two tokens."""
    want, got = (
        tokens(LLM(dtype="float32", speculation=way, **options).generate(PROMPTS, wish()))
        for way in (None, WAYS["tree of both"])
    )
    assert sum(a == b for a, b in zip(got, want, strict=True)) >= len(want) - 1
    assert all(a[:8] == b[:8] for a, b in zip(got, want, strict=True))


def test_stops_inside_an_accepted_run(plain, made):
    llm = made("n-grams")
    free = plain.generate(PROMPTS[1], wish(max_tokens=60))[0]
    for at in range(20, 40):
        token = free.tokens[at]
        want, got = (e.generate(PROMPTS[1], wish(max_tokens=60, stop_token_ids=[token]))[0] for e in (plain, llm))
        assert (got.tokens, got.text, got.finish_reason) == (want.tokens, want.text, "stop")
        string = free.text[2 * at : 2 * at + 5]
        want, got = (e.generate(PROMPTS[1], wish(max_tokens=60, stop=string))[0] for e in (plain, llm))
        assert (got.tokens, got.text, got.finish_reason) == (want.tokens, want.text, "stop")
    for length in range(1, 9):
        assert tokens(llm.generate(PROMPTS[1], wish(max_tokens=length))) == [free.tokens[:length]]
    llm.check()


def test_streams_and_aborts(plain, made):
    llm = made("tree of both")
    deltas = [*llm.stream(PROMPTS[0], WISHES["sampled"])]
    assert "".join(delta.text for delta in deltas) == plain.generate(PROMPTS[0], WISHES["sampled"])[0].text
    assert [t for delta in deltas for t in delta.output.tokens[delta.start :]][-1] == deltas[-1].output.tokens[-1]
    stream = llm.stream(PROMPTS[0], wish(n=3))
    next(stream)
    stream.close()
    llm.check()
    assert llm.stats()["pages_used"] == 0


def test_windows(tmp_path):
    """A chain is verified under a sliding window; a tree is refused."""
    torch.manual_seed(1)
    config = transformers.MistralConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=7, initializer_range=0.2,
    )  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    prompts = [[1, 2, 3, 4] * 5, [5, 6] * 9]
    texts = []
    for way in (None, Speculation(draft=tmp_path, ngram=2)):
        llm = LLM(tmp_path, tokenizer=False, speculation=way, page_size=4)
        texts.append(tokens(llm.generate(prompts, wish(max_tokens=40))))
    assert texts[0] == texts[1]
    assert llm.stats()["accepted_tokens"] > 20
    with pytest.raises(ValueError, match=r"width is 2, and this model has sliding windows.*use width=1"):
        LLM(tmp_path, tokenizer=False, speculation=Speculation(draft=tmp_path, width=2))


@pytest.mark.parametrize("way", ["draft", "tree of both"])
def test_the_distribution_is_that_of_plain_sampling(way, plain, made):
    """Chi-square of the second and third token of 1000 answers, whose first is given, against one another.

    Seeds differ between the two, else every answer would be the same.
    """
    prompt = plain.encode(PROMPTS[0])
    counts = []
    for number, llm in enumerate((plain, made(way))):
        wishes = [wish(max_tokens=4, temperature=1.0, top_k=4, seed=50 * number + i, n=100) for i in range(10)]
        outputs = llm.generate([prompt] * 10, wishes)
        counts.append(Counter(tuple(output.tokens[1:3]) for output in outputs))
    both = counts[0] + counts[1]
    kinds = [kind for kind, count in both.items() if count >= 15]
    table = [[count[kind] for kind in kinds] for count in counts]
    for row, count in zip(table, counts, strict=True):
        row.append(count.total() - sum(row))
    statistic = sum((a - b) ** 2 / (a + b) for a, b in zip(*table, strict=True) if a + b)
    freedom = len(table[0]) - 1
    assert freedom > 15
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # about 1 in 10,000


def test_a_tree_is_walked_along_what_was_sampled():
    chunk = Chunk(Sequence([1, 2, 3], 3, 99), 2, 1, True, room=6)
    nodes = [chunk.guess(*way) for way in ((-1, 7), (-1, 8), (1, 9), (0, 9), (2, 5))]
    assert nodes == [0, 1, 2, 3, 4]
    assert chunk.guess(1, 9) == 2
    assert (chunk.guess(4, 1), chunk.guess(5, 1)) == (5, None)
    assert chunk.path(4) == [1, 2, 4]
    assert chunk.branches()
    taken, accepted = accept(chunk, [Chosen(token) for token in (8, 0, 9, 6, 0, 0, 0)])
    assert ([chosen.token for chosen in taken], accepted, chunk.accepted) == ([8, 9, 6], [1, 2], [8, 9])


def test_ngrams_find_the_longest_and_latest():
    known = NGrams(3)
    assert known.guess([1, 2, 3], 4) == []
    text = [1, 2, 3, 9, 5, 3, 8, 1, 2, 3]
    assert known.guess(text, 3) == [9, 5, 3]  # after 1 2 3, not after the later 3
    assert known.guess([*text, 8], 3) == [1, 2, 3]
    assert NGrams(2).guess([4, 5, 4, 5], 5) == [4, 5, 4, 5, 4]  # on and on


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "neither draft nor ngram; give draft=<path>"),
        ({"ngram": 9}, "ngram is 9; give an integer from 0 to 8"),
        ({"ngram": 2, "depth": 0}, "depth is 0"),
        ({"ngram": 2, "width": True}, "width is True"),
        ({"draft": DRAFT, "depth": 8, "width": 4}, "32 guesses a step; at most 31"),
    ],
)
def test_wrong_wishes(options, words):
    with pytest.raises(ValueError, match=words):
        Speculation(**options)


def test_drafts_that_do_not_fit(tmp_path):
    for file in DRAFT.iterdir():
        (tmp_path / file.name).symlink_to(file)
    raw = json.loads((DRAFT / "config.json").read_text())
    for key, value, words in (
        ("vocab_size", 4095, "4095 tokens, and the model's 4096"),
        ("max_position_embeddings", 64, "max_length=64"),
    ):
        (tmp_path / "config.json").unlink()
        (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
        with pytest.raises(CheckpointError, match=words):
            LLM(speculation=Speculation(draft=tmp_path))


@pytest.mark.parametrize("way", ["n-grams", "tree of both"])
def test_grammars(way, plain, made):
    """Guesses that the grammar forbids are not made, and what it forces is jumped over, as without speculation."""
    pytest.importorskip("xgrammar")
    schema = {"type": "array", "items": {"enum": ["read", "write", "reader"]}, "minItems": 4, "maxItems": 9}
    llm = made(way)
    before = llm.stats()["accepted_tokens"]
    letter = {plain.encode("s")[-1]: 50}  # the grammar forces "system", of which the model would write this one first
    forced = Structure(regex="([0-9]system call){3,5}")
    for structure, more in ((Structure(json_schema=schema), {}), (forced, {"logit_bias": letter})):
        wishes = [wish(max_tokens=60, structure=structure, ignore_eos=False, **more, **how) for how in ({}, SAMPLED)]
        prompts = PROMPTS[:2]
        want, got = ([o for w in wishes for o in engine.generate(prompts, w)] for engine in (plain, llm))
        assert tokens(got) == tokens(want)
        assert [o.text for o in got] == [o.text for o in want]
    assert llm.stats()["accepted_tokens"] > before
    llm.check()
