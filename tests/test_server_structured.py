"""response_format, structured_outputs, tools and best_of, as OpenAI's own client sees them."""

import json
import re

import jsonschema
import openai
import pytest
from schemas import SCHEMAS
from starlette.testclient import TestClient

import llmkernels
from llmkernels.engine import LLM
from llmkernels.server.app import create_app
from llmkernels.server.chat import ChatTemplate
from llmkernels.server.tools import Reader, message, part_of

NAME = "manual"
TEMPLATE = (
    "{% if tools %}Tools: {% for t in tools %}{{ t.function | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
    "<{{ c.function.name }} {{ c.function.arguments.city }}>{% endfor %}\n{% endfor %}assistant: "
)
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "minLength": 1, "maxLength": 12}, "days": {"enum": [1, 3, 7]}},
    "required": ["city", "days"],
}
CLOCK = {"type": "object", "properties": {"zone": {"type": "string", "pattern": "^[A-Z]{3}$"}}, "required": ["zone"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "clock", "parameters": CLOCK, "strict": True}},
]
PARAMETERS = {"weather": WEATHER, "clock": CLOCK}
ASK = [{"role": "user", "content": "What is the weather in Rome?"}]


@pytest.fixture(scope="module")
def http():
    with llmkernels.use(policy="silent"):
        llm = LLM(dtype="float32", page_size=4)
    with TestClient(create_app(llm, NAME, template=ChatTemplate(TEMPLATE, {}))) as http:
        yield http
        assert llm.stats()["pages_used"] == 0


@pytest.fixture(scope="module")
def client(http):
    return openai.OpenAI(base_url="http://testserver/v1", api_key="x", http_client=http, max_retries=0)


def chat(client, **wishes):
    wish = {"model": NAME, "messages": ASK, "max_tokens": 300, "temperature": 0.8, "seed": 4} | wishes
    return client.chat.completions.create(**wish)


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def test_a_schema_is_kept(client):
    answer = chat(client, response_format=schema_format(WEATHER), n=3)
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.message.content), WEATHER)
        assert choice.finish_reason == "stop"
    chunks = chat(client, response_format=schema_format(WEATHER), stream=True)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == answer.choices[0].message.content


def test_the_client_parses_into_a_model_of_ours(client):
    from pydantic import BaseModel

    class Event(BaseModel):
        name: str
        day: int

    parsed = client.chat.completions.parse(model=NAME, messages=ASK, response_format=Event, max_tokens=400, seed=1)
    assert isinstance(parsed.choices[0].message.parsed, Event)


def test_any_object_and_plain_text(client):
    answer = chat(client, response_format={"type": "json_object"}, logit_bias={"95": 1}, max_tokens=400)
    choice = answer.choices[0]
    assert choice.message.content.startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)
    plain, text = (chat(client, max_tokens=9, **more) for more in ({}, {"response_format": {"type": "text"}}))
    assert plain.choices[0].message.content == text.choices[0].message.content


def test_an_answer_that_its_grammar_stops_says_why(client):
    surrogate = {"structured_outputs": {"ebnf": 'root ::= "a" [\\uD800-\\uDFFF] "b"'}}
    choice = chat(client, extra_body=surrogate).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("error", "a")
    assert "no token may follow" in choice.error
    *_, last = [chunk.choices[0] for chunk in chat(client, extra_body=surrogate, stream=True)]
    assert (last.finish_reason, last.error) == ("error", choice.error)


@pytest.mark.parametrize(
    ("wish", "right"),
    [
        ({"regex": "[0-9]{3}-[a-z]{2,5}!"}, "[0-9]{3}-[a-z]{2,5}!"),
        ({"choice": ["left", "right"]}, "left|right"),
        ({"grammar": 'root ::= "a" [bc]{2}'}, "a[bc]{2}"),
        ({"json": {"type": "integer", "minimum": 10, "maximum": 20}}, "1[0-9]|20"),
    ],
    ids=str,
)
def test_completions_have_structures_too(client, wish, right):
    body = {"structured_outputs": wish}
    answer = client.completions.create(model=NAME, prompt="Go", max_tokens=60, n=3, extra_body=body)
    for choice in answer.choices:
        assert re.fullmatch(right, choice.text), choice.text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "clock"}}])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_demanded_call_comes_and_keeps_its_schema(client, choice, parallel):
    answer = chat(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel, max_tokens=400)
    said = answer.choices[0]
    assert said.message.tool_calls
    assert said.finish_reason in ("tool_calls", "length")
    if not parallel or choice != "required":
        assert len(said.message.tool_calls) == 1
        assert said.finish_reason == "tool_calls"
    assert said.message.content is None
    calls = said.message.tool_calls[: None if said.finish_reason == "tool_calls" else -1]
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), PARAMETERS[call.function.name])
        assert call.id.startswith("call_")
        assert choice == "required" or call.function.name == "clock"


def test_a_streamed_call_joins_into_the_whole_one(client):
    wish = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "n": 2}
    whole = chat(client, **wish)
    calls, reasons = [{}, {}], [None, None]
    for chunk in chat(client, **wish, stream=True):
        for choice in chunk.choices:
            reasons[choice.index] = choice.finish_reason
            for part in choice.delta.tool_calls or ():
                call = calls[choice.index]
                assert part.index == 0
                if part.id:
                    assert not call, "a call was begun twice"
                    call |= {"name": part.function.name, "arguments": ""}
                call["arguments"] += part.function.arguments
    assert reasons == ["tool_calls"] * 2
    assert calls == [
        {"name": c.message.tool_calls[0].function.name, "arguments": c.message.tool_calls[0].function.arguments}
        for c in whole.choices
    ]


def test_auto_may_talk_and_none_knows_of_no_tools(client):
    auto = chat(client, tools=TOOLS, max_tokens=20).choices[0].message
    assert auto.content or auto.tool_calls
    assert chat(client, tools=TOOLS, tool_choice="none", max_tokens=9).choices[0].message.tool_calls is None
    without = chat(client, max_tokens=9).usage.prompt_tokens
    assert chat(client, tools=TOOLS, tool_choice="none", max_tokens=9).usage.prompt_tokens == without
    assert chat(client, tools=TOOLS, max_tokens=9).usage.prompt_tokens > without


def test_calls_and_their_results_go_back_into_the_prompt(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *ASK,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    assert (
        chat(client, messages=messages, max_tokens=3).usage.prompt_tokens
        > chat(client, max_tokens=3).usage.prompt_tokens
    )
    call["function"]["arguments"] = "{"
    with pytest.raises(openai.BadRequestError, match="arguments of the tool call 'call_1' are not JSON"):
        chat(client, messages=messages)


TEXT = (
    'I will look.<tool_call>\n{"name": "a", "arguments": {"x": "}\\n<"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "b-2", "arguments": {}}\n</tool_call>'
)


@pytest.mark.parametrize("size", [1, 2, 7, 300])
def test_a_text_is_read_the_same_in_pieces_of_any_size(size):
    whole = message(TEXT)
    assert whole["content"] == "I will look."
    assert [call["function"] for call in whole["tool_calls"]] == [
        {"name": "a", "arguments": '{"x": "}\\n<"}'},
        {"name": "b-2", "arguments": "{}"},
    ]
    reader, content, calls = Reader(), "", {}
    for start in range(0, len(TEXT), size):
        for part in map(part_of, reader.push(TEXT[start : start + size], end=start + size >= len(TEXT))):
            content += part.get("content", "")
            for call in part.get("tool_calls", ()):
                held = calls.setdefault(call["index"], {"name": "", "arguments": ""})
                held["name"] += call["function"].get("name", "")
                held["arguments"] += call["function"]["arguments"]
    assert content == whole["content"]
    assert [*calls.values()] == [call["function"] for call in whole["tool_calls"]]
    assert message("5 < 6 <tool")["content"] == "5 < 6 <tool"


def test_the_best_of_many_is_the_likeliest(client):
    wish = {"model": NAME, "prompt": "The read() system call", "max_tokens": 12, "temperature": 1.0, "seed": 2}
    every = client.completions.create(**wish, n=6, logprobs=0).choices
    means = {choice.text: sum(choice.logprobs.token_logprobs) / len(choice.logprobs.tokens) for choice in every}
    found = client.completions.create(**wish, n=2, best_of=6)
    assert [choice.text for choice in found.choices] == sorted(means, key=means.get, reverse=True)[:2]
    assert found.choices[0].logprobs is None
    assert found.usage.completion_tokens == sum(len(choice.logprobs.tokens) for choice in every)


FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}}
WRONG_CHATS = [
    ({"response_format": schema_format({"not": {}})}, "not is not enforced"),
    ({"response_format": schema_format({"type": "array", "uniqueItems": True})}, "uniqueItems is not enforced"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "json_schema"),
    ({"structured_outputs": {"regex": "("}}, "regex"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "exactly one"),
    ({"structured_outputs": {}}, "exactly one"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "both given"),
    ({"structured_outputs": {"grammar": "root ::= nothing"}}, "ebnf cannot be enforced"),
    ({"structured_outputs": {"grammar": "x" * 70000}}, "65536 characters"),
    ({"response_format": schema_format({"enum": ["x" * 70000]})}, "at most 65536"),
    ({"tool_choice": "required"}, "without tools"),
    ({"tools": []}, "tools"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "not among tools"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "two of one name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
    (
        {"tools": [{"type": "function", "function": FUNCTION}]},
        "parameters of the tool 'f': json_schema.properties.a: uniqueItems",
    ),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "leave one out"),
]


@pytest.mark.parametrize(("body", "words"), WRONG_CHATS, ids=lambda value: str(value)[:60])
def test_a_wrong_request_is_told_what_is_wrong(http, body, words):
    answer = http.post("/v1/chat/completions", json={"messages": ASK, "max_tokens": 5} | body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_parameters_that_need_not_be_kept_may_be_anything(client):
    tools = [{"type": "function", "function": FUNCTION | {"strict": False}}]
    call = chat(client, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=400).choices[0]
    assert call.message.tool_calls[0].function.name == "f"


def test_a_wrong_best_of(http):
    for more in ({"best_of": 2, "n": 3}, {"best_of": 2, "stream": True}, {"best_of": 99}):
        answer = http.post("/v1/completions", json={"prompt": "x"} | more)
        assert answer.status_code == 400
        assert "best_of" in answer.json()["error"]["message"]


@pytest.mark.parametrize("number", range(0, len(SCHEMAS), 9))
def test_a_schema_gives_valid_json_or_a_400_that_names_the_keyword(http, number):
    """Every ninth; bench/structured.py and tests/test_engine_grammar.py run all."""
    schema, word = SCHEMAS[number]
    body = {
        "prompt": "{",
        "max_tokens": 200,
        "structured_outputs": {"json": json.dumps(schema)},
        "temperature": 0.9,
        "seed": 1,
    }
    answer = http.post("/v1/completions", json=body)
    if word is None:
        choice = answer.json()["choices"][0]
        assert choice["finish_reason"] in ("stop", "length")
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["text"]), schema)
    else:
        assert answer.status_code == 400
        assert word in answer.json()["error"]["message"]
