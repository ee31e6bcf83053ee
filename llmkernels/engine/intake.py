"""What is asked for, checked and made ready: prompts and parameters in, the outputs to be out."""

from collections.abc import Sequence as Row
from dataclasses import dataclass
from secrets import randbits
from typing import Any

import tokenizers

from llmkernels.engine.lora import Adapters
from llmkernels.engine.output import Output
from llmkernels.engine.params import SamplingParams
from llmkernels.engine.pooling import Mean
from llmkernels.engine.sampling import fork_seed
from llmkernels.engine.sequence import Sequence
from llmkernels.models.encoder import Encoder
from llmkernels.models.tokenizer import Detokenizer, StopStrings
from llmkernels.structured.grammar import Grammars

Prompt = str | list[int]


@dataclass
class Intake:
    """Makes requests of an LLM's prompts.

    max_length: tokens of a prompt and its answer at most.
    stop: the checkpoint's end-of-text tokens.
    default: what is asked for where nothing is said.
    """

    tokenizer: tokenizers.Tokenizer | None
    vocab: int
    max_length: int
    stop: frozenset[int]
    default: SamplingParams
    adapters: Adapters

    def __post_init__(self) -> None:
        self._encoder = Encoder(self.tokenizer) if self.tokenizer else None
        self.grammars = Grammars(self.tokenizer, self.vocab, self.stop) if self.tokenizer else None

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with the special tokens that the tokenizer puts around a prompt."""
        if self._encoder is None:
            raise ValueError("the prompt is text and this LLM has tokenizer=False; give token ids, or tokenizer=<path>")
        return self._encoder.encode(text)

    def decode(self, tokens: Row[int]) -> str:
        """The text of an answer; empty without a tokenizer."""
        return str(self.tokenizer.decode(tokens)) if self.tokenizer else ""

    def grammar(self, params: SamplingParams | None) -> Any:
        """The compiled grammar of the structure that is asked for, maybe after seconds; None where none is."""
        if params is None or params.structure is None:
            return None
        if self.grammars is None:
            raise ValueError("structure is given and this LLM has tokenizer=False; give tokenizer=<path>")
        return self.grammars.compiled(params.structure)

    def request(
        self, prompt: Prompt, params: SamplingParams | None, salt: str | None, adapter: str | None
    ) -> list[Output]:
        """The outputs to be, params.answers of them; the first one's sequence holds the others as forks."""
        params = self.default if params is None else params
        ids = self._tokens(prompt, params)
        used = None if adapter is None else self.adapters.find(adapter)
        scope = salt if used is None else (salt, used.number)
        seed = randbits(64) if params.seed is None else params.seed
        stop = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.stop)
        limit = min(len(ids) + params.max_tokens, self.max_length)
        grammar, outputs = self.grammar(params), []
        for i in range(params.answers):
            sequence = Sequence(ids.copy(), len(ids), limit, stop, scope, adapter=used.slot if used else -1)
            sequence.pooled = Mean() if params.embed else None
            text = self.tokenizer and Detokenizer(self.tokenizer, ids)
            stops = StopStrings(params.stop)
            output = Output(ids, params, fork_seed(seed, i), i, _sequence=sequence, _detokenizer=text, _stops=stops)
            if grammar and self.grammars:
                output.guide = self.grammars.guide(grammar, stop)
            sequence.payload = output
            outputs.append(output)
        outputs[0]._sequence.forks = [output._sequence for output in outputs[1:]]
        return outputs

    def _tokens(self, prompt: Any, params: SamplingParams) -> list[int]:
        """The prompt's ids; ValueError where it, or params, is nothing for this model."""
        if not isinstance(prompt, (str, list, tuple)):
            raise ValueError(f"the prompt is {prompt!r:.80}; give a text, or a list of token ids")
        ids = (prompt and self.encode(prompt)) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop is given and this LLM has tokenizer=False; give stop_token_ids, or tokenizer=<path>")
        for tokens in (ids, params.stop_token_ids, params.logit_bias):
            whole = {*map(type, tokens)} <= {int}
            if not (whole and 0 <= min(tokens, default=0) <= max(tokens, default=0) < self.vocab):
                wrong = next(t for t in tokens if type(t) is not int or not 0 <= t < self.vocab)
                raise ValueError(f"{wrong!r} is not a token id; this model's are 0 to {self.vocab - 1}")
        if len(ids) >= self.max_length:
            raise ValueError(f"the prompt has {len(ids)} tokens; at most {self.max_length - 1} leave room for more")
        return ids
