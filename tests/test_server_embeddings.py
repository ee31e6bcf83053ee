"""/v1/embeddings as OpenAI's own client sees it, beside what transformers computes from the same weights."""

import base64
import struct

import httpx
import openai
import pytest
import torch
import transformers
from live_server import served

import llmkernels
from llmkernels.engine import LLM, SamplingParams, shipped_model
from llmkernels.server import embeddings
from llmkernels.server.app import create_app

KEY, NAME = "secret", "manual"
TEXTS = ["The read() system call", "A package is removed by", "x", "ls lists files. " * 15]
WISH = SamplingParams(max_tokens=1, embed=True)


@pytest.fixture(scope="module")
def llm():
    """Steps of 16 tokens: the longest text runs in several chunks, beside others."""
    with llmkernels.use(policy="silent"):
        return LLM(dtype="float32", page_size=4, max_length=128, max_batch_tokens=16, max_sequences=4)


@pytest.fixture(scope="module")
def expected(llm):
    model = transformers.AutoModel.from_pretrained(shipped_model(), dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = [model(torch.tensor([llm.encode(text)])).last_hidden_state[0] for text in TEXTS]
    return [torch.nn.functional.normalize(states.mean(0), dim=0) for states in hidden]


@pytest.fixture(scope="module")
def url(llm):
    with served(create_app(llm, NAME, api_key=KEY)) as url:
        yield url
    llm.check()


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as http:
        yield http


def close(vectors, expected):
    torch.testing.assert_close(torch.tensor(vectors), torch.stack(expected), rtol=0, atol=1e-4)


def test_they_are_the_mean_of_the_hidden_states_of_transformers(client, llm, expected):
    assert len(llm.encode(TEXTS[3])) > 3 * 16, "the longest text has to take several chunks"
    for inputs in (TEXTS, [llm.encode(text) for text in TEXTS]):
        answer = client.embeddings.create(model=NAME, input=inputs, encoding_format="float")
        close([item.embedding for item in answer.data], expected)
        assert [item.index for item in answer.data] == [0, 1, 2, 3]
        count = sum(len(llm.encode(text)) for text in TEXTS)
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (count, count)
        assert answer.model == NAME
    for one in (TEXTS[0], llm.encode(TEXTS[0])):  # not in a list; and base64, which the client asks for by itself
        close([client.embeddings.create(model=NAME, input=one).data[0].embedding], expected[:1])


def test_base64_holds_the_same_numbers(http, llm):
    body = {"input": TEXTS[0], "dimensions": 8}
    plain = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    text = http.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()["data"][0]["embedding"]
    assert list(struct.unpack("<8f", base64.b64decode(text))) == pytest.approx(plain, abs=1e-6)


def test_fewer_dimensions_have_length_1_again(client, expected):
    answer = client.embeddings.create(model=NAME, input=TEXTS[0], dimensions=32, encoding_format="float")
    close([answer.data[0].embedding], [torch.nn.functional.normalize(expected[0][:32], dim=0)])


def test_neither_a_cached_prefix_nor_waiting_for_pages_changes_them(expected):
    with llmkernels.use(policy="silent"):
        llm = LLM(dtype="float32", page_size=4, kv_cache_pages=30, max_length=128, max_batch_tokens=40)
        llm.generate(TEXTS[3], SamplingParams(max_tokens=4))
        beside = llm.add(TEXTS[1], SamplingParams(max_tokens=40, ignore_eos=True))
        many = [llm.add(text, WISH)[0] for text in (*TEXTS, *TEXTS[::-1])]
        while llm.step():
            llm.check()
        alone = llm.generate(TEXTS[1], SamplingParams(max_tokens=40, ignore_eos=True))
    close([output.embedding for output in many], [*expected, *expected[::-1]])
    assert beside[0].tokens == alone[0].tokens
    assert [output.cached_tokens for output in many] == [0] * 8


def test_one_that_loses_its_pages_midway_begins_again(expected):
    """An older request, of 7 tokens, needs its third page when the long text has had a chunk and all that were left."""
    with llmkernels.use(policy="silent"):
        count = len(LLM(dtype="float32", kv_cache_pages=1).encode(TEXTS[3]))
        llm = LLM(dtype="float32", page_size=4, kv_cache_pages=2 + -(-count // 4), max_length=128, max_batch_tokens=16)
        llm.add([5, 6, 7, 8, 9, 10, 11], SamplingParams(max_tokens=6, ignore_eos=True))
        llm.step()
        output = llm.add(TEXTS[3], WISH)[0]
        llm.step()
        with pytest.raises(RuntimeError, match="let it finish"):
            output.embedding  # noqa: B018
        while llm.step():
            llm.check()
        assert llm.stats()["preemptions"] == 1
        close([output.embedding], expected[3:])
        close(llm.embed(TEXTS), expected)


def test_speculation_leaves_them_as_they_are(expected):
    from llmkernels.engine import Speculation

    with llmkernels.use(policy="silent"):
        wish = Speculation(draft=shipped_model("manual-5m-draft"), ngram=3)
        llm = LLM(dtype="float32", page_size=4, max_length=128, speculation=wish)
        llm.add(TEXTS[3], SamplingParams(max_tokens=30, ignore_eos=True))
        llm.step(), llm.step()
        outputs = [llm.add(text, WISH)[0] for text in TEXTS]
        while llm.step():
            pass
    close([output.embedding for output in outputs], expected)


WRONG = [
    ({"input": ""}, "input 0 is empty"),
    ({"input": []}, "input holds nothing"),
    ({"input": ["x", ""]}, "input 1 is empty"),
    ({"input": [[5], []]}, "input 1 is empty"),
    ({"input": ["x"] * 2049}, "input"),
    ({"input": ["x", "word " * 300]}, "input 1 has"),
    ({"input": [10**6]}, "1000000 is not a token id"),
    ({"input": [-1]}, "input"),
    ({"input": {"a": 1}}, "input"),
    ({}, "input: Field required"),
    ({"input": "x", "dimensions": 0}, "dimensions"),
    ({"input": "x", "dimensions": 257}, "dimensions is 257; this model has 256"),
    ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
    ({"input": "x", "nonsense": 1}, "nonsense: unknown field"),
]


@pytest.mark.parametrize(("body", "words"), WRONG, ids=[words for _, words in WRONG])
def test_wrong_requests_are_told_so(http, body, words):
    answer = http.post("/v1/embeddings", json=body)
    failure = answer.json()["error"]
    assert answer.status_code == 400
    assert words in failure["message"]
    assert failure["type"] == "invalid_request_error"


def test_another_model_is_404_and_no_key_401(http, url):
    assert http.post("/v1/embeddings", json={"input": "x", "model": "gpt"}).status_code == 404
    assert httpx.post(f"{url}/v1/embeddings", json={"input": "x"}).status_code == 401


def test_all_tokens_together_are_limited(http, monkeypatch):
    monkeypatch.setattr(embeddings, "MOST_TOKENS", 10)
    answer = http.post("/v1/embeddings", json={"input": [[5] * 6, [5] * 6]})
    assert "more than 10 tokens in all" in answer.json()["error"]["message"]


def test_metrics_count_what_was_read_and_nothing_written(http):
    def read():
        lines = [line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#"]
        return {name.removeprefix("llmkernels_"): float(value) for name, value in lines}

    before = read()
    http.post("/v1/embeddings", json={"input": [[5] * 6, [5] * 20]})
    after = read()
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == 26
    assert after['answers_total{reason="embedding"}'] - before['answers_total{reason="embedding"}'] == 2
    assert after["generated_tokens_total"] == before["generated_tokens_total"]


def test_embed_stands_alone():
    for wishes in ({"n": 2, "max_tokens": 1}, {"max_tokens": 2}):
        with pytest.raises(ValueError, match="embed is given with"):
            SamplingParams(embed=True, **wishes)
