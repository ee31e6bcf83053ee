"""The server as OpenAI's own client sees it, over loopback."""

import contextlib
import json
import socket
import threading
import time

import httpx
import openai
import pytest
from live_server import served

import llmkernels
from llmkernels.engine import LLM, SamplingParams
from llmkernels.engine.beam import BeamParams
from llmkernels.server.app import create_app
from llmkernels.server.chat import ChatTemplate
from llmkernels.server.guard import MOST_BYTES

KEY, NAME = "secret", "manual"
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('user', 'system', 'assistant') %}"
    "{{ raise_exception('no ' + m.role) }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPT = "The read() system call"


@pytest.fixture(scope="module")
def llm():
    with llmkernels.use(policy="silent"):
        return LLM(dtype="float32", page_size=4, max_length=256)


@pytest.fixture(scope="module")
def direct():
    """The same model without a server, for what it ought to say."""
    with llmkernels.use(policy="silent"):
        yield LLM(dtype="float32", max_length=256, prefix_reuse=False)


@pytest.fixture(scope="module")
def url(llm):
    app = create_app(llm, NAME, template=ChatTemplate(TEMPLATE, {}), api_key=KEY)
    with served(app) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as http:
        yield http


def expected(direct, prompt, **wishes):
    return direct.generate(prompt, SamplingParams(**wishes))


def test_a_completion_is_what_the_engine_says(client, direct):
    wish = {"max_tokens": 20, "temperature": 0.7, "seed": 3, "n": 2, "presence_penalty": 0.5}
    answer = client.completions.create(model=NAME, prompt=[PROMPT, "A package"], logit_bias={"99": -50}, **wish)
    plain = expected(direct, [PROMPT, "A package"], logit_bias={99: -50}, **wish)
    assert [choice.text for choice in answer.choices] == [output.text for output in plain]
    assert [choice.finish_reason for choice in answer.choices] == [output.finish_reason for output in plain]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    prompt = len(plain[0].prompt_tokens) + len(plain[2].prompt_tokens)
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.completion_tokens == sum(len(output.tokens) for output in plain)


def test_token_ids_are_a_prompt_too(client, direct):
    answer = client.completions.create(model=NAME, prompt=[5, 6, 7], max_tokens=5, temperature=0)
    assert answer.choices[0].text == expected(direct, [5, 6, 7], max_tokens=5)[0].text


def test_a_stream_joined_is_the_answer(client):
    wish = {"model": NAME, "prompt": PROMPT, "max_tokens": 30, "temperature": 0.8, "seed": 5, "n": 2}
    whole = client.completions.create(**wish)
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in client.completions.create(**wish, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            assert reasons[choice.index] is None, "something came after the finish reason"
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_chat_goes_through_the_template(client, direct):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "ls?"}]},
    ]
    answer = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=12, temperature=0)
    ids = direct.tokenizer.encode("system: Be brief.\nuser: ls?\nassistant: ", add_special_tokens=False).ids
    assert answer.choices[0].message.content == expected(direct, ids, max_tokens=12)[0].text
    assert answer.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(
        model=NAME, messages=messages, max_completion_tokens=12, temperature=0, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert [delta.role for delta in deltas][:2] == ["assistant", None]
    assert "".join(delta.content for delta in deltas) == answer.choices[0].message.content


def test_logprobs_of_both_kinds(client, direct):
    plain = expected(direct, PROMPT, max_tokens=6, logprobs=True, top_logprobs=2)[0]
    found = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=2)
    told = found.choices[0].logprobs
    assert told.token_logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    assert "".join(told.tokens) == plain.text
    assert [len(top) for top in told.top_logprobs] == [2] * 6
    assert told.text_offset[1] == len(told.tokens[0])
    chat = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "x"}],
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=4,
    )
    content = chat.choices[0].logprobs.content
    assert [len(entry.top_logprobs) for entry in content] == [4] * 3
    assert content[0].token == content[0].top_logprobs[0].token
    assert bytes(content[0].bytes).decode() == content[0].token


def test_a_stop_string_ends_a_stream(client, direct):
    plain = expected(direct, PROMPT, max_tokens=40, ignore_eos=True)[0].text
    stop = plain[20:26]
    chunks = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop], stream=True
    )
    pieces = [chunk.choices[0] for chunk in chunks]
    assert "".join(piece.text for piece in pieces) == plain[: plain.index(stop)]
    assert pieces[-1].finish_reason == "stop"


def test_beam_search_is_that_of_the_engine(client, http, direct):
    more = {"use_beam_search": True, "length_penalty": 0.5, "early_stopping": "never"}
    wish = {"model": NAME, "max_tokens": 8, "temperature": 0}
    prompts = [PROMPT, "A package"]
    answer = client.completions.create(prompt=prompts, n=2, best_of=3, extra_body=more, **wish)
    found = [direct.beam_search(prompt, BeamParams(3, 8, 0.5, "never"))[:2] for prompt in prompts]
    assert [choice.text for choice in answer.choices] == [beam.text for beams in found for beam in beams]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    chat = client.chat.completions.create(messages=[{"role": "user", "content": "x"}], n=2, extra_body=more, **wish)
    assert len(chat.choices) == 2
    for field, words in (({"top_p": 0.5}, "top_p is given"), ({"temperature": 1}, "temperature is 1 with")):
        refused = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 4, **more, **field})
        assert refused.status_code == 400
        assert words in refused.json()["error"]["message"]


def test_a_second_turn_says_how_much_was_cached(client):
    prompt = "A prompt long enough to fill several pages of four tokens, and then some more of them."
    first, second = (client.completions.create(model=NAME, prompt=prompt, max_tokens=2) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens < 4
    assert second.usage.prompt_tokens_details.cached_tokens >= second.usage.prompt_tokens - 5
    salted = client.completions.create(model=NAME, prompt=prompt, max_tokens=2, extra_body={"cache_salt": "me"})
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(http, llm, stream):
    body = {"prompt": PROMPT, "max_tokens": 200, "n": 4, "ignore_eos": True, "stream": stream}
    if stream:
        with http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body, timeout=0.2)
    end = time.monotonic() + 10
    while llm.stats()["running"] or llm.stats()["waiting"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert llm.stats()["pages_used"] == 0


def test_many_at_once_get_what_each_would_alone(client, direct):
    from concurrent.futures import ThreadPoolExecutor

    def ask(number):
        wish = {"max_tokens": 5 + number, "temperature": 0.9, "seed": number}
        text = client.completions.create(model=NAME, prompt=f"{PROMPT} {number % 3}", **wish).choices[0].text
        return text, wish

    with ThreadPoolExecutor(12) as pool:
        for number, (text, wish) in enumerate(pool.map(ask, range(24))):
            assert text == expected(direct, f"{PROMPT} {number % 3}", **wish)[0].text


def test_the_key_is_asked_for_everywhere_but_at_health(url):
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = httpx.get(url + path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{url}/health").text == "ok\n"


METRICS = [
    *("running", "waiting", "pages_used", "pages_idle", "pages_empty", "preemptions_total", "prefix_hit_rate"),
    *("prefix_asked_tokens_total", "prefix_found_tokens_total", "guessed_tokens_total", "accepted_tokens_total"),
    *("prompt_tokens_total", "generated_tokens_total", "answers_total", "decode_replayed_steps_total"),
    *("generated_tokens_per_second", "first_token_seconds_count", "next_token_seconds_count"),
    *("first_token_seconds_bucket", "next_token_seconds_bucket", "op_calls_total"),
]


def test_models_and_metrics(client, http):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "llmkernels"
    client.completions.create(model=NAME, prompt="x", max_tokens=3)
    text = http.get("/metrics").text
    for name in METRICS:
        assert f"\nllmkernels_{name}" in text, name
    assert 'llmkernels_op_calls_total{backend="cpu",op="paged_attention"}' in text


WRONG = [
    ({"prompt": "x", "max_tokens": 0}, "max_tokens: "),
    ({"prompt": "x", "best_of": 0}, "best_of: "),
    ({"prompt": "x", "nonsense": 1}, "nonsense: unknown field"),
    ({"prompt": "x", "model": "gpt"}, "there is no model 'gpt'; this server has 'manual'"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": []}, "prompt holds nothing"),
    ({"prompt": ["x"] * 60, "n": 16}, "60 prompts with n=16; at most 128 answers"),
    ({"prompt": [10**6]}, "1000000 is not a token id"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": "word " * 3000}, "leave room for more"),
    ({"prompt": "x", "logit_bias": {"99999": 1}}, "99999 is not a token id"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
    ({"prompt": "x", "temperature": 3}, "temperature"),
    ({"prompt": "x", "logprobs": 6}, "logprobs"),
    ({}, "prompt: "),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "words"), WRONG, ids=str)
def test_a_wrong_request_is_told_what_is_wrong(http, body, words, stream):
    answer = http.post("/v1/completions", json=body | {"stream": stream})
    assert answer.status_code in (400, 404)
    assert words in answer.json()["error"]["message"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_wrong_chats(http):
    for messages, words in (
        ([], "messages"),
        ([{"role": "king", "content": "x"}], "messages.0.role"),
        ([{"role": "tool", "content": "x"}], "the chat template says: no tool"),
    ):
        answer = http.post("/v1/chat/completions", json={"messages": messages})
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
    body = {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}
    assert "set logprobs to true" in http.post("/v1/chat/completions", json=body).text


@pytest.mark.parametrize("path", ["completions", "chat/completions", "embeddings"])
def test_half_a_surrogate_pair_is_no_text(http, path):
    """JSON lets it through, json.loads too; tokenizers and UTF-8 do not."""
    for half, status in ((r"\uD800", 400), (r"\udfffx", 400), (r"\ud83d\ude00", 200)):
        text = f'"{half}"'
        messages = f'[{{"role": "user", "content": {text}}}]'
        fields = {"completions": f'"prompt": {text}', "chat/completions": f'"messages": {messages}'}
        body = "{" + fields.get(path, f'"input": {text}') + "}"
        answer = http.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, answer.text
        assert status == 200 or "half a surrogate pair" in answer.json()["error"]["message"]


def test_bodies_that_are_no_requests(http):
    halves = b'{"prompt": "\xed\xa0\xbd\xed\xb8\x80"}'  # a surrogate pair, each half as three bytes
    utf16 = '{"prompt": "a"}'.encode("utf-16-le")
    for content in (b"{", b"\xff", b"[1]", halves, utf16, b"x" * (MOST_BYTES + 1)):
        answer = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == (413 if len(content) > MOST_BYTES else 400)
        assert "error" in answer.json()
    assert http.get("/v1/completions").status_code == 405
    assert "error" in http.get("/nowhere").json()


@pytest.mark.parametrize(
    "head", [b"GET /health HTTP/1.1\r\nX: ", b"GET /", b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 9]
)
def test_a_head_without_end_is_cut_off(url, head):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")  # a request before it changes nothing
        assert b"200 OK" in connection.recv(1 << 16)
        connection.sendall(head)
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                connection.sendall(b"a" * 10_000)
                time.sleep(0.001)
            pytest.fail("a megabyte was taken")


def test_what_is_no_http_is_refused_in_openais_shape_whatever_was_asked_before_it(url):
    host, port = url.removeprefix("http://").split(":")
    body = b'{"prompt": "a", "max_tokens": 1}'
    asked = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    for before in (b"", asked, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(before + b"\x00\xff no HTTP\r\n\r\n")
            got = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert got.startswith(b"HTTP/1.1 400 ")
        assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_a_failing_step_is_told_to_everybody_and_to_health(direct, monkeypatch):
    lost = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(direct, "step", lambda: 1 / 0)
    with served(create_app(direct, NAME, lost=lost.set)) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        for _ in range(2):  # the one that runs into it, and the one that comes later
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x"})
            assert answer.status_code == 503
            assert answer.json()["error"]["type"] == "server_error"
        assert lost.wait(5)
        assert httpx.get(f"{url}/health").status_code == 503
    assert direct.stats()["running"] == 0


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than 1 s"),
        ("{{ 'a' * 10**9 }}", "too large"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable|undefined"),
        ("{{ range(10**9) }}", "too large|Range"),
    ],
)
def test_a_template_cannot_do_harm(source, words):
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"the chat template says: .*({words})"):
        ChatTemplate(source, {}).prompt([{"role": "user", "content": "x"}])
    assert time.monotonic() - start < 5


def test_the_openapi_file_is_complete(http):
    paths = json.loads(http.get("/openapi.json").text)["paths"]
    assert set(paths) == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{model}",
        "/health",
        "/metrics",
        "/status",
    }
