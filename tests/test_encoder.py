"""Texts whose beginnings were encoded before: the ids are those of the whole text, whatever it is made of."""

import json
import random

import pytest
import tokenizers

from llmkernels.models import shipped_model
from llmkernels.models.encoder import BLOCK, Encoder

WORDS = [
    "word",
    " word",
    "'ll",
    "'",
    "don't",
    " the",
    "a b",
    "x" * 40,
    "42",
    "1234567",
    "é",
    "\u0301",
    "漢字",
    "²",
    "🙂",
]
SPACES = [" ", "  ", "\n", "\n\n", "\t ", "\r\n", "\u00a0", "_-", "...", "<|im_start|>", "<|im", "_start|>"]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def tokenizer(**changes):
    content = json.loads((shipped_model() / "tokenizer.json").read_text())
    return tokenizers.Tokenizer.from_str(json.dumps(content | changes))


KINDS = {
    "gpt2": {},
    "llama3": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}},
    "a token with a space": {
        "added_tokens": [
            {"id": 4096, "content": "a b", "special": False, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        ]
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_ids_are_those_of_the_whole_text(kind, seed):
    plain, draw = tokenizer(**KINDS[kind]), random.Random(seed)
    encoder, texts = Encoder(plain), [""]
    assert encoder._remembers
    for _ in range(150):
        known = draw.choice(texts[-20:])
        text = known[: draw.randint(len(known) // 2, len(known))] + "".join(
            draw.choices(WORDS + SPACES, k=draw.randint(0, 150))
        )
        texts.append(text[-4000:] if draw.random() < 0.1 else text[:4000])
        assert encoder.encode(texts[-1]) == plain.encode(texts[-1]).ids


def test_a_text_that_begins_with_a_block_without_a_cut_keeps_the_tokens_before_it():
    encoder, plain = Encoder(tokenizer()), tokenizer()
    for text in ("0" * BLOCK + " one", "0" * BLOCK + " two words", "0" * 3 * BLOCK, "0" * 3 * BLOCK + " more"):
        assert encoder.encode(text) == encoder.encode(text) == plain.encode(text).ids


def test_what_is_known_is_not_encoded_again():
    class Watched:
        def __init__(self):
            self.lengths, self.plain = [], tokenizer()

        def to_str(self):
            return self.plain.to_str()

        def encode(self, text, **options):
            self.lengths.append(len(text))
            return self.plain.encode(text, **options)

    watched = Watched()
    encoder, text = Encoder(watched), "The command lists files, one in each line. " * 200
    encoder.encode(text)
    encoder.encode(text + "And this is new.")
    assert watched.lengths[0] == len(text)
    assert watched.lengths[1] <= 3 * BLOCK


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": BYTES | {"add_prefix_space": True}},
        {"pre_tokenizer": SPLIT | {"pattern": {"Regex": r"(?<=a)b|\w+"}}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}},
    ],
    ids=str,
)
def test_tokenizers_of_other_kinds_encode_every_text_whole(changes):
    encoder = Encoder(tokenizer(**changes))
    assert not encoder._remembers
    text = "abc " * 400
    for _ in range(2):
        assert encoder.encode(text) == tokenizer(**changes).encode(text).ids
