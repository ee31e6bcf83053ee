"""Structures compiled for one tokenizer, by XGrammar, https://arxiv.org/abs/2411.15100, and kept."""

import json
import subprocess
import sys
import threading
from collections import OrderedDict
from typing import Any
from weakref import WeakValueDictionary, finalize

import tokenizers

from llmkernels.structured import process
from llmkernels.structured.masks import Guide, library
from llmkernels.structured.structure import Structure
from llmkernels.structured.utf8 import Characters

MOST_KEPT = 256  # compiled grammars


class Grammars:
    """Compiles structures for one tokenizer, and keeps the compiled; any thread may call it.

    Args:
        vocab: the width of the logits.
        stop: the checkpoint's end-of-text tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocab: int, stop: frozenset[int]):
        self._tokenizer, self._vocab, self._stop = tokenizer, vocab, stop
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = frozenset(index for index, token in added if token.special)
        self._kept: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._alive: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()  # longer than kept, if in use
        self._process: Any = None
        self._info: Any = None
        self._characters: Characters | None = None
        self._busy = threading.Lock()

    def guide(self, grammar: Any, stop: frozenset[int]) -> Guide:
        """A new answer's way through a compiled grammar.  stop: tokens that end the texts of its request."""
        assert self._characters  # since the first grammar was compiled
        return Guide(grammar, self._stop | (stop & self._special), self._tokenizer, self._characters)

    def compiled(self, structure: Structure) -> Any:
        """The compiled grammar, maybe after seconds.

        Raises:
            ValueError: it does not compile, or takes too long.
        """
        if not self._stop:
            raise ValueError("the checkpoint names no end-of-text token, so no structure could end; use another one")
        with self._busy:
            found = self._alive.get(structure.key)
            if found is None:
                found = self._alive[structure.key] = self._compile(*structure.key)
            self._kept[structure.key] = found
            self._kept.move_to_end(structure.key)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
            return found

    def close(self) -> None:
        """End the process; the next structure starts another."""
        if self._process:
            _end(self._process)
            self._process = None

    def _compile(self, kind: str, text: str) -> Any:
        xgrammar = library()
        if self._info is None:
            self._info = self._tokenizer_info()
            self._characters = Characters(self._info.decoded_vocab, self._stop | self._special)
        compiler: Any = self._process
        if compiler is None or compiler.poll() is not None:
            command = [sys.executable, "-c", f"from {process.__name__} import main; main()"]
            compiler = self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            finalize(self, _end, compiler)  # subprocess would keep it, and its open pipes, until it ends by itself
            process.write(compiler.stdin, self._info.serialize_json())
        process.write(compiler.stdin, [kind, text])
        answer = process.read(compiler.stdout)
        if answer is None:
            self.close()
            raise ValueError("the grammar ended the process that compiled it; give a smaller one")
        if "error" in answer:
            raise ValueError(f"the {kind} cannot be enforced: {answer['error']}")
        return xgrammar.CompiledGrammar.deserialize_json(answer["grammar"], self._info)

    def _tokenizer_info(self) -> Any:
        """Special tokens are no text: no grammar allows them."""
        xgrammar = library()
        vocab = [""] * self._vocab
        for token, index in self._tokenizer.get_vocab().items():
            if index < self._vocab and index not in self._special:
                vocab[index] = token
        decoder = json.loads(self._tokenizer.to_str())["decoder"] or {}
        steps = {step["type"] for step in (decoder, *decoder.get("decoders", ())) if step}
        types = xgrammar.VocabType
        plain = types.BYTE_FALLBACK if "ByteFallback" in steps else types.RAW
        kind = types.BYTE_LEVEL if "ByteLevel" in steps else plain
        return xgrammar.TokenizerInfo(vocab, kind, vocab_size=self._vocab, stop_token_ids=sorted(self._stop))


def _end(compiler: Any) -> None:
    compiler.kill()
    compiler.wait()
