"""Structured answers: the text is what the structure says, whatever else goes on in the engine."""

import json
import re

import jsonschema
import pytest
import torch

import llmkernels
from llmkernels.engine import LLM, SamplingParams, Structure
from llmkernels.engine.grammar import Masks

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
    guide = llm._grammars.guide(llm._grammars.compiled(PERSONS), frozenset())
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
