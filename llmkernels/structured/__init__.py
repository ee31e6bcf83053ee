"""Structured answers: what a text must be, and which tokens may come next so that it is.

    structure.py    Structure: a JSON Schema, regular expression, grammar or choice; a wrong one is refused by name
    schema.py       which JSON Schemas can be enforced, spelled for XGrammar; with merge.py, leaves.py, pattern.py
    grammar.py      Grammars: compiles structures for a tokenizer, in a process of its own (process.py); keeps them
    masks.py        Guide: where an answer stands in its grammar; Masks: what a batch allows, filled meanwhile

It knows no engine: tokens and logits come in, masks go out.
"""

from llmkernels.structured.structure import Structure as Structure
