"""Structured answers: the text is what the structure says, whatever else goes on in the engine."""

import json
import re
import threading
import time

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schemas import SCHEMAS

import llmkernels
from llmkernels.engine import LLM, SamplingParams, Structure
from llmkernels.structured import masks
from llmkernels.structured.grammar import Grammars
from llmkernels.structured.masks import Guide, Masks
from llmkernels.structured.utf8 import START, after

PROMPT = "The read() system call"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["call", "library"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
PERSONS = Structure(json_schema=PERSON)


@pytest.fixture(scope="module")
def llm():
    with llmkernels.use(policy="silent"):
        llm = LLM(dtype="float32", page_size=4, max_length=256)
        yield llm
        assert llm.stats()["pages_used"] == 0


def answers(llm, prompt=PROMPT, **wishes):
    with llmkernels.use(policy="silent"):
        return llm.generate(prompt, SamplingParams(**{"max_tokens": 80, "temperature": 0.9, "seed": 1} | wishes))


@pytest.mark.parametrize(
    ("structure", "right"),
    [
        (PERSONS, lambda text: jsonschema.validate(json.loads(text), PERSON) is None),
        (Structure(regex=r"[a-z]{3,8}\([0-9]\)"), lambda text: re.fullmatch(r"[a-z]{3,8}\([0-9]\)", text)),
        (Structure(choice=["yes", 'it"s \\ é😀\n', "no"]), lambda text: text in ("yes", 'it"s \\ é😀\n', "no")),
        (Structure(ebnf='root ::= ("ab" | "b"){3} "c"'), lambda text: re.fullmatch("(ab|b){3}c", text)),
    ],
    ids=["schema", "regex", "choice", "ebnf"],
)
def test_every_answer_has_its_structure(llm, structure, right):
    for temperature in (0, 0.9, 3):
        for output in answers(llm, structure=structure, n=4, temperature=temperature):
            assert output.finish_reason == "stop"
            assert right(output.text), output.text


def test_structured_and_free_rows_share_a_batch(llm):
    params = [SamplingParams(max_tokens=60, structure=PERSONS if i % 2 else None) for i in range(6)]
    with llmkernels.use(policy="silent"):
        mixed = llm.generate([PROMPT] * 6, params)
    alone = answers(llm, temperature=0, max_tokens=60)[0].text, answers(llm, temperature=0, structure=PERSONS)[0].text
    assert [output.text for output in mixed] == [*alone] * 3


def test_the_masks_along_a_draft_are_those_that_each_of_its_tokens_leads_to(llm):
    guide = llm._intake.grammars.guide(llm._intake.grammars.compiled(PERSONS), frozenset())
    vocab, draft = llm.config.vocab, llm.tokenizer.encode('{"name": "a', add_special_tokens=False).ids
    assert guide.allowed([*draft, draft[0], 0]) == len(draft) + 1  # "a{" is a name as well; no special token is
    free = torch.zeros(4 + len(draft), vocab)
    masked = free.clone()
    Masks.begin([None, guide], vocab, [[5], [*draft, 0]]).forbid(masked)
    assert torch.equal(masked[:2], free[:2])
    for i, token in enumerate(draft):
        one = torch.zeros(1, vocab)
        Masks.begin([guide], vocab).forbid(one)
        assert torch.equal(one[0], masked[2 + i])
        guide.accept(token)


def test_a_jump_over_forced_text_changes_no_later_token(llm):
    """After the forced tokens the model goes on as behind a prompt that ends with them: their keys are right."""
    forced = "The answer of the machine is:"
    whole = answers(llm, temperature=0, max_tokens=30, structure=Structure(regex=f"{forced} [a-z ]+\\."))[0]
    assert whole.text.startswith(forced)
    cut = next(i for i in range(len(whole.tokens)) if llm.tokenizer.decode(whole.tokens[:i]) == forced)
    rest = Structure(regex=" [a-z ]+\\.")
    again = answers(
        llm, [*whole.prompt_tokens, *whole.tokens[:cut]], temperature=0, max_tokens=30 - cut, structure=rest
    )
    assert again[0].tokens == whole.tokens[cut:]


def test_forced_text_takes_few_steps_and_none_where_logprobs_are_asked_for(llm, monkeypatch):
    structure, steps = Structure(choice=["a text that leaves the model no choice at all"]), 0
    step = llm.step

    def counted():
        nonlocal steps
        steps += 1
        return step()

    monkeypatch.setattr(llm, "step", counted)
    quick = answers(llm, structure=structure)[0]
    few, steps = steps, 0
    slow = answers(llm, structure=structure, logprobs=True)[0]
    assert quick.text == slow.text == "a text that leaves the model no choice at all"
    assert few <= 5 < len(quick.tokens) < steps == len(slow.tokens) == len(slow.logprobs)


def test_preemption_and_prefix_hits_leave_every_structure_whole(llm):
    """Few pages, so that the youngest lose theirs; prompts that begin alike, so that they find some of them again."""
    with llmkernels.use(policy="silent"):
        small = LLM(dtype="float32", page_size=4, max_length=96, kv_cache_pages=21, max_sequences=8)
        params = SamplingParams(max_tokens=70, temperature=0.9, seed=3, n=3, structure=PERSONS)
        found = small.generate([f"{PROMPT} {i % 2}" for i in range(5)], params)
        alone = llm.generate([f"{PROMPT} {i % 2}" for i in range(5)], params)
    assert [output.text for output in found] == [output.text for output in alone]
    stats = small.stats()
    assert stats["preemptions"] > 0
    assert stats["prefix_found_tokens"] > 0
    assert stats["pages_used"] == 0


def test_an_aborted_fork_leaves_the_others_their_way(llm):
    wish = SamplingParams(max_tokens=80, temperature=0.9, seed=5, n=4, structure=PERSONS)
    whole = llm.generate(PROMPT, wish)
    outputs = llm.add(PROMPT, wish)
    llm.abort(outputs[3])  # before it was forked
    for _ in range(6):
        llm.step()
    llm.abort(outputs[0])
    llm.abort(outputs[2])
    while llm.step():
        pass
    assert outputs[1].text == whole[1].text
    assert [output.finish_reason for output in outputs] == ["abort", "stop", "abort", "abort"]
    assert llm.stats()["pages_used"] == 0


def test_stop_strings_end_structures_too(llm):
    whole = answers(llm, structure=PERSONS)[0].text
    cut = answers(llm, structure=PERSONS, stop=' "age')[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(' "age')], "stop")


def test_a_structure_ends_only_where_it_is_complete_or_the_tokens_are_used_up(llm):
    cut = answers(llm, structure=PERSONS, max_tokens=9)[0]
    assert (cut.finish_reason, len(cut.tokens)) == ("length", 9)
    digits = answers(llm, structure=Structure(regex="[0-9]{40}"), max_tokens=60)[0]
    assert re.fullmatch("[0-9]{40}", digits.text)


def test_a_special_token_is_never_text(llm):
    for output in answers(llm, structure=Structure(regex="(.|\\n){5,30}"), temperature=5, n=8):
        assert not {0, 2, 3, 4} & {*output.tokens}


@given(st.one_of(st.binary(max_size=6), st.text(max_size=3).map(str.encode)), st.integers(0, 6))
def test_utf8_is_what_python_reads(text, cut):
    """Byte by byte and at once; between characters exactly where it decodes, dead exactly where nothing can mend it."""
    try:
        text.decode()
        whole = True
    except UnicodeDecodeError as error:
        whole = False
        mendable = error.reason == "unexpected end of data"
    state = after(START, text)
    assert state == after(after(START, text[:cut]), text[cut:]) if after(START, text[:cut]) >= 0 else state < 0
    assert (state == START) == whole
    assert whole or (state > START) == mendable


SURROGATE = Structure(ebnf='root ::= "a" [\\uD800-\\uDFFF] "b"')


def test_bytes_that_are_no_text_are_never_written(llm):
    """XGrammar's ranges of bytes let surrogates and other sequences through that no decoder takes."""
    guide = llm._intake.grammars.guide(llm._intake.grammars.compiled(Structure(regex="[^a]{4,8}")), frozenset())
    known = {
        text: token
        for token, text in reversed([*enumerate(llm._intake.grammars._info.decoded_vocab)])
        if len(text) == 1
    }
    for wrong in (b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe0\x80\x80", b"\xc0\x80", b"\xe2\x28\xa1"):
        assert guide.allowed([known[bytes([byte])] for byte in wrong]) < len(wrong), wrong
    right = "\ud7ff\ue000\U0010ffff".encode()
    assert guide.allowed([known[bytes([byte])] for byte in right]) == len(right)
    for output in answers(llm, structure=Structure(regex="[^a]{4,8}"), temperature=9, n=16):
        assert "\ufffd" not in output.text
        assert output.finish_reason == "stop"


def test_a_grammar_that_lets_nothing_follow_ends_its_answer_alone(llm):
    outputs = llm.add(PROMPT, SamplingParams(max_tokens=20, structure=SURROGATE))
    beside = llm.add(PROMPT, SamplingParams(max_tokens=20, structure=PERSONS, temperature=0.9, seed=1))
    while llm.step():
        pass
    assert (outputs[0].finish_reason, outputs[0].text) == ("error", "a")
    assert "no token may follow" in outputs[0].error
    assert beside[0].finish_reason in ("stop", "length")
    llm.check()


def masking():
    return {thread for thread in threading.enumerate() if thread.name == "llmkernels masks"}


def test_a_grammar_that_takes_too_long_holds_nobody_up(llm, monkeypatch):
    """Its native call cannot be interrupted: the others are served by another thread, and its own ends behind it."""
    answers(llm, max_tokens=1, structure=PERSONS)
    before = masking()
    fill, stuck = Guide.fill, threading.Event()
    slow, beside, later = (llm.add(PROMPT, SamplingParams(max_tokens=12, structure=PERSONS))[0] for _ in range(3))
    monkeypatch.setattr(
        Guide, "fill", lambda guide, *rest: (guide is slow.guide and stuck.wait(60)) or fill(guide, *rest)
    )
    began = time.monotonic()
    while llm.step():
        pass
    assert time.monotonic() - began < 30
    stuck.set()
    for thread in before:
        thread.join(10)
    assert not before & masking()
    assert (slow.finish_reason, slow.error) == (
        "error",
        "after 0 tokens of the answer its grammar takes too long to say what may follow",
    )
    assert beside.text == later.text == answers(llm, max_tokens=12, structure=PERSONS, temperature=0)[0].text


def test_time_adds_up(llm, monkeypatch):
    """Many masks that are each a little slow end an answer as well as a single one."""
    monkeypatch.setattr(masks, "SECONDS_A_TOKEN", -1.0)
    output = answers(llm, structure=PERSONS)[0]
    assert output.finish_reason == "error"
    assert len(output.tokens) < 9  # the first one, and what the schema forces behind it


@pytest.mark.parametrize("index", range(len(SCHEMAS)), ids=lambda index: json.dumps(SCHEMAS[index][0])[:40])
def test_a_schema_is_kept_or_refused_with_the_name_of_what_is_in_the_way(llm, index):
    schema, word = SCHEMAS[index]
    if word:
        with pytest.raises(ValueError, match=re.escape(word)):
            Structure(json_schema=json.dumps(schema))
        return
    params = SamplingParams(max_tokens=150, temperature=1.0, seed=index, n=2, structure=Structure(json_schema=schema))
    for output in llm.generate("{", params):
        if output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), schema)


def test_what_takes_too_long_to_compile_is_refused_and_the_next_one_is_not(llm):
    started = time.monotonic()
    with pytest.raises(ValueError, match="the ebnf cannot be enforced: compiling it takes longer than 5 s"):
        answers(llm, structure=Structure(ebnf="root ::= " + '"a"? ' * 8000))
    assert time.monotonic() - started < 20
    assert answers(llm, structure=Structure(regex="ab"))[0].text == "ab"


def test_the_process_that_compiles_ends_with_its_engine(llm):
    grammars = Grammars(llm.tokenizer, llm.config.vocab, frozenset({0}))
    grammars.compiled(Structure(choice=["a"]))
    compiler = grammars._process
    assert compiler.poll() is None
    del grammars
    assert compiler.poll() is not None


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({}, "nothing; give exactly one"),
        ({"regex": "a", "choice": ["b"]}, "regex, choice; give exactly one"),
        ({"regex": ""}, "at least one character"),
        ({"regex": "a" * 70000}, "at most 65536"),
        ({"choice": []}, "give 1 to 1024 strings"),
        ({"choice": "yes"}, "give 1 to 1024 strings"),
        ({"choice": ["a", ""]}, "give 1 to 1024 strings"),
        ({"json_schema": "{"}, "no JSON Schema"),
        ({"json_schema": {"const": float("nan")}}, "NaN is no JSON"),
        ({"json_schema": {"const": object}}, "no JSON Schema"),
        ({"json_schema": {"enum": ["x" * 70000]}}, "at most 65536"),
    ],
)
def test_wrong_structures(wishes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Structure(**wishes)


@pytest.mark.parametrize(
    ("structure", "words"),
    [
        (Structure(regex="a(?=b)"), "the regex cannot be enforced: Regex parsing error at position 4"),
        (Structure(ebnf="root ::= a"), "the ebnf cannot be enforced"),
        (Structure(ebnf="other ::= [a]"), "the ebnf cannot be enforced"),
    ],
)
def test_what_does_not_compile_says_why_in_one_line(llm, structure, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        answers(llm, structure=structure)
    assert "\n" not in str(caught.value)
    assert "/project" not in str(caught.value)


def test_schemas_that_nest_without_end_are_refused():
    deep: dict = {"type": "integer"}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    with pytest.raises(ValueError, match="nested more than 32 deep"):
        Structure(json_schema=deep)
    chain = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(800)}
    with pytest.raises(ValueError, match="nested more than 32 deep"):
        Structure(json_schema={"$ref": "#/$defs/d0", "$defs": chain | {"d800": {"type": "null"}}})


def test_structure_beside_what_contradicts_it():
    with pytest.raises(ValueError, match="ignore_eos is given with a structure"):
        SamplingParams(structure=PERSONS, ignore_eos=True)
    with pytest.raises(ValueError, match="give one, as Structure"):
        SamplingParams(structure={"type": "object"})
    with llmkernels.use(policy="silent"), pytest.raises(ValueError, match="tokenizer=False"):
        LLM(tokenizer=False).generate([5], SamplingParams(structure=PERSONS))
